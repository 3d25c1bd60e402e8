"""The embedding's Gather reads a DequantizeLinear of the table, which TensorRT does row by row without holding it.

A tied head has a copy of its own, transposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..formats import Format
from ..graph import Recorder, sizes_of
from ..lookup import SCOPE, replace_lookup, with_offsets
from ..stored import Role, Stored, parts_of, store
from .linear import code_dtype


def lower_embedding(model: ir.Model, formats: Mapping[str, Format]) -> None:
    """Needs Gather(embedding, input_ids), input_ids [batch, sequence], in floating point or in blocks of integers that
    divide the columns; leaves the table described for the writer. A dense table is also that of a tied head.
    """
    replace_lookup(model, formats, _quantised)


def _quantised(graph: ir.Graph, record: Recorder, gather: ir.Node, format: Format) -> ir.Value:
    weight, ids = gather.inputs
    assert weight is not None and weight.dtype is not None
    assert format.block and format.coding == "int" and not format.zeros, f"no embedding is stored as {format.name}"
    parts, (rows, columns), activation = parts_of(weight), sizes_of(weight), weight.dtype
    assert columns % format.block == 0, f"rows of {columns} end within a block"

    def stored(role: Role, width: int, dtype: ir.DataType) -> ir.Value:
        content = Stored(parts, format, role, signed=role == "codes")
        return store(graph, f"{SCOPE}.{role}", [rows, width], dtype, content)

    codes, scales = stored("codes", columns, code_dtype(format)), stored("scales", columns // format.block, activation)
    table = record("DequantizeLinear", codes, scales, axis=1, block_size=format.block)
    values = record("Gather", table, ids, axis=0)
    if not format.offsets:
        return values
    offsets = stored("offsets", columns // format.block, activation)
    return with_offsets(graph, record, values, offsets, ids, format.block)
