"""The wire format of protobuf, as far as model.onnx needs it (protobuf.dev/programming-guides/encoding)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from ..errors import LlamaExportError
from .bundle import GRAPH_FILE

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Buffer = bytes | mmap
"""What is read: a file's bytes, or a large file where it lies."""


@dataclass(frozen=True)
class Field:
    """One field of a message: its number, and either a varint at [start, stop) or bytes there. key: where the field
    itself starts.
    """

    number: int
    varint: int | None
    key: int
    start: int
    stop: int


def fields_of(data: Buffer, start: int, stop: int) -> Iterator[Field]:
    """The fields of the message at [start, stop); LlamaExportError when the bytes are none."""
    while start < stop:
        at = start
        key, start = _varint(data, start, stop)
        number, wire = key >> 3, key & 7
        value = None
        if wire == _VARINT:
            value, end = _varint(data, start, stop)
        elif wire == _BYTES:
            length, start = _varint(data, start, stop)
            end = start + length
        elif wire in (_FIXED32, _FIXED64):
            end = start + (8 if wire == _FIXED64 else 4)
        else:
            end = stop + 1
        if end > stop:
            raise LlamaExportError(f"{GRAPH_FILE} is damaged (not a valid protobuf); copy or build the bundle again.")
        yield Field(number, value, at, start, end)
        start = end


def messages_of(data: Buffer, start: int, stop: int, number: int) -> Iterator[Field]:
    """The fields with this number that hold bytes: messages, texts or packed numbers."""
    return (field for field in fields_of(data, start, stop) if field.number == number and field.varint is None)


def packed_of(data: Buffer, field: Field) -> Iterator[int]:
    """The varints that a field of bytes holds."""
    at = field.start
    while at < field.stop:
        value, at = _varint(data, at, field.stop)
        yield value


def text_of(data: Buffer, field: Field) -> str:
    """A field of bytes as text; what is not UTF-8 becomes the replacement character."""
    return data[field.start : field.stop].decode(errors="replace")


def number_field(number: int, value: int) -> bytes:
    """A field that holds an integer, from 0 or as 64 bits in two's complement."""
    return _encoded(number << 3 | _VARINT) + _encoded(value % (1 << 64))


def block_field(number: int, content: bytes) -> bytes:
    """A field that holds bytes."""
    return _encoded(number << 3 | _BYTES) + _encoded(len(content)) + content


def _varint(data: Buffer, start: int, stop: int) -> tuple[int, int]:
    value, shift = 0, 0
    for index in range(start, min(stop, start + 10)):
        value |= (data[index] & 0x7F) << shift
        if data[index] < 0x80:
            return value, index + 1
        shift += 7
    raise LlamaExportError(f"{GRAPH_FILE} is damaged (a number has no end); copy or build the bundle again.")


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
