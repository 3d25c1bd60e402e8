"""Attention over a growing cache in primitive ops, in the form that TensorRT fuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..graph import FLOAT32_SCOPE, Recorder, add_initializer, ints, nodes_of, producer
from .mask import additive_mask


def lower_attention(model: ir.Model) -> None:
    """Needs the canonical graph's TensorScatter and Attention; leaves Concat, MatMul, Add, Softmax and MatMul, and only
    the new rows [batch, kv_heads, sequence, head_dim] as the present.

    The past gets a dynamic length `past_sequence`, from 1 to the context. So a step reads the cache once into the
    Concat and writes back no more than its new rows; a present of the whole length would be a second copy.

    NVIDIA's conditions for the fusion of primitive layers (docs.nvidia.com/deeplearning/tensorrt/latest/
    inference-library/transformers-fused-attention.html): two batched products around a softmax, an additive or boolean
    mask between, and queries multiplied by the scale before the first product. Grouped heads need no copies of keys and
    values: the queries of a group are stacked into [batch, kv_heads, group * sequence, head_dim].

    The softmax stays in the dtype of the activations. A Cast of the scores to float32 would keep TensorRT from fusing
    (github.com/Stability-AI/stable-audio-3/pull/79 measured 4.3 times slower, for nothing). In which type its kernels
    add up, no NVIDIA page was found that says; NaN from the fused one in float16 were reported at 65,536 keys
    (github.com/tier4/autoware-ml#95). Not every release fuses: 8.6 was reported not to on Orin (NVIDIA/TensorRT#3575).
    """
    graph = model.graph
    attentions = list(nodes_of(model, "Attention"))
    query, _, _, visible = attentions[0].inputs[:4]
    cache = attentions[0].inputs[1]
    assert visible is not None
    group = _heads(query) // _heads(cache)
    mask = additive_mask(model, visible, _size(cache, 2), group)
    for attention in attentions:
        _lower(graph, attention, mask)
    common.RemoveUnusedNodesPass()(model)


def _lower(graph: ir.Graph, attention: ir.Node, mask: ir.Value) -> None:
    scatters = [producer(value, "TensorScatter") for value in attention.inputs[1:3]]
    keys, values = (_appended(graph, scatter) for scatter in scatters if scatter is not None)
    heads, kv_heads, head_dim = _heads(attention.outputs[0]), _heads(keys.inputs[0]), _size(keys.inputs[0], 3)
    record = Recorder(str(attention.name).removesuffix("/Attention") + "/attention")
    query = _scaled(graph, attention)
    if heads != kv_heads:
        query = record("Reshape", query, ints(graph, 0, kv_heads, -1, head_dim))
    scores = record("MatMul", query, record("Transpose", keys.outputs[0], perm=[0, 1, 3, 2]))
    weights = record("Softmax", record("Add", scores, mask), axis=-1)
    result = record("MatMul", weights, values.outputs[0])
    if heads != kv_heads:
        result = record("Reshape", result, ints(graph, 0, heads, -1, head_dim))
    old = attention.outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.insert_before(attention, record.nodes)
    ir.convenience.replace_all_uses_with(old, result)
    graph.remove(attention, safe=True)
    for scatter in scatters:
        assert scatter is not None
        graph.remove(scatter, safe=True)


def _scaled(graph: ir.Graph, attention: ir.Node) -> ir.Value:
    """The queries times the scale, before they are rounded to the activations' type."""
    query = attention.inputs[0]
    assert query is not None
    rounding = producer(query, "Cast")
    wide = query if rounding is None else rounding.inputs[0]
    scale = attention.attributes["scale"].as_float()
    record = Recorder(str(attention.name).removesuffix("/Attention") + f"/scale/{FLOAT32_SCOPE}")
    factor = add_initializer(graph, f"scale_{scale:.9g}", np.array(scale, np.float32))
    scaled = record("Mul", wide, factor)
    scaled.shape, scaled.type = query.shape, ir.TensorType(ir.DataType.FLOAT)
    if rounding is None:
        graph.insert_before(attention, record.nodes)
        return scaled
    graph.insert_before(rounding, record.nodes)
    rounding.replace_input_with(0, scaled)
    return query


def _appended(graph: ir.Graph, scatter: ir.Node) -> ir.Node:
    """The past and the new rows as one, in place of the scattered buffer; the new rows become the output."""
    past, new, whole = scatter.inputs[0], scatter.inputs[1], scatter.outputs[0]
    assert past is not None and past.shape is not None and new is not None
    past.shape = ir.Shape([*past.shape[:2], "past_sequence", past.shape[3]])
    record = Recorder(str(scatter.name).replace("/TensorScatter", "/cache"))
    together = record("Concat", past, new, axis=2)
    together.type = past.type
    graph.insert_before(scatter, record.nodes)
    graph.outputs[list(graph.outputs).index(whole)] = new
    new.name, whole.name = whole.name, f"{whole.name}/whole"
    new.type = past.type
    new.shape = ir.Shape([*past.shape[:2], "sequence", past.shape[3]])
    ir.convenience.replace_all_uses_with(whole, together)
    return record.nodes[0]


def _heads(value: ir.Value | None) -> int:
    """Of [batch, heads, sequence, head_dim]."""
    return _size(value, 1)


def _size(value: ir.Value | None, axis: int) -> int:
    assert value is not None and value.shape is not None
    return int(value.shape[axis])  # type: ignore[arg-type]
