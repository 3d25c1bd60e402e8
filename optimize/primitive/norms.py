"""RMSNormalization in primitive ops, in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import FLOAT32_SCOPE, Recorder, add_initializer, ints, nodes_of

_AXES_INPUT = 18
"""The opset from which ReduceMean takes its axes as an input and not as an attribute."""


def lower_norms(model: ir.Model, opset: int) -> None:
    """Needs RMSNormalization over the last axis; leaves x / sqrt(mean(x²) + ε) in float32, rounded to the activations'
    type before it is multiplied by the weight, as the op's stash_type 1 and transformers have it.

    Squares of a residual stream overflow float16 at 256, hence float32 from the first product on.
    """
    for norm in nodes_of(model, "RMSNormalization"):
        _lower(model.graph, norm, opset)


def _lower(graph: ir.Graph, norm: ir.Node, opset: int) -> None:
    x, weight = norm.inputs
    assert x is not None and x.dtype is not None
    scope = str(norm.name).removesuffix("/RMSNormalization")
    wide, narrow = Recorder(f"{scope}/{FLOAT32_SCOPE}"), Recorder(scope)
    value = x if x.dtype == ir.DataType.FLOAT else wide("Cast", x, to=ir.DataType.FLOAT)
    squares = wide("Mul", value, value)
    if opset < _AXES_INPUT:
        mean = wide("ReduceMean", squares, axes=[-1], keepdims=1)
    else:
        mean = wide("ReduceMean", squares, ints(graph, -1), keepdims=1)
    epsilon = norm.attributes["epsilon"].as_float()
    above = wide("Add", mean, add_initializer(graph, f"epsilon_{epsilon:g}", np.array(epsilon, np.float32)))
    normal = wide("Div", value, wide("Sqrt", above))
    if x.dtype != ir.DataType.FLOAT:
        normal = narrow("Cast", normal, to=x.dtype)
    result = narrow("Mul", normal, weight)
    old = norm.outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.insert_before(norm, [*wide.nodes, *narrow.nodes])
    ir.convenience.replace_all_uses_with(old, result)
    graph.remove(norm, safe=True)
