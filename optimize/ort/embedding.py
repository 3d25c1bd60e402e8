"""The embedding's Gather reads stored rows: GatherBlockQuantized on blocks, Gather and a Cast on plain values."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..formats import EMBEDDING, Format
from ..graph import Recorder, ints, nodes_of, sizes_of
from ..stored import Stored, parts_of, store
from .linear import dense_values

_SCOPE = EMBEDDING.removesuffix(".weight")


def lower_embedding(model: ir.Model, formats: Mapping[str, Format]) -> None:
    """Needs Gather(embedding, input_ids). A tied head reads the same bytes: only the initializer's shape differs."""
    graph = model.graph
    gather = next(node for node in nodes_of(model, "Gather") if node.inputs[0] is graph.initializers[EMBEDDING])
    lower = _quantised if formats[EMBEDDING].quantised else _dense
    record, old = Recorder(_SCOPE), gather.outputs[0]
    new = lower(graph, record, gather, formats[EMBEDDING])
    graph.insert_before(gather, record.nodes)
    ir.convenience.replace_all_uses_with(old, new)
    new.shape, new.type = old.shape, old.type
    graph.remove(gather, safe=True)


def _quantised(graph: ir.Graph, record: Recorder, gather: ir.Node, format: Format) -> ir.Value:
    weight, ids = gather.inputs
    assert weight is not None and weight.dtype is not None
    parts, (rows, columns) = parts_of(weight), sizes_of(weight)
    assert not format.zeros, "no checkpoint has an embedding with zero points"
    row_bytes, shape = columns * format.bits // 8, [rows, columns // format.block]
    codes = store(graph, f"{_SCOPE}.codes", [rows, row_bytes], ir.DataType.UINT8, Stored(parts, format, "codes"))
    scales = store(graph, f"{_SCOPE}.scales", shape, weight.dtype, Stored(parts, format, "scales"))
    layout = {"bits": format.bits, "block_size": format.block, "gather_axis": 0, "quantize_axis": 1}
    values = record.contrib("GatherBlockQuantized", codes, ids, scales, **layout)
    if not format.offsets:
        return values
    # Each block of the gathered row plus its own offset.
    offsets = store(graph, f"{_SCOPE}.offsets", shape, weight.dtype, Stored(parts, format, "offsets"))
    own = record("Unsqueeze", record("Gather", offsets, ids, axis=0), ints(graph, -1))
    total = record("Add", record("Reshape", values, ints(graph, 0, 0, -1, format.block)), own)
    return record("Reshape", total, ints(graph, 0, 0, -1))


def _dense(graph: ir.Graph, record: Recorder, gather: ir.Node, format: Format) -> ir.Value:
    """Gather first, cast the few rows after: casting the table would hold it a second time."""
    weight, ids = gather.inputs
    assert weight is not None and weight.dtype is not None
    values = dense_values(graph, weight, format)
    rows = record("Gather", values, ids, axis=0)
    return rows if values.dtype == weight.dtype else record("Cast", rows, to=weight.dtype)
