"""Scales, and offsets, beside codes: in the dtype of the activations, or in float16 and cast to it.

ONNX Runtime folds the Cast when it loads, so the kernels pack what they would have of float32; the file is smaller.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph import Recorder, nodes_of, sizes_of
from ..stored import Stored, store, stored_of


def store_scales(
    graph: ir.Graph, record: Recorder, name: str, shape: list[int], content: Stored, activation: ir.DataType
) -> ir.Value:
    """The numbers of `content` as kernels that compute in `activation` read them."""
    dtype = ir.DataType.FLOAT16 if content.format.half else activation
    stored = store(graph, name, shape, dtype, content)
    return stored if dtype == activation else record("Cast", stored, to=activation)


def share_casts(model: ir.Model) -> None:
    """Needs lowered weights; leaves one Cast where several read the same bytes, as a tied embedding and head do."""
    graph, made = model.graph, dict[tuple[Stored, tuple[int, ...]], ir.Node]()
    for node in nodes_of(model, "Cast"):
        given = node.inputs[0]
        content = stored_of(given) if given is not None else None
        if given is None or content is None:
            continue
        first = made.setdefault((content, tuple(sizes_of(given))), node)
        if first is not node:
            ir.convenience.replace_all_uses_with(node.outputs[0], first.outputs[0])
            graph.remove(node, safe=True)
            if not given.uses():
                del graph.initializers[str(given.name)]
