"""Numbers as they lie in model.onnx.data: by rows or transposed, down to 4 bits, read without the libraries that wrote
them.

E4M3 is float8e4m3fn of ONNX (arXiv:2209.05433: no infinity, NaN where all bits below the sign are set), E2M1 is
float4e2m1 (OCP Microscaling Formats 1.0). Two 4-bit numbers share a byte, the first in its low half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO

import numpy as np
import numpy.typing as npt

from ...errors import LlamaExportError
from ..arrays import Float32
from ..bundle import DATA_FILE
from ..onnx_file import BITS, Initializer

Numbers = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Place:
    """Where rows of checkpoint tensors lie. transposed: they are columns there."""

    initializer: Initializer
    transposed: bool

    @property
    def rows(self) -> int:
        """How many rows of the checkpoint it has room for; 0 where it has no such axis."""
        shape = self.initializer.shape
        return (shape[-1] if self.transposed else shape[0]) if shape else 0

    def read(self, start: int, stop: int, file: FileIO) -> Numbers:
        """Rows [start, stop) as [n, numbers in a row]: integers, or what they stand for as float32 or float16."""
        found = self.initializer
        if not self.transposed:
            row = found.size // found.shape[0]
            data = np.frombuffer(bytes_at(found.offset + start * row, (stop - start) * row, file), np.uint8)
            return _NUMBERS[found.dtype](data.reshape(stop - start, -1))
        bits, lines = BITS[found.dtype], math.prod(found.shape[:-1])
        first, last = start * bits // 8, -(-stop * bits // 8)
        panel = _columns(found, lines, first, last, file)
        turned = _turned(panel.reshape(lines, last - first, 1) if bits <= 8 else panel.reshape(lines, -1, bits // 8))
        if bits == 4:
            turned = np.stack((turned & 0x0F, turned >> 4), axis=1).reshape(-1, lines)[start % 2 :][: stop - start]
            return _FOUR_BITS[found.dtype](turned)
        return _NUMBERS[found.dtype](turned.reshape(stop - start, -1))


def bytes_at(offset: int, size: int, file: FileIO) -> bytearray:
    """The `size` bytes from `offset` on."""
    data = bytearray(size)
    _fill(memoryview(data), offset, file)
    return data


def _fill(view: memoryview, offset: int, file: FileIO) -> None:
    """Read what `view` has room for: one call may give less."""
    file.seek(offset)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise LlamaExportError(f"{DATA_FILE} became shorter while it was read; copy the bundle again.")
        view = view[count:]


def _columns(found: Initializer, lines: int, first: int, last: int, file: FileIO) -> npt.NDArray[np.uint8]:
    """Bytes [first, last) of each line of a transposed matrix: [lines, last - first]."""
    line, width = found.size // lines, last - first
    if width == line:
        return np.frombuffer(bytes_at(found.offset, found.size, file), np.uint8).reshape(lines, width)
    data = bytearray(lines * width)
    view = memoryview(data)
    for index in range(lines):
        _fill(view[index * width : (index + 1) * width], found.offset + index * line + first, file)
    return np.frombuffer(data, np.uint8).reshape(lines, width)


def _turned(panel: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[lines, n, bytes of a number] as [n, lines * bytes], single bytes eight at a time: one by one, lines that lie a
    power of two apart would put each other out of the processor's cache.
    """
    lines, n, width = panel.shape
    if width > 1 or n % 8:
        return np.ascontiguousarray(panel.transpose(1, 0, 2)).reshape(n, -1)
    eights = np.ascontiguousarray(panel.reshape(lines, n).view(np.uint64).T).view(np.uint8).reshape(n // 8, lines, 8)
    return np.ascontiguousarray(eights.transpose(0, 2, 1)).reshape(n, lines)


def _float8(code: int) -> float:
    """The number of an E4M3 code: exponent biased by 7, subnormal at 0."""
    sign, exponent, fraction = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10))


_E4M3 = np.array([_float8(code) for code in range(256)], np.float32)
_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
_E2M1 = np.array([sign * half / 2 for sign in (1.0, -1.0) for half in _HALVES], np.float32)


def _plain(dtype: str) -> Callable[[npt.NDArray[np.uint8]], Numbers]:
    return lambda data: data.view(dtype)


def _bfloat16(data: npt.NDArray[np.uint8]) -> Float32:
    widened: Float32 = (data.view("<u2").astype("<u4") << 16).view("<f4")
    return widened


def _int4(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Two's complement of 4 bits, given in the low half of each byte."""
    return (codes ^ np.uint8(8)).view(np.int8) - np.int8(8)


_FOUR_BITS: Mapping[str, Callable[[npt.NDArray[np.uint8]], Numbers]] = {
    "int4": _int4,
    "uint4": lambda codes: codes,
    "float4e2m1": lambda codes: _E2M1[codes],
}


def _halves(dtype: str) -> Callable[[npt.NDArray[np.uint8]], Numbers]:
    """Bytes of whole rows [n, bytes] as the numbers in their halves."""
    return lambda data: _FOUR_BITS[dtype](np.stack((data & 0x0F, data >> 4), axis=-1).reshape(len(data), -1))


_NUMBERS: Mapping[str, Callable[[npt.NDArray[np.uint8]], Numbers]] = {
    "float32": _plain("<f4"),
    "float16": _plain("<f2"),
    "int64": _plain("<i8"),
    "int32": _plain("<i4"),
    "uint8": _plain("u1"),
    "int8": _plain("i1"),
    "bfloat16": _bfloat16,
    "float8e4m3fn": lambda data: _E4M3[data],
    **{dtype: _halves(dtype) for dtype in _FOUR_BITS},
}
"""Bytes [n, bytes of a row] as numbers, by the dtype that onnx_file names."""
