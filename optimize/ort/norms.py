"""RMSNormalization becomes ONNX Runtime's own kernels, the residual addition before it included."""

from __future__ import annotations

import onnx_ir as ir

from ..graph import MICROSOFT, nodes_of, producer


def lower_norms(model: ir.Model) -> None:
    """Needs RMSNormalization over the last axis. Leaves SkipSimplifiedLayerNormalization(a, b) for a norm of a + b,
    whose fourth output is the sum for the next residual, and SimplifiedLayerNormalization for a norm of anything else.
    """
    for node in nodes_of(model, "RMSNormalization"):
        add = producer(node.inputs[0], "Add")
        epsilon = node.attributes["epsilon"].as_float()
        if add is not None and not any(value is None or value.is_initializer() for value in add.inputs):
            _with_skip(node, add, epsilon)
        else:
            _plain(node, epsilon)


def _with_skip(norm: ir.Node, add: ir.Node, epsilon: float) -> None:
    lowered = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": epsilon},
        domain=MICROSOFT,
        num_outputs=4,
        name=str(norm.name).replace("/RMSNormalization", "/SkipSimplifiedLayerNormalization"),
    )
    assert norm.graph is not None
    norm.graph.insert_before(add, lowered)
    for unused in lowered.outputs[1:3]:
        unused.name = ""
    for index, old in ((0, norm.outputs[0]), (3, add.outputs[0])):
        new = lowered.outputs[index]
        new.name, new.shape, new.type = f"{lowered.name}:{index}", old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new)
    norm.graph.remove([norm, add], safe=True)


def _plain(norm: ir.Node, epsilon: float) -> None:
    # Registered in the standard domain by ONNX Runtime, though it is no standard op.
    lowered = ir.node(
        "SimplifiedLayerNormalization",
        norm.inputs,
        {"axis": -1, "epsilon": epsilon, "stash_type": 1},
        name=str(norm.name).replace("/RMSNormalization", "/SimplifiedLayerNormalization"),
    )
    assert norm.graph is not None
    old, new = norm.outputs[0], lowered.outputs[0]
    new.name, new.shape, new.type = lowered.name, old.shape, old.type
    norm.graph.insert_before(norm, lowered)
    ir.convenience.replace_all_uses_with(old, new)
    norm.graph.remove(norm, safe=True)
