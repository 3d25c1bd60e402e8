"""The embedding's Gather reads stored rows: GatherBlockQuantized on blocks, Gather and a Cast on plain values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..formats import EMBEDDING, Format
from ..graph import MICROSOFT, add_initializer, nodes_of
from ..stored import Stored, parts_of, store
from ..tensors import BLOCK
from .linear import dense_weight


def lower_embedding(model: ir.Model, formats: Mapping[str, Format]) -> None:
    """Needs Gather(embedding, input_ids). A tied head reads the same bytes: only the initializer's shape differs."""
    graph = model.graph
    gather = next(node for node in nodes_of(model, "Gather") if node.inputs[0] is graph.initializers[EMBEDDING])
    format = formats[EMBEDDING]
    lower = _quantised if format.quantised else _dense
    old = gather.outputs[0]
    added = lower(graph, gather, format)
    new = added[-1].outputs[0]
    for node in added:
        node.outputs[0].name = node.name
    graph.insert_before(gather, added)
    ir.convenience.replace_all_uses_with(old, new)
    new.shape, new.type = old.shape, old.type
    graph.remove(gather, safe=True)


def _quantised(graph: ir.Graph, gather: ir.Node, format: Format) -> list[ir.Node]:
    weight, ids = gather.inputs
    assert weight is not None and weight.shape is not None and weight.dtype is not None
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    parts, name = parts_of(weight), "model.embed_tokens"
    shape = [rows, columns // format.block]
    codes = store(
        graph, f"{name}.codes", [rows, columns * format.bits // 8], ir.DataType.UINT8, Stored(parts, format, "codes")
    )
    scales = store(graph, f"{name}.scales", shape, weight.dtype, Stored(parts, format, "scales"))
    rows_read = ir.node(
        "GatherBlockQuantized",
        [codes, ids, scales],
        {"bits": format.bits, "block_size": format.block, "gather_axis": 0, "quantize_axis": 1},
        domain=MICROSOFT,
        name=f"{name}/GatherBlockQuantized",
    )
    if not format.offsets:
        return [rows_read]
    offsets = store(graph, f"{name}.offsets", shape, weight.dtype, Stored(parts, format, "offsets"))
    return [rows_read, *_add_offsets(graph, name, rows_read.outputs[0], offsets, ids)]


def _add_offsets(
    graph: ir.Graph, name: str, values: ir.Value, offsets: ir.Value, ids: ir.Value | None
) -> list[ir.Node]:
    """Each block of the gathered row plus its own offset."""
    blocked = add_initializer(graph, "shape_0_0_-1_32", np.array([0, 0, -1, BLOCK], np.int64))
    flat = add_initializer(graph, "shape_0_0_-1", np.array([0, 0, -1], np.int64))
    last = add_initializer(graph, "minus_one", np.array([-1], np.int64))
    reshape = ir.node("Reshape", [values, blocked], name=f"{name}/Reshape")
    own = ir.node("Gather", [offsets, ids], {"axis": 0}, name=f"{name}/Gather_offsets")
    column = ir.node("Unsqueeze", [own.outputs[0], last], name=f"{name}/Unsqueeze")
    total = ir.node("Add", [reshape.outputs[0], column.outputs[0]], name=f"{name}/Add_offsets")
    return [reshape, own, column, total, ir.node("Reshape", [total.outputs[0], flat], name=f"{name}/Reshape_2")]


def _dense(graph: ir.Graph, gather: ir.Node, format: Format) -> list[ir.Node]:
    """Gather first, cast the few rows after: casting the table would hold it a second time."""
    weight, ids = gather.inputs
    assert weight is not None and weight.dtype is not None
    values, casts = dense_weight(graph, weight, format)
    stored = casts[0].inputs[0] if casts else values
    rows = ir.node("Gather", [stored, ids], {"axis": 0}, name="model.embed_tokens/Gather_rows")
    if not casts:
        return [rows]
    return [rows, ir.node("Cast", [rows.outputs[0]], {"to": weight.dtype}, name="model.embed_tokens/Cast_rows")]
