"""The embedding's Gather reads a DequantizeLinear of the table, which TensorRT does row by row without holding it.

A tied head has a copy of its own, transposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..formats import EMBEDDING, Format
from ..graph import Recorder, ints, nodes_of, sizes_of
from ..ort.linear import dense_values
from ..stored import Role, Stored, parts_of, store
from .linear import code_dtype

_SCOPE = EMBEDDING.removesuffix(".weight")


def lower_embedding(model: ir.Model, formats: Mapping[str, Format]) -> None:
    """Needs Gather(embedding, input_ids), input_ids [batch, sequence], in floating point or in blocks of integers that
    divide the columns; leaves the table described for the writer. A dense table is also that of a tied head.
    """
    graph = model.graph
    gather = next(node for node in nodes_of(model, "Gather") if node.inputs[0] is graph.initializers[EMBEDDING])
    format = formats[EMBEDDING]
    record, old = Recorder(_SCOPE), gather.outputs[0]
    new = (_quantised if format.quantised else _dense)(graph, record, gather, format)
    graph.insert_before(gather, record.nodes)
    ir.convenience.replace_all_uses_with(old, new)
    new.shape, new.type = old.shape, old.type
    graph.remove(gather, safe=True)


def _quantised(graph: ir.Graph, record: Recorder, gather: ir.Node, format: Format) -> ir.Value:
    weight, ids = gather.inputs
    assert weight is not None and weight.dtype is not None
    assert format.block and format.coding == "int" and not format.zeros, f"no embedding is stored as {format.name}"
    parts, (rows, columns), activation = parts_of(weight), sizes_of(weight), weight.dtype
    assert columns % format.block == 0, f"rows of {columns} end within a block"

    def stored(role: Role, width: int, dtype: ir.DataType) -> ir.Value:
        content = Stored(parts, format, role, signed=role == "codes")
        return store(graph, f"{_SCOPE}.{role}", [rows, width], dtype, content)

    codes, scales = stored("codes", columns, code_dtype(format)), stored("scales", columns // format.block, activation)
    table = record("DequantizeLinear", codes, scales, axis=1, block_size=format.block)
    values = record("Gather", table, ids, axis=0)
    if not format.offsets:
        return values
    # Each block of the gathered row plus its own offset.
    offsets = stored("offsets", columns // format.block, activation)
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
