"""What an ONNX file of another tool says of itself: its inputs and outputs, operators, kinds of weights and the files
that they lie in; read where it lies, whatever its size, and without ONNX Runtime.

Field numbers: onnx.proto of ONNX 1.16 and later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from mmap import ACCESS_READ, mmap
from pathlib import Path

from ....errors import LlamaExportError
from ...onnx_file import DTYPES
from ...protobuf import Buffer, Field, fields_of, packed_of, text_of

MOST_BYTES = 1 << 31
"""Of a file in the format of protobuf."""
_MOST_FIELDS = 4 << 20
"""That are looked at; a Llama of 126 layers written out in small operators has some 500,000."""
_MOST_DEPTH = 32
_MOST_NAME = 512
_MOST_DIMENSIONS = 8

_MODEL, _GRAPH, _FUNCTION, _TRAINING = "model", "graph", "function", "training"
_NODE, _ATTRIBUTE, _TENSOR, _SPARSE = "node", "attribute", "tensor", "sparse tensor"
_PARTS: Mapping[str, Mapping[int, str]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}
"""By message and field number, the messages that a tensor can be in: all of them, as each may name a file."""

_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _ELEMENT, _SHAPE, _DIM, _DIM_VALUE = 1, 2, 1, 1, 2, 1, 1
_NODE_INPUT, _NODE_OP, _NODE_ATTRIBUTE, _ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 4, 5, 1, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_DTYPES: Mapping[int, str] = {**DTYPES, 9: "bool"}
"""TensorProto.DataType -> name; also what no bundle has."""
_DENSE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_STORED_BITS = {"uint8": 8, "int8": 8, "float8e4m3fn": 8, "uint4": 4, "int4": 4, "float4e2m1": 4}
_BLOCKWISE = ("MatMulNBits", "GatherBlockQuantized")
_SCALED = ("DequantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul")
_ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class Port:
    """An input or output of the graph. dims: None where a size is free. optional: the graph has a value for it."""

    name: str
    dtype: str
    dims: tuple[int | None, ...]
    optional: bool = False


@dataclass(frozen=True)
class OnnxFile:
    """ops: every operator in it. files: that tensors name, as they are
    written. weights: "fp32", "fp16", "bf16", or the bits of quantised ones, "8" or "4", the fewest where several.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ops: frozenset[str]
    files: frozenset[str]
    weights: str

    @property
    def rounds_activations(self) -> bool:
        """Whether the graph itself rounds activations to 8 bits."""
        return not self.ops.isdisjoint(_ROUNDING)


@dataclass
class _Found:
    """What a walk through the file comes upon."""

    data: Buffer
    left: int
    ops: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    dtypes: dict[str, str] = field(default_factory=dict)
    elements: Counter[str] = field(default_factory=Counter)
    bits: set[int] = field(default_factory=set)
    scaled: set[str] = field(default_factory=set)

    def fields(self, part: Field) -> Iterator[Field]:
        for one in fields_of(self.data, part.start, part.stop):
            self.left -= 1
            if self.left < 0:
                raise ValueError("it has more parts than any decoder")
            yield one

    def text(self, part: Field) -> str:
        if part.stop - part.start > _MOST_NAME:
            raise ValueError("it has a name that is too long")
        return text_of(self.data, part)


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file.

    Raises LlamaExportError when it cannot be read, is larger than protobuf allows, or is no ONNX model.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= MOST_BYTES:
            raise LlamaExportError(
                f"{path} has {size} bytes, which no ONNX file has (at most 2 GiB, with the weights of larger models "
                "beside it); export it again."
            )
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _read(data)
    except OSError as error:
        raise LlamaExportError(f"{path} cannot be read: {error.strerror}; check its permissions.") from error
    except ValueError as error:
        raise LlamaExportError(f"{path} is no ONNX file of a decoder: {error}; export it again.") from error


def _read(data: Buffer) -> OnnxFile:
    found = _Found(data, _MOST_FIELDS)
    whole = Field(0, None, 0, 0, len(data))
    try:
        ports = _ports(found, whole)
        _walk(found, _MODEL, whole, 0)
    except LlamaExportError as error:  # of protobuf, whose words are for bundles
        raise ValueError("it is damaged, or not in the format of protobuf") from error
    return OnnxFile(*ports, frozenset(found.ops), frozenset(found.files), _weights(found))


def _ports(found: _Found, whole: Field) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and the outputs."""
    graphs = [part for part in found.fields(whole) if _PARTS[_MODEL].get(part.number) == _GRAPH]
    if len(graphs) != 1 or graphs[0].varint is not None:
        raise ValueError("it holds no graph")
    inputs, outputs, given = list[Port](), list[Port](), set[str]()
    for part in found.fields(graphs[0]):
        if part.number == _GRAPH_INPUT:
            inputs.append(_port(found, part))
        elif part.number == _GRAPH_OUTPUT:
            outputs.append(_port(found, part))
        elif part.number == _GRAPH_INITIALIZER:
            given.update(found.text(one) for one in found.fields(part) if one.number == _TENSOR_NAME)
    return tuple(replace(port, optional=port.name in given) for port in inputs), tuple(outputs)


def _port(found: _Found, value: Field) -> Port:
    name, dtype, dims = "", "", list[int | None]()
    for one in found.fields(value):
        if one.number == _VALUE_NAME:
            name = found.text(one)
        for tensor in found.fields(one) if one.number == _VALUE_TYPE else ():
            for part in found.fields(tensor) if tensor.number == _TYPE_TENSOR else ():
                if part.number == _ELEMENT:
                    dtype = _DTYPES.get(part.varint or 0, f"type {part.varint}")
                elif part.number == _SHAPE:
                    dims = [_dim(found, dim) for dim in found.fields(part) if dim.number == _DIM]
    return Port(name, dtype, tuple(dims))


def _dim(found: _Found, dim: Field) -> int | None:
    return next((one.varint for one in found.fields(dim) if one.number == _DIM_VALUE), None)


def _walk(found: _Found, kind: str, part: Field, depth: int) -> None:
    """Look at every node and tensor below a message."""
    if depth > _MOST_DEPTH:
        raise ValueError("its graphs are nested too deep")
    if kind == _TENSOR:
        _tensor(found, part)
        return
    if kind == _NODE:
        _node(found, part)
    inside = _PARTS[kind]
    for one in found.fields(part):
        if one.number in inside and one.varint is None:
            _walk(found, inside[one.number], one, depth + 1)


def _tensor(found: _Found, tensor: Field) -> None:
    name, dtype, dims = "", "", list[int]()
    for one in found.fields(tensor):
        if one.number == _TENSOR_NAME:
            name = found.text(one)
        elif one.number == _TENSOR_TYPE:
            dtype = _DTYPES.get(one.varint or 0, "")
        elif one.number == _TENSOR_DIMS:
            dims += _dims(found, one)
        elif one.number == _TENSOR_EXTERNAL:
            entry = {part.number: found.text(part) for part in found.fields(one)}
            if entry.get(_ENTRY_KEY) == "location":  # each of them, as the last one counts
                found.files.add(entry.get(_ENTRY_VALUE, ""))
    found.dtypes[name] = dtype
    found.elements[dtype] += math.prod(dims[:_MOST_DIMENSIONS])


def _dims(found: _Found, part: Field) -> list[int]:
    if part.varint is not None:
        return [part.varint]
    if part.stop - part.start > 10 * _MOST_DIMENSIONS:
        raise ValueError("it has a tensor of too many dimensions")
    return list(packed_of(found.data, part))


def _node(found: _Found, node: Field) -> None:
    op, inputs, bits = "", [], None
    for one in found.fields(node):
        if one.number == _NODE_OP:
            op = found.text(one)
        elif one.number == _NODE_INPUT:
            inputs.append(found.text(one))
        elif one.number == _NODE_ATTRIBUTE:
            parts = {part.number: part for part in found.fields(one)}
            name, value = parts.get(_ATTRIBUTE_NAME), parts.get(_ATTRIBUTE_INT)
            if name is not None and value is not None and found.text(name) == "bits":
                bits = value.varint
    found.ops.add(op)
    if op in _BLOCKWISE:
        found.bits.add(4 if bits is None else bits)  # what both operators have by default
    elif op in _SCALED:
        found.scaled.update(inputs)


def _weights(found: _Found) -> str:
    scaled = {_STORED_BITS.get(found.dtypes.get(name, ""), 0) for name in found.scaled} - {0}
    bits = found.bits | scaled
    if bits:
        return str(min(bits))
    return _DENSE[max(_DENSE, key=lambda dtype: found.elements[dtype])]
