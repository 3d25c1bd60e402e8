"""Heads whose dimension GroupQueryAttention does not take (no multiple of 16 with its own rotation, of 8 without).

Such heads are rotated before it and padded with zeros, which add nothing to a product of queries and keys and make
values that are cut off again. Rare (a 3B Llama has heads of 100), so the extra copies are a fair price.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph import Recorder, ints, scalar

_ROTATED, _PLAIN = 16, 8


def takes_head(head_dim: int) -> bool:
    """Whether GroupQueryAttention rotates and attends heads of this dimension itself."""
    return head_dim % _ROTATED == 0


def cache_head_dim(head_dim: int) -> int:
    """The head dimension of the `ort` dialect's cache: padded where it has to be."""
    return head_dim if takes_head(head_dim) else -(-head_dim // _PLAIN) * _PLAIN


def positions_of(graph: ir.Graph, op: Recorder) -> ir.Value:
    """The positions [batch, sequence] of the new tokens, out of attention_mask: behind what the row has already.

    A padded row of a prompt has fewer valid tokens than columns; its positions begin at 0 all the same.
    """
    ids, mask = graph.inputs[:2]
    sequence = op("Shape", ids, start=1, end=2)
    before = op("Max", op("Sub", op("ReduceSum", mask, ints(graph, 1), keepdims=1), sequence), ints(graph, 0))
    return op("Add", before, op("Range", scalar(graph, 0), op("Squeeze", sequence), scalar(graph, 1)))


def resized(graph: ir.Graph, op: Recorder, flat: ir.Value, head_dim: int, wanted: int) -> ir.Value:
    """Every head of [batch, sequence, heads * head_dim] padded with zeros, or cut, to `wanted`."""
    heads = op("Reshape", flat, ints(graph, 0, 0, -1, head_dim))
    amounts = ints(graph, *[0] * 7, wanted - head_dim)  # a negative one cuts
    return op("Reshape", op("Pad", heads, amounts, mode="constant"), ints(graph, 0, 0, -1))
