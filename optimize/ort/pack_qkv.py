"""GroupQueryAttention reads queries, keys and values from one packed value where one projection makes all three."""

from __future__ import annotations

import onnx_ir as ir

from ..graph import nodes_of, producer


def pack_qkv(model: ir.Model) -> None:
    """Needs `lower_attention` and `pack_linears`; leaves out the Split between them where they fit. Differing formats
    keep separate inputs.
    """
    for node in nodes_of(model, "GroupQueryAttention"):
        split = producer(node.inputs[0], "Split")
        if split is not None and list(split.outputs) == list(node.inputs[:3]):
            node.replace_input_with(0, split.inputs[0])
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)
