"""Projections become DequantizeLinear and MatMul in standard ONNX, on weights that lie transposed: [columns, rows] of
the checkpoint's matrix.

ONNX Runtime makes its fast MatMulNBits of this form, and TensorRT keeps such weights quantised; the other one, with a
Transpose in between, runs a hundred times slower in ONNX Runtime. TensorRT takes no zero points: codes are signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from ..dense import dense_weight
from ..formats import Format
from ..graph import Recorder, add_initializer, ints, sizes_of
from ..linears import Linear, linears_of
from ..stored import Role, Stored, parts_of, store

FLOAT16_SCALES, BLOCKED = 19, 21
"""The opsets whose DequantizeLinear first takes float16 scales, and blocks."""


@dataclass(frozen=True)
class InputScale:
    """How what a projection reads is rounded: to `scale` times a number of `dtype` (INT8 or FLOAT8E4M3FN)."""

    scale: float
    dtype: ir.DataType


NO_INPUT_SCALES: Mapping[str, InputScale] = MappingProxyType({})


def lower_linears(
    model: ir.Model, formats: Mapping[str, Format], *, opset: int, inputs: Mapping[str, InputScale] = NO_INPUT_SCALES
) -> None:
    """Needs MatMul(x, Transpose(weight)), x [batch, sequence, columns]; leaves each weight described for the writer.

    formats: by checkpoint weight; blocks must divide the columns. opset: of the graph; below 21 there are no blocks,
    and below 19 scales are float32. inputs: by checkpoint weight, the scale of what its projection reads, where that
    is quantised too; projections that read the same value with the same scale share one QuantizeLinear.
    """
    rounded: dict[tuple[ir.Value, InputScale], ir.Value] = {}
    for linear in linears_of(model):
        first = parts_of(linear.weight)[0]
        lowering = _Lowering(model.graph, linear, formats[first], opset)
        x = linear.matmul.inputs[0]
        assert x is not None
        if first in inputs:
            if (x, inputs[first]) not in rounded:
                rounded[x, inputs[first]] = lowering.rounded_input(x, inputs[first])
            x = rounded[x, inputs[first]]
        _replace(model.graph, linear.matmul, lowering.product(x), lowering.record.nodes)


def _replace(graph: ir.Graph, matmul: ir.Node, result: ir.Value, nodes: list[ir.Node]) -> None:
    old = matmul.outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.insert_before(matmul, nodes)
    is_output = old in graph.outputs
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    if is_output:
        for node in nodes:
            if node.outputs[0].name == old.name:
                node.outputs[0].name = f"{old.name}/inner"
        result.name, old.name = old.name, f"{old.name}/replaced"
    graph.remove(matmul, safe=True)


class _Lowering:
    """Makes the nodes of one projection, under its name."""

    def __init__(self, graph: ir.Graph, linear: Linear, format: Format, opset: int) -> None:
        self._graph, self._weight, self._format = graph, linear.weight, format
        self._name = str(linear.matmul.name).removesuffix("/MatMul")
        self._rows, self._columns = sizes_of(linear.weight)
        assert linear.weight.dtype is not None
        self._activation = linear.weight.dtype
        self._scale_dtype = self._activation if opset >= FLOAT16_SCALES else ir.DataType.FLOAT
        assert format.block == 0 or opset >= BLOCKED, f"{format.name} has blocks, which opset {opset} lacks"
        self.record = Recorder(self._name)

    def product(self, x: ir.Value) -> ir.Value:
        record, format = self.record, self._format
        if not format.quantised:
            weight = dense_weight(self._graph, record, self._weight, format)
            return record("MatMul", x, record("Transpose", weight, perm=[1, 0]))
        product = record("MatMul", x, self._dequantised())
        if format.offsets:
            product = self._shifted(product, x)
        if self._stored_rows != self._rows:
            bounds = (ints(self._graph, 0), ints(self._graph, self._rows), ints(self._graph, -1))
            product = record("Slice", product, *bounds)
        return product

    def rounded_input(self, x: ir.Value, scale: InputScale) -> ir.Value:
        """x after QuantizeLinear and DequantizeLinear, in its own dtype."""
        record = Recorder(f"{self._name}/input")
        dtype = self._scale_dtype.numpy()
        step = self._constant("scale", np.array(scale.scale, dtype))
        zero = self._constant("zero", np.array(0, scale.dtype.numpy()))
        given = x if self._scale_dtype == self._activation else record("Cast", x, to=self._scale_dtype)
        result = record("DequantizeLinear", record("QuantizeLinear", given, step, zero), step, zero)
        self.record.nodes += record.nodes
        return self._as_activation(result)

    @property
    def _stored_rows(self) -> int:
        """Columns of the stored matrix: bytes hold two 4-bit codes, so their number is even."""
        return self._rows + self._rows % 2 if self._format.bits == 4 else self._rows

    def _dequantised(self) -> ir.Value:
        """The weight [columns, rows] in the dtype of the activations."""
        format, record = self._format, self.record
        codes = self._store("codes", [self._columns, self._stored_rows], code_dtype(format))
        if format.whole:
            scales = self._store("scales", [self._rows], self._scale_dtype)
            return self._as_activation(record("DequantizeLinear", codes, scales, axis=1))
        shape = [format.blocks(self._columns), self._stored_rows]
        assert shape[0] * format.block == self._columns, f"{self._name} has {self._columns} columns"
        if not format.tensor_scale:
            scales = self._store("scales", shape, self._scale_dtype)
            return record("DequantizeLinear", codes, scales, axis=0, block_size=format.block)
        # In float32 up to one Cast, as float16 could not tell the scales of small blocks apart.
        scales = record(
            "DequantizeLinear",
            self._store("scales", shape, ir.DataType.FLOAT8E4M3FN),
            self._store("global", [], ir.DataType.FLOAT),
        )
        values = record("DequantizeLinear", codes, scales, axis=0, block_size=format.block)
        return self._as_activation(values, ir.DataType.FLOAT)

    def _shifted(self, product: ir.Value, x: ir.Value) -> ir.Value:
        """x @ (offset of each block) = (sum of x over each block) @ offsets: exact, and a small part of the work."""
        offsets = self._store("offsets", [self._format.blocks(self._columns), self._stored_rows], self._activation)
        shift = Recorder(f"{self._name}/offsets")  # the projection's own Add is that of its bias
        blocked = shift("Reshape", x, ints(self._graph, 0, 0, -1, self._format.block))
        sums = shift("ReduceSum", blocked, ints(self._graph, -1), keepdims=0)
        shifted = shift("Add", product, shift("MatMul", sums, offsets))
        self.record.nodes += shift.nodes
        return shifted

    def _store(self, role: Role, shape: list[int], dtype: ir.DataType) -> ir.Value:
        content = Stored(parts_of(self._weight), self._format, role, signed=role == "codes", transposed=True)
        return store(self._graph, f"{self._name}.{role}", shape, dtype, content)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self._graph, f"{self._name}.input_{name}", array)

    def _as_activation(self, value: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        """`value`, of `dtype` or else of that of the scales, in the dtype of the activations."""
        given = dtype or self._scale_dtype
        return value if given == self._activation else self.record("Cast", value, to=self._activation)


_CODES = {("int", 4): ir.DataType.INT4, ("int", 8): ir.DataType.INT8}


def code_dtype(format: Format) -> ir.DataType:
    """Of the codes of a quantised format, as DequantizeLinear takes them."""
    floats = {"fp8": ir.DataType.FLOAT8E4M3FN, "fp4": ir.DataType.FLOAT4E2M1}
    return _CODES[format.coding, format.bits] if format.coding == "int" else floats[format.coding]
