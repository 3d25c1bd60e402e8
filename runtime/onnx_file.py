"""The little of model.onnx that a device needs to know, read from its protobuf bytes without the onnx package.

Field numbers: onnx.proto of ONNX 1.16 and later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import LlamaExportError
from .bundle import DATA_FILE, GRAPH_FILE
from .protobuf import Field, fields_of, messages_of, packed_of, text_of

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    10: "float16",
    16: "bfloat16",
    17: "float8e4m3fn",
    21: "uint4",
    22: "int4",
    23: "float4e2m1",
}
"""TensorProto.DataType -> name."""
BITS = {
    **{"float32": 32, "int32": 32, "int64": 64, "float16": 16, "bfloat16": 16, "uint8": 8, "int8": 8},
    **{"float8e4m3fn": 8, "uint4": 4, "int4": 4, "float4e2m1": 4},
}
"""Of one number, by that name."""

_DIGITS = re.compile(r"[0-9]{1,18}")
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Initializer:
    """A tensor whose bytes lie in the data file: `size` bytes from `offset` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def external_initializers(model: bytes, data_size: int) -> dict[str, Initializer]:
    """The initializers of a serialized ModelProto that lie in model.onnx.data, which has `data_size` bytes.

    Raises LlamaExportError when one lies in any other file, outside of the data file, or has another size than its
    shape says, and when any other tensor (of a constant, an inner graph, a function) lies outside of the model.
    """
    found = {}
    for field in _initializers(model):
        initializer = _initializer(model, field, data_size)
        if initializer is not None:
            found[initializer.name] = initializer
    if model.count(b"location") != len(found):  # the key that every tensor in a file has, wherever it is nested
        raise LlamaExportError(
            f"{GRAPH_FILE} keeps tensors in files that are no initializers of its graph; build the bundle again."
        )
    return found


def inline_scalars(model: bytes) -> dict[str, tuple[str, bytes]]:
    """The single numbers (initializers of no dimensions) that a serialized ModelProto holds itself, by name: dtype and
    bytes, lowest first. Left out is what is not there exactly once and in one encoding, which readers could take
    differently. Raises LlamaExportError when `model` is no protobuf message.
    """
    found: dict[str, tuple[str, bytes]] = {}
    met: set[str] = set()
    for tensor in _initializers(model):
        fields = list(fields_of(model, tensor.start, tensor.stop))
        parts = {field.number: field for field in fields}
        name = text_of(model, parts[_TENSOR_NAME]) if _TENSOR_NAME in parts else ""
        if name in met:
            found.pop(name, None)
        elif len(fields) == len(parts) and parts.keys() == {_TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW}:
            dtype, raw = DTYPES.get(parts[_TENSOR_TYPE].varint or 0), parts[_TENSOR_RAW]
            if dtype is not None and raw.varint is None and (raw.stop - raw.start) * 8 == BITS[dtype]:
                found[name] = dtype, model[raw.start : raw.stop]
        met.add(name)
    return found


def with_accuracy_level(model: bytes, level: int) -> bytes:
    """The same graph with `accuracy_level` of every MatMulNBits set: 0 computes in the inputs' own precision."""
    changed = bytearray(model)
    for graph in messages_of(model, 0, len(model), _MODEL_GRAPH):
        for node in messages_of(model, graph.start, graph.stop, _GRAPH_NODE):
            for attribute in messages_of(model, node.start, node.stop, _NODE_ATTRIBUTE):
                fields = {field.number: field for field in fields_of(model, attribute.start, attribute.stop)}
                name, number = fields.get(_ATTRIBUTE_NAME), fields.get(_ATTRIBUTE_INT)
                if name is None or number is None or model[name.start : name.stop] != b"accuracy_level":
                    continue
                if number.stop - number.start != 1 or not 0 <= level < 0x80:
                    raise LlamaExportError(f"{GRAPH_FILE} has an accuracy_level out of range; build the bundle again.")
                changed[number.start] = level
    return bytes(changed)


def _initializers(model: bytes) -> Iterator[Field]:
    for graph in messages_of(model, 0, len(model), _MODEL_GRAPH):
        yield from messages_of(model, graph.start, graph.stop, _GRAPH_INITIALIZER)


def _initializer(model: bytes, tensor: Field, data_size: int) -> Initializer | None:
    name, type_number, dims, external, outside = "", 0, [], {}, False
    for field in fields_of(model, tensor.start, tensor.stop):
        if field.number == _TENSOR_NAME:
            name = text_of(model, field)
        elif field.number == _TENSOR_TYPE:
            type_number = field.varint or 0
        elif field.number == _TENSOR_DIMS:
            dims += [field.varint] if field.varint is not None else list(packed_of(model, field))
        elif field.number == _TENSOR_LOCATION:
            outside = field.varint == 1
        elif field.number == _TENSOR_EXTERNAL:
            entry = {part.number: text_of(model, part) for part in fields_of(model, field.start, field.stop)}
            external[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
    if not outside and not external:
        return None
    dtype, location = DTYPES.get(type_number), external.get("location")
    if location != DATA_FILE or dtype is None:
        raise LlamaExportError(
            f"{GRAPH_FILE} keeps {name!r} in {location!r} as type {type_number}, but a bundle keeps its weights in "
            f"{DATA_FILE}; build the bundle again."
        )
    texts = [external.get(key, "0") for key in ("offset", "length")]
    offset, size = (int(text) if _DIGITS.fullmatch(text) else -1 for text in texts)
    fits = len(dims) <= _MOST_DIMENSIONS and size == -(-math.prod(dims) * BITS[dtype] // 8)
    if not fits or offset < 0 or offset + size > data_size:
        raise LlamaExportError(
            f"{GRAPH_FILE} places {name!r} at {texts[1][:20]} bytes from {texts[0][:20]} on, which does not fit its "
            f"shape {dims[:_MOST_DIMENSIONS]} or the {data_size} bytes of {DATA_FILE}; copy or build the bundle again."
        )
    return Initializer(name, dtype, tuple(dims), offset, size)
