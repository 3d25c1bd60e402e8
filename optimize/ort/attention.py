"""Attention over a scattered cache becomes GroupQueryAttention, which rotates, appends and attends in one kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from ..graph import MICROSOFT, add_initializer, nodes_of, producer


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
    for node in nodes_of(model, "Attention"):
        _lower(node, [lengths, total, *tables])
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


def _lower(attention: ir.Node, rest: list[ir.Value]) -> None:
    query, keys, values, _ = attention.inputs
    scatters = [_expect(value, "TensorScatter") for value in (keys, values)]
    flat = [
        _flat(_expect(query, "RotaryEmbedding").inputs[0]),
        _flat(_expect(scatters[0].inputs[1], "RotaryEmbedding").inputs[0]),
        _flat(scatters[1].inputs[1]),
    ]
    pasts = [scatter.inputs[0] for scatter in scatters]
    presents = [scatter.outputs[0] for scatter in scatters]
    heads, kv_heads = (_size(value, 1) for value in (attention.outputs[0], pasts[0]))
    lowered = ir.node(
        "GroupQueryAttention",
        [*flat, *pasts, *rest],
        {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": attention.attributes["scale"].as_float(),
            "do_rotary": 1,
            "rotary_interleaved": 0,
        },
        domain=MICROSOFT,
        num_outputs=3,
        name=str(attention.name).replace("/Attention", "/GroupQueryAttention"),
    )
    result = _merged_heads(attention)
    graph = attention.graph
    assert graph is not None
    graph.insert_before(attention, lowered)
    lowered.outputs[0].name, lowered.outputs[0].shape, lowered.outputs[0].type = lowered.name, result.shape, result.type
    ir.convenience.replace_all_uses_with(result, lowered.outputs[0])
    for past, present, new in zip(pasts, presents, lowered.outputs[1:], strict=True):
        assert past is not None
        head = _size(past, 3)
        past.shape = ir.Shape(["batch", kv_heads, "past_sequence", head])
        new.name, new.shape, new.type = present.name, ir.Shape(["batch", kv_heads, "total_sequence", head]), past.type
        graph.outputs[list(graph.outputs).index(present)] = new
        present.name = f"{present.name}/replaced"


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
