"""Projections become MatMulNBits on block-quantised weights, FusedMatMul on plain ones; rows stay as the checkpoint has
them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..formats import Format
from ..graph import MICROSOFT, add_initializer
from ..stored import Stored, parts_of, store
from ..tensors import BLOCK
from .pack_linears import Linear, linears_of

_DENSE = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def lower_linears(model: ir.Model, formats: Mapping[str, Format], accuracy_level: int) -> None:
    """Needs MatMul(x, Transpose(weight)); leaves each weight described for the writer, as its kernel reads it."""
    for linear in linears_of(model):
        format = formats[parts_of(linear.weight)[0]]
        if format.quantised:
            result, added = _quantised(model.graph, linear, format, accuracy_level)
        else:
            result, added = _dense(model.graph, linear, format)
        old = linear.matmul.outputs[0]
        result.shape, result.type = old.shape, old.type
        for node in added:
            node.outputs[0].name = node.name
        model.graph.insert_before(linear.matmul, added)
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        if result in model.graph.outputs:
            result.name, old.name = old.name, f"{old.name}/replaced"


def _quantised(graph: ir.Graph, linear: Linear, format: Format, accuracy_level: int) -> tuple[ir.Value, list[ir.Node]]:
    name, parts = str(linear.matmul.name).removesuffix("/MatMul"), parts_of(linear.weight)
    x, activation = linear.matmul.inputs[0], linear.weight.dtype
    assert linear.weight.shape is not None and activation is not None and x is not None
    rows, columns = (int(size) for size in linear.weight.shape)  # type: ignore[arg-type]
    blocks = -(-columns // format.block)
    codes = store(
        graph,
        f"{name}.codes",
        [rows, blocks, BLOCK * format.bits // 8],
        ir.DataType.UINT8,
        Stored(parts, format, "codes"),
    )
    scales = store(graph, f"{name}.scales", [rows, blocks], activation, Stored(parts, format, "scales"))
    product = ir.node(
        "MatMulNBits",
        [x, codes, scales],
        {"K": columns, "N": rows, "bits": format.bits, "block_size": format.block, "accuracy_level": accuracy_level},
        domain=MICROSOFT,
        name=f"{name}/MatMulNBits",
    )
    if not format.offsets:
        return product.outputs[0], [product]
    offsets = store(graph, f"{name}.offsets", [rows, blocks], activation, Stored(parts, format, "offsets"))
    corrected = _offset_correction(graph, name, x, offsets)
    total = ir.node("Add", [product.outputs[0], corrected[-1].outputs[0]], name=f"{name}/Add_offsets")
    return total.outputs[0], [product, *corrected, total]


def _offset_correction(graph: ir.Graph, name: str, x: ir.Value, offsets: ir.Value) -> list[ir.Node]:
    """x @ (offset of each block) = (sum of x over each block) @ offsets^T: exact, and a 32nd of the work. A floating
    zero point inside MatMulNBits would be 20 to 30 times slower and not bit-equal.
    """
    blocked = add_initializer(graph, "shape_0_0_-1_32", np.array([0, 0, -1, BLOCK], np.int64))
    last = add_initializer(graph, "minus_one", np.array([-1], np.int64))
    reshape = ir.node("Reshape", [x, blocked], name=f"{name}/Reshape_blocks")
    sums = ir.node("ReduceSum", [reshape.outputs[0], last], {"keepdims": 0}, name=f"{name}/ReduceSum_blocks")
    product = ir.node(
        "FusedMatMul", [sums.outputs[0], offsets], {"transB": 1}, domain=MICROSOFT, name=f"{name}/FusedMatMul_offsets"
    )
    return [reshape, sums, product]


def _dense(graph: ir.Graph, linear: Linear, format: Format) -> tuple[ir.Value, list[ir.Node]]:
    name = str(linear.matmul.name).removesuffix("/MatMul")
    weight, added = dense_weight(graph, linear.weight, format)
    product = ir.node(
        "FusedMatMul",
        [linear.matmul.inputs[0], weight],
        {"transB": 1},
        domain=MICROSOFT,
        name=f"{name}/FusedMatMul",
    )
    return product.outputs[0], [*added, product]


def dense_weight(graph: ir.Graph, weight: ir.Value, format: Format) -> tuple[ir.Value, list[ir.Node]]:
    """The weight stored in `format`, and the Cast to the dtype that it has in the canonical graph, which is that of the
    activations (ONNX Runtime folds the Cast when it loads).
    """
    activation = weight.dtype
    assert weight.shape is not None and activation is not None
    name, dtype = str(weight.name), _DENSE[format.name]
    shape = [int(size) for size in weight.shape]  # type: ignore[arg-type]
    values = store(graph, f"{name}.{format.name}", shape, dtype, Stored(parts_of(weight), format, "values"))
    if dtype == activation:
        return values, []
    cast = ir.node("Cast", [values], {"to": activation}, name=f"{name}/Cast")
    cast.outputs[0].name = cast.name
    return cast.outputs[0], [cast]
