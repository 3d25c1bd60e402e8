"""Attention over a scattered cache becomes GroupQueryAttention, which rotates, appends and attends in one kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from ..graph import MICROSOFT, add_initializer, nodes_of, producer
from .odd_heads import cache_head_dim, positions_of, resized, rotated, takes_head


def lower_attention(model: ir.Model, frequencies: npt.NDArray[np.float32], scaling: float, context: int) -> None:
    """Needs the canonical graph; leaves GroupQueryAttention with separate queries, keys and values [batch, sequence,
    width].

    `position_ids` and the mask made of them go; `attention_mask` [batch, total_sequence] comes: row lengths are its
    sums (contrib op GroupQueryAttention: seqlens_k is the last valid index of each row). The cache becomes as long as
    the caller's buffer. Rotary tables cover `context` positions, in the dtype of the activations.
    """
    graph = model.graph
    dtype = graph.outputs[0].dtype
    assert dtype is not None
    lengths, total = _lengths(model)
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies[None, :]
    tables = [
        add_initializer(graph, name, (function(angles) * np.float32(scaling)).astype(dtype.numpy()))
        for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin))
    ]
    positions = None
    if not takes_head(2 * len(frequencies)):
        positions, added = positions_of(graph)
        graph.insert_before(graph[0], added)
    for node in nodes_of(model, "Attention"):
        _lower(node, [lengths, total], tables, positions)
    common.RemoveUnusedNodesPass()(model)
    graph.inputs.remove(next(value for value in graph.inputs if value.name == "position_ids"))


def _lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """seqlens_k int32 [batch] and the total sequence length int32 [], out of a new input attention_mask."""
    graph = model.graph
    mask = ir.Value(
        name="attention_mask", shape=ir.Shape(["batch", "total_sequence"]), type=ir.TensorType(ir.DataType.INT64)
    )
    graph.inputs.insert(1, mask)
    one = add_initializer(graph, "one", np.array([1], np.int64))
    total = ir.node("Shape", [mask], {"start": 1, "end": 2}, name="lengths/Shape")
    total_scalar = ir.node("Squeeze", [total.outputs[0]], name="lengths/Squeeze")
    total_int = ir.node("Cast", [total_scalar.outputs[0]], {"to": ir.DataType.INT32}, name="lengths/Cast")
    valid = ir.node("ReduceSum", [mask, one], {"keepdims": 0}, name="lengths/ReduceSum")
    last = ir.node("Sub", [valid.outputs[0], one], name="lengths/Sub")
    last_int = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32}, name="lengths/Cast_2")
    added = [total, total_scalar, total_int, valid, last, last_int]
    for node in added:
        node.outputs[0].name = node.name
    graph.insert_before(graph[0], added)
    return last_int.outputs[0], total_int.outputs[0]


def _lower(attention: ir.Node, lengths: list[ir.Value], tables: list[ir.Value], positions: ir.Value | None) -> None:
    """positions: of the new tokens where they are rotated outside of GroupQueryAttention, else None."""
    query, keys, values, _ = attention.inputs
    scatters = [_expect(value, "TensorScatter") for value in (keys, values)]
    flat = [
        _flat(_expect(query, "RotaryEmbedding").inputs[0]),
        _flat(_expect(scatters[0].inputs[1], "RotaryEmbedding").inputs[0]),
        _flat(scatters[1].inputs[1]),
    ]
    pasts = [scatter.inputs[0] for scatter in scatters]
    presents = [scatter.outputs[0] for scatter in scatters]
    heads, kv_heads, head_dim = (_size(*of) for of in ((attention.outputs[0], 1), (pasts[0], 1), (pasts[0], 3)))
    graph, added = attention.graph, list[ir.Node]()
    assert graph is not None
    if positions is not None:
        flat, added = _rotated_and_padded(graph, attention, flat, positions, tables, head_dim)
    lowered = ir.node(
        "GroupQueryAttention",
        [*flat, *pasts, *lengths, *(tables if positions is None else ())],
        {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": attention.attributes["scale"].as_float(),
            "do_rotary": int(positions is None),
            "rotary_interleaved": 0,
        },
        domain=MICROSOFT,
        num_outputs=3,
        name=str(attention.name).replace("/Attention", "/GroupQueryAttention"),
    )
    lowered.outputs[0].name = lowered.name
    graph.insert_before(attention, [*added, lowered])
    _replace_merged(graph, attention, lowered.outputs[0], head_dim)
    cached = cache_head_dim(head_dim)
    for past, present, new in zip(pasts, presents, lowered.outputs[1:], strict=True):
        assert past is not None
        past.shape = ir.Shape(["batch", kv_heads, "past_sequence", cached])
        new.name, new.type = present.name, past.type
        new.shape = ir.Shape(["batch", kv_heads, "total_sequence", cached])
        graph.outputs[list(graph.outputs).index(present)] = new
        present.name = f"{present.name}/replaced"


def _rotated_and_padded(
    graph: ir.Graph,
    attention: ir.Node,
    flat: list[ir.Value],
    positions: ir.Value,
    tables: list[ir.Value],
    head_dim: int,
) -> tuple[list[ir.Value], list[ir.Node]]:
    """Queries, keys and values as GroupQueryAttention takes them, and the nodes that make them so."""
    scope, made, added = str(attention.name).removesuffix("/Attention"), list[ir.Value](), list[ir.Node]()
    for part, value in zip(("query", "key", "value"), flat, strict=True):
        nodes = [] if part == "value" else rotated(f"{scope}.{part}", value, positions, tables)
        turned = nodes[-1].outputs[0] if nodes else value
        if cache_head_dim(head_dim) != head_dim:
            nodes += resized(graph, f"{scope}.{part}", turned, head_dim, cache_head_dim(head_dim))
        added += nodes
        made.append(nodes[-1].outputs[0] if nodes else value)
    for node in added:
        node.outputs[0].name = node.name
    return made, added


def _replace_merged(graph: ir.Graph, attention: ir.Node, new: ir.Value, head_dim: int) -> None:
    """Let the users of the attention's merged heads read `new` instead, padding cut off."""
    result = _merged_heads(attention)
    padded = cache_head_dim(head_dim)
    if padded != head_dim:
        cut = resized(graph, str(new.name), new, padded, head_dim)
        for node in cut:
            node.outputs[0].name = node.name
        graph.insert_before(attention, cut)
        new = cut[-1].outputs[0]
    new.shape, new.type = result.shape, result.type
    ir.convenience.replace_all_uses_with(result, new)


def _size(value: ir.Value | None, axis: int) -> int:
    """A dimension that the trace knows."""
    assert value is not None and value.shape is not None
    return int(value.shape[axis])  # type: ignore[arg-type]


def _expect(value: ir.Value | None, op_type: str) -> ir.Node:
    node = producer(value, op_type)
    assert node is not None, f"the canonical graph should have {op_type} before {value}"
    return node


def _flat(value: ir.Value | None) -> ir.Value:
    """The projection [batch, sequence, heads * head_dim] that was reshaped and transposed into [batch, heads, sequence,
    head_dim].
    """
    flat = _expect(_expect(value, "Transpose").inputs[0], "Reshape").inputs[0]
    assert flat is not None
    return flat


def _merged_heads(attention: ir.Node) -> ir.Value:
    """The attention's output after its Transpose and Reshape: [batch, sequence, heads * head_dim]."""
    value = attention.outputs[0]
    for op_type in ("Transpose", "Reshape"):
        (user,) = value.consumers()
        assert user.op_type == op_type
        value = user.outputs[0]
    return value
