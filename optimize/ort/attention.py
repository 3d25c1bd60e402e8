"""Attention over a scattered cache becomes GroupQueryAttention, which rotates, appends and attends in one kernel."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from ..graph import MICROSOFT, ROTARY_TABLES, Recorder, add_initializer, constant, ints, nodes_of, producer
from ..tensors import Float32
from .cache_int8 import NO_SCALES, rounded_cache
from .odd_heads import cache_head_dim, positions_of, resized, takes_head


def lower_attention(
    model: ir.Model, rotary: tuple[Float32, Float32], scales: Mapping[str, Float32] = NO_SCALES
) -> None:
    """Needs the canonical graph; leaves GroupQueryAttention with separate queries, keys and values [batch, sequence,
    width].

    `position_ids` and the mask made of them go; `attention_mask` [batch, total_sequence] comes: row lengths are its
    sums (contrib op GroupQueryAttention: seqlens_k is the last valid index of each row). The cache becomes as long as
    the caller's buffer, and a sliding window in the mask the op's own. rotary: the tables of cos and sin [context,
    head_dim / 2]; stored in the dtype of the activations. scales: of a cache in int8, by the names of its inputs, see
    `cache_int8`; none for a cache in the dtype of the activations.
    """
    graph = model.graph
    dtype = graph.outputs[0].dtype
    assert dtype is not None
    lengths, total = _lengths(model)
    tables = [
        add_initializer(graph, name, table.astype(dtype.numpy()))
        for name, table in zip(ROTARY_TABLES, rotary, strict=True)
    ]
    positions = None
    if not takes_head(2 * rotary[0].shape[1]):
        record = Recorder("positions")
        positions = positions_of(graph, record)
        graph.insert_before(graph[0], record.nodes)
    for node in nodes_of(model, "Attention"):
        rounded_cache(_lower(node, [lengths, total], tables, positions), scales)
    common.RemoveUnusedNodesPass()(model)
    graph.inputs.remove(next(value for value in graph.inputs if value.name == "position_ids"))


def _lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """seqlens_k int32 [batch] and the total sequence length int32 [], out of a new input attention_mask."""
    graph = model.graph
    mask = ir.Value(
        name="attention_mask", shape=ir.Shape(["batch", "total_sequence"]), type=ir.TensorType(ir.DataType.INT64)
    )
    graph.inputs.insert(1, mask)
    op, one = Recorder("lengths"), ints(graph, 1)
    total = op("Cast", op("Squeeze", op("Shape", mask, start=1, end=2)), to=ir.DataType.INT32)
    valid = op("ReduceSum", mask, one, keepdims=0)
    last = op("Cast", op("Sub", valid, one), to=ir.DataType.INT32)
    graph.insert_before(graph[0], op.nodes)
    return last, total


def _lower(attention: ir.Node, lengths: list[ir.Value], tables: list[ir.Value], positions: ir.Value | None) -> ir.Node:
    """positions: of the new tokens where they are rotated outside of GroupQueryAttention, else None."""
    scatters = [_expect(value, "TensorScatter") for value in attention.inputs[1:3]]
    pasts = [scatter.inputs[0] for scatter in scatters]
    (heads, head_dim), (kv_heads, _) = _heads(attention.outputs[0]), _heads(pasts[0])
    graph, record = attention.graph, Recorder(str(attention.name).removesuffix("/Attention"))
    assert graph is not None
    flat = _projections(attention, scatters)
    if positions is not None:
        rotated = [record.contrib("RotaryEmbedding", one, positions, *tables, interleaved=0) for one in flat[:2]]
        flat = [*rotated, flat[2]]
    if cache_head_dim(head_dim) != head_dim:
        flat = [resized(graph, record, one, head_dim, cache_head_dim(head_dim)) for one in flat]
    lowered = ir.node(
        "GroupQueryAttention",
        [*flat, *pasts, *lengths, *(tables if positions is None else ())],
        {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": attention.attributes["scale"].as_float(),
            "do_rotary": int(positions is None),
            "rotary_interleaved": 0,
            **_local_window(attention.inputs[3]),
        },
        domain=MICROSOFT,
        num_outputs=3,
        name=str(attention.name).replace("/Attention", "/GroupQueryAttention"),
    )
    lowered.outputs[0].name = lowered.name
    graph.insert_before(attention, [*record.nodes, lowered])
    _replace_merged(graph, attention, lowered.outputs[0], head_dim)
    for scatter, new in zip(scatters, lowered.outputs[1:], strict=True):
        _replace_cache(graph, scatter, new, kv_heads, cache_head_dim(head_dim))
    return lowered


def _local_window(mask: ir.Value | None) -> dict[str, int]:
    """The op's attribute for a mask `key <= query And key > query - window`; none for one without the second part."""
    both = producer(mask, "And")
    if both is None:
        _expect(mask, "LessOrEqual")
        return {}
    first = _expect(_expect(both.inputs[1], "Greater").inputs[1], "Sub")
    window = constant(first.inputs[1])
    assert window is not None and window.size == 1
    return {"local_window_size": int(window.reshape(-1)[0])}


def _projections(attention: ir.Node, scatters: list[ir.Node]) -> list[ir.Value]:
    """Queries, keys and values before heads are told apart and rotated."""
    rotated = (attention.inputs[0], scatters[0].inputs[1])
    unrotated = [_expect(value, "RotaryEmbedding").inputs[0] for value in rotated]
    return [_flat(value) for value in (*unrotated, scatters[1].inputs[1])]


def _replace_cache(graph: ir.Graph, scatter: ir.Node, new: ir.Value, kv_heads: int, head_dim: int) -> None:
    """Make `new`, instead of the scattered buffer, the output; the buffer that comes in is as long as the caller's."""
    past, present = scatter.inputs[0], scatter.outputs[0]
    assert past is not None
    past.shape = ir.Shape(["batch", kv_heads, "past_sequence", head_dim])
    new.name, new.type = present.name, past.type
    new.shape = ir.Shape(["batch", kv_heads, "total_sequence", head_dim])
    graph.outputs[list(graph.outputs).index(present)] = new
    present.name = f"{present.name}/replaced"


def _replace_merged(graph: ir.Graph, attention: ir.Node, new: ir.Value, head_dim: int) -> None:
    """Let the users of the attention's merged heads read `new` instead, padding cut off."""
    result = _merged_heads(attention)
    if cache_head_dim(head_dim) != head_dim:
        record = Recorder(str(new.name))
        new = resized(graph, record, new, cache_head_dim(head_dim), head_dim)
        graph.insert_before(attention, record.nodes)
    new.shape, new.type = result.shape, result.type
    ir.convenience.replace_all_uses_with(result, new)


def _heads(value: ir.Value | None) -> tuple[int, int]:
    """Number and dimension of the heads of [batch, heads, sequence, head_dim]."""
    assert value is not None and value.shape is not None
    return int(value.shape[1]), int(value.shape[3])  # type: ignore[arg-type]


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
