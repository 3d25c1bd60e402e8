"""The embedding's Gather reads stored rows: GatherBlockQuantized on blocks, Gather and a Cast on plain values."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..formats import Format
from ..graph import Recorder, sizes_of
from ..lookup import SCOPE, replace_lookup, with_offsets
from ..stored import Role, Stored, parts_of, store
from .scales import store_scales


def lower_embedding(model: ir.Model, formats: Mapping[str, Format]) -> None:
    """Needs Gather(embedding, input_ids). A tied head reads the same bytes: only the initializer's shape differs."""
    replace_lookup(model, formats, _quantised)


def _quantised(graph: ir.Graph, record: Recorder, gather: ir.Node, format: Format) -> ir.Value:
    weight, ids = gather.inputs
    assert weight is not None and weight.dtype is not None
    parts, (rows, columns), activation = parts_of(weight), sizes_of(weight), weight.dtype
    row_bytes, shape = columns * format.bits // 8, [rows, columns // format.block]
    codes = store(graph, f"{SCOPE}.codes", [rows, row_bytes], ir.DataType.UINT8, Stored(parts, format, "codes"))

    def beside(role: Role) -> ir.Value:
        return store_scales(graph, record, f"{SCOPE}.{role}", shape, Stored(parts, format, role), activation)

    inputs = [codes, ids, beside("scales")]
    if format.zeros:
        zeros = Stored(parts, format, "zeros")
        packed = [rows, format.zero_bytes(columns)]
        inputs.append(store(graph, f"{SCOPE}.zeros", packed, ir.DataType.UINT8, zeros))
    layout = {"bits": format.bits, "block_size": format.block, "gather_axis": 0, "quantize_axis": 1}
    values = record.contrib("GatherBlockQuantized", *inputs, **layout)
    if not format.offsets:
        return values
    return with_offsets(graph, record, values, beside("offsets"), ids, format.block)
