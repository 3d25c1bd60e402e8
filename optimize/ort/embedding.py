"""The embedding's Gather reads stored rows: GatherBlockQuantized on blocks, Gather and a Cast on plain values."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..formats import Format
from ..graph import Recorder, sizes_of
from ..lookup import SCOPE, replace_lookup, with_offsets
from ..stored import Stored, parts_of, store


def lower_embedding(model: ir.Model, formats: Mapping[str, Format]) -> None:
    """Needs Gather(embedding, input_ids). A tied head reads the same bytes: only the initializer's shape differs."""
    replace_lookup(model, formats, _quantised)


def _quantised(graph: ir.Graph, record: Recorder, gather: ir.Node, format: Format) -> ir.Value:
    weight, ids = gather.inputs
    assert weight is not None and weight.dtype is not None
    parts, (rows, columns) = parts_of(weight), sizes_of(weight)
    assert not format.zeros, "no checkpoint has an embedding with zero points"
    row_bytes, shape = columns * format.bits // 8, [rows, columns // format.block]
    codes = store(graph, f"{SCOPE}.codes", [rows, row_bytes], ir.DataType.UINT8, Stored(parts, format, "codes"))
    scales = store(graph, f"{SCOPE}.scales", shape, weight.dtype, Stored(parts, format, "scales"))
    layout = {"bits": format.bits, "block_size": format.block, "gather_axis": 0, "quantize_axis": 1}
    values = record.contrib("GatherBlockQuantized", codes, ids, scales, **layout)
    if not format.offsets:
        return values
    offsets = store(graph, f"{SCOPE}.offsets", shape, weight.dtype, Stored(parts, format, "offsets"))
    return with_offsets(graph, record, values, offsets, ids, format.block)
