"""Rotary tables are stored, not computed: both TensorRT dialects gather their rows by position."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from ..graph import FLOAT32_SCOPE, ROTARY_TABLES, Recorder, add_initializer, input_named, nodes_of
from ..tensors import Float32


def store_rotary_tables(model: ir.Model, rotary: tuple[Float32, Float32]) -> None:
    """Needs RotaryEmbedding(x, cos, sin) without position_ids; leaves it in float32 between two Casts where x is not,
    on rows of `cos_cache` and `sin_cache` that are gathered once for all layers.

    rotary: cos and sin of every position, float32 [context, head_dim / 2]. Angles computed in the graph would differ
    between backends by more than float16 rounds: at position 8000 one unit in the last place of a float32 frequency
    turns a head by half a thousandth.
    """
    graph, record = model.graph, Recorder("model.rotary_emb")
    positions = input_named(graph, "position_ids")
    tables = [
        record("Gather", add_initializer(graph, name, table), positions, axis=0)
        for name, table in zip(ROTARY_TABLES, rotary, strict=True)
    ]
    for gathered in tables:
        gathered.type = ir.TensorType(ir.DataType.FLOAT)
        gathered.shape = ir.Shape(["batch", "sequence", rotary[0].shape[1]])
    graph.insert_before(graph[0], record.nodes)
    for node in nodes_of(model, "RotaryEmbedding"):
        for index, table in enumerate(tables, 1):
            node.replace_input_with(index, table)
        _rotate_in_float32(graph, node)
    common.RemoveUnusedNodesPass()(model)


def _rotate_in_float32(graph: ir.Graph, node: ir.Node) -> None:
    x, rotated = node.inputs[0], node.outputs[0]
    assert x is not None and x.dtype is not None
    if x.dtype == ir.DataType.FLOAT:
        return
    before, after = Recorder(f"{node.name}/{FLOAT32_SCOPE}"), Recorder(f"{node.name}/rounded")
    wide = before("Cast", x, to=ir.DataType.FLOAT)
    wide.shape, wide.type = x.shape, ir.TensorType(ir.DataType.FLOAT)
    users = list(rotated.uses())
    narrow = after("Cast", rotated, to=x.dtype)
    narrow.shape, narrow.type = x.shape, x.type
    node.replace_input_with(0, wide)
    rotated.type = wide.type
    graph.insert_before(node, before.nodes)
    graph.insert_after(node, after.nodes)
    for user, index in users:
        user.replace_input_with(index, narrow)
