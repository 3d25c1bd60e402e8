"""Heads whose dimension GroupQueryAttention does not take (no multiple of 16 with its own rotation, of 8 without).

Such heads are rotated before it and padded with zeros, which add nothing to a product of queries and keys and make
values that are cut off again. Rare (a 3B Llama has heads of 100), so the extra copies are a fair price.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import MICROSOFT, add_initializer

_ROTATED, _PLAIN = 16, 8


def takes_head(head_dim: int) -> bool:
    """Whether GroupQueryAttention rotates and attends heads of this dimension itself."""
    return head_dim % _ROTATED == 0


def cache_head_dim(head_dim: int) -> int:
    """The head dimension of the `ort` dialect's cache: padded where it has to be."""
    return head_dim if takes_head(head_dim) else -(-head_dim // _PLAIN) * _PLAIN


def positions_of(graph: ir.Graph) -> tuple[ir.Value, list[ir.Node]]:
    """The positions [batch, sequence] of the new tokens, out of attention_mask: behind what the row has already.

    A padded row of a prompt has fewer valid tokens than columns; its positions begin at 0 all the same.
    """
    ids, mask = graph.inputs[:2]
    constants = {value: add_initializer(graph, name, np.array([value], np.int64)) for name, value in _CONSTANTS}
    scalars = [add_initializer(graph, f"{name}_scalar", np.array(value, np.int64)) for name, value in _CONSTANTS]
    added: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"positions/{op_type}_{len(added)}")
        node.outputs[0].name = node.name
        added.append(node)
        return node.outputs[0]

    sequence = op("Shape", ids, start=1, end=2)
    before = op("Max", op("Sub", op("ReduceSum", mask, constants[1], keepdims=1), sequence), constants[0])
    steps = op("Range", scalars[0], op("Squeeze", sequence), scalars[1])
    return op("Add", before, steps), added


_CONSTANTS = (("zero", 0), ("one", 1))


def rotated(name: str, flat: ir.Value, positions: ir.Value, tables: list[ir.Value]) -> list[ir.Node]:
    """Queries or keys [batch, sequence, heads * head_dim], rotated; tables: cos and sin [context, head_dim / 2]."""
    node = ir.node(
        "RotaryEmbedding",
        [flat, positions, *tables],
        {"interleaved": 0},
        domain=MICROSOFT,
        name=f"{name}/RotaryEmbedding",
    )
    return [node]


def resized(graph: ir.Graph, name: str, flat: ir.Value, head_dim: int, wanted: int) -> list[ir.Node]:
    """Every head of [batch, sequence, heads * head_dim] padded with zeros, or cut, to `wanted`."""
    split = add_initializer(graph, f"shape_0_0_-1_{head_dim}", np.array([0, 0, -1, head_dim], np.int64))
    joined = add_initializer(graph, "shape_0_0_-1", np.array([0, 0, -1], np.int64))
    pads = np.array([0] * 7 + [wanted - head_dim], np.int64)  # negative pads cut
    amount = add_initializer(graph, f"pads_{wanted - head_dim}", pads)
    heads = ir.node("Reshape", [flat, split], name=f"{name}/Reshape_heads")
    padded = ir.node("Pad", [heads.outputs[0], amount], {"mode": "constant"}, name=f"{name}/Pad")
    return [heads, padded, ir.node("Reshape", [padded.outputs[0], joined], name=f"{name}/Reshape_flat")]
