"""Write small ONNX models without the onnx package: runtime tests also run where only ONNX Runtime is installed.

Each function returns a serialised message; field numbers are those of onnx.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

ELEMENT_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "int4": 22,
    "float4e2m1": 23,
}

Attribute = int | float | str | Sequence[int]


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def block(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def blocks(field: int, values: Iterable[bytes | str]) -> bytes:
    return b"".join(block(field, value) for value in values)


def attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, int):
        body = number(3, value) + number(20, 2)
    elif isinstance(value, float):
        body = varint(21) + struct.pack("<f", value) + number(20, 1)
    elif isinstance(value, str):
        body = block(4, value) + number(20, 3)
    else:
        body = b"".join(number(8, item) for item in value) + number(20, 7)
    return block(1, name) + body


def node(
    op: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    domain: str = "",
    attributes: Mapping[str, Attribute] | None = None,
) -> bytes:
    attrs = (attribute(name, value) for name, value in (attributes or {}).items())
    return (
        blocks(1, inputs)
        + blocks(2, outputs)
        + block(3, outputs[0])
        + block(4, op)
        + blocks(5, attrs)
        + block(7, domain)
    )


def tensor(
    name: str,
    array: np.ndarray[Any, Any],
    external: tuple[str, int] | None = None,
    *,
    packed: Sequence[int] = (),
    kind: str = "int4",
) -> bytes:
    """external: file name and offset of the bytes, which then are not part of the message. packed: the shape of the
    4-bit numbers of this kind whose bytes `array` holds.
    """
    dtype = kind if packed else array.dtype.name
    head = b"".join(number(1, dim) for dim in packed or array.shape) + number(2, ELEMENT_TYPES[dtype]) + block(8, name)
    if external is None:
        return head + block(9, array.tobytes())
    entries = {"location": external[0], "offset": str(external[1]), "length": str(array.nbytes)}
    return head + blocks(13, (block(1, key) + block(2, value) for key, value in entries.items())) + number(14, 1)


def value_info(name: str, dtype: str, dims: Sequence[int | str]) -> bytes:
    shape = blocks(1, (number(1, dim) if isinstance(dim, int) else block(2, dim) for dim in dims))
    return block(1, name) + block(2, block(1, number(1, ELEMENT_TYPES[dtype]) + block(2, shape)))


def model(
    nodes: Iterable[bytes],
    initializers: Iterable[bytes],
    inputs: Iterable[bytes],
    outputs: Iterable[bytes],
    opset: int = 21,
) -> bytes:
    graph = blocks(1, nodes) + block(2, "tiny") + blocks(5, initializers) + blocks(11, inputs) + blocks(12, outputs)
    opsets = blocks(
        8, (block(1, domain) + number(2, version) for domain, version in (("", opset), ("com.microsoft", 1)))
    )
    return number(1, 11 if opset > 23 else 10) + block(7, graph) + opsets
