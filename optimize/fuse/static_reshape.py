"""Reshape(x, Concat(batch, sequence, …)) becomes Reshape(x, [0, 0, …]): no shape arithmetic at run time."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from ..graph import constant, ints, nodes_of, producer


def fuse_static_reshape(model: ir.Model) -> None:
    """Needs folded constants. The first two parts must be x's own first two dimensions, as transformers' views have
    them.
    """
    for node in nodes_of(model, "Reshape"):
        concat = producer(node.inputs[1], "Concat")
        if concat is None or len(concat.inputs) < 3:
            continue
        rest = [constant(part) for part in concat.inputs[2:]]
        if not _copies_leading(node, concat) or any(part is None for part in rest):
            continue
        target = [0, 0, *(int(size) for part in rest if part is not None for size in part.reshape(-1))]
        node.replace_input_with(1, ints(model.graph, *target))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    common.RemoveUnusedNodesPass()(model)


def _copies_leading(node: ir.Node, concat: ir.Node) -> bool:
    """Whether the output keeps the input's first two dimensions, both of which are free."""
    before, after = (value.shape if value is not None else None for value in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or any(constant(part) is not None for part in concat.inputs[:2]):
        return False
    return list(before[:2]) == list(after[:2])
