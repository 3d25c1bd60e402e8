"""Projections become MatMulNBits on block-quantised weights, FusedMatMul on plain ones; rows stay as they were."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..dense import dense_weight
from ..formats import Format
from ..graph import Recorder, ints, sizes_of
from ..linears import Linear, linears_of
from ..stored import Stored, parts_of, store
from .scales import store_scales


def lower_linears(model: ir.Model, formats: Mapping[str, Format], accuracy_level: int) -> None:
    """Needs MatMul(x, Transpose(weight)); leaves each weight described for the writer, as its kernel reads it."""
    for linear in linears_of(model):
        format = formats[parts_of(linear.weight)[0]]
        record = Recorder(str(linear.matmul.name).removesuffix("/MatMul"))
        if format.quantised:
            result = _quantised(model.graph, record, linear, format, accuracy_level)
        else:
            weight = dense_weight(model.graph, record, linear.weight, format)
            result = record.contrib("FusedMatMul", linear.matmul.inputs[0], weight, transB=1)
        old = linear.matmul.outputs[0]
        result.shape, result.type = old.shape, old.type
        model.graph.insert_before(linear.matmul, record.nodes)
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        if result in model.graph.outputs:
            result.name, old.name = old.name, f"{old.name}/replaced"


def _quantised(graph: ir.Graph, record: Recorder, linear: Linear, format: Format, accuracy_level: int) -> ir.Value:
    parts, x, activation = parts_of(linear.weight), linear.matmul.inputs[0], linear.weight.dtype
    assert activation is not None
    name = str(linear.matmul.name).removesuffix("/MatMul")
    rows, columns = sizes_of(linear.weight)
    blocks, block_bytes = format.blocks(columns), format.block * format.bits // 8
    codes = store(
        graph, f"{name}.codes", [rows, blocks, block_bytes], ir.DataType.UINT8, Stored(parts, format, "codes")
    )
    content = Stored(parts, format, "scales")
    scales = store_scales(graph, record, f"{name}.scales", [rows, blocks], content, activation)
    zeros = None
    if format.zeros:
        shape = [rows, format.zero_bytes(columns)]
        zeros = store(graph, f"{name}.zeros", shape, ir.DataType.UINT8, Stored(parts, format, "zeros"))
    product = record.contrib(
        "MatMulNBits",
        x,
        codes,
        scales,
        *([zeros] if zeros is not None else []),
        K=columns,
        N=rows,
        bits=format.bits,
        block_size=format.block,
        accuracy_level=accuracy_level,
    )
    if not format.offsets:
        return product
    # x @ (offset of each block) = (sum of x over each block) @ offsets^T: exact, and a 32nd of the work. A floating
    # zero point inside MatMulNBits would be 20 to 30 times slower and not bit-equal.
    shift = Recorder(f"{name}/offsets")  # the projection's own Add is that of its bias
    content = Stored(parts, format, "offsets")
    offsets = store_scales(graph, shift, f"{name}.offsets", [rows, blocks], content, activation)
    blocked = shift("Reshape", x, ints(graph, 0, 0, -1, format.block))
    sums = shift("ReduceSum", blocked, ints(graph, -1), keepdims=0)
    shifted = shift("Add", product, shift.contrib("FusedMatMul", sums, offsets, transB=1))
    record.nodes += shift.nodes
    return shifted
