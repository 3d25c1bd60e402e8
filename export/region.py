"""A place in the data file, and numbers as the bytes that lie there."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..optimize.formats import Format
from ..optimize.quantise import pack
from ..optimize.stored import Stored
from ..optimize.tensors import UInt8


@dataclass(frozen=True)
class Region:
    """Where the bytes of one description lie in the data file.

    row_bytes: of one row; all bytes where a matrix is transposed and this is a row of it. dtype: of the stored numbers;
    of codes, whatever they stand for, that of their bytes. signed: codes are in two's complement.
    """

    offset: int
    size: int
    row_bytes: int
    dtype: np.dtype[np.generic]
    signed: bool = False


def region_of(value: ir.Value, content: Stored | None, end: int) -> Region:
    """The place of an initializer, in a file that reaches to `end` so far."""
    assert value.shape is not None and value.dtype is not None
    shape = [int(size) for size in value.shape]  # type: ignore[arg-type]
    transposed = content is not None and content.transposed
    rows = 1 if not shape or (transposed and len(shape) == 1) else shape[0]
    size = int(np.prod(shape)) * value.dtype.bitwidth // 8
    alignment = 4096 if size >= 4096 else 64  # whole pages, so that ONNX Runtime can map them
    codes = content is not None and content.role == "codes"
    dtype = np.dtype(np.uint8) if codes else value.dtype.numpy()
    signed = content is not None and content.signed and content.format.coding == "int"
    return Region(-(-end // alignment) * alignment, size, size // rows, dtype, signed)


def pack_rows(codes: UInt8, bits: int) -> UInt8:
    """Codes of two rows in one byte where they have 4 bits, the first in the low half: [n / 2, columns]."""
    return codes if bits == 8 else np.bitwise_or(codes[0::2], np.left_shift(codes[1::2], np.uint8(4)))


def pack_columns(codes: UInt8, format: Format, region: Region) -> UInt8:
    """Codes or zero points of each row as they lie in the file."""
    return in_complement(pack(codes, format.bits), format, region)


def in_complement(packed: UInt8, format: Format, region: Region) -> UInt8:
    """Packed codes in two's complement where the region has them so: the top bit of each turns around."""
    return packed ^ np.uint8(0x80 if format.bits == 8 else 0x88) if region.signed else packed


def transposed(rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """The matrix with rows and columns exchanged, in one piece of memory.

    Bytes are moved eight at a time where they can be: one by one, rows that lie a power of two apart would put each
    other out of the processor's cache.
    """
    n, columns = rows.shape
    if rows.itemsize > 1 or columns % 8 or not rows.flags.c_contiguous:
        return np.ascontiguousarray(rows.T)
    eights = np.ascontiguousarray(rows.view(np.uint64).T).view(np.uint8).reshape(columns // 8, n, 8)
    return np.ascontiguousarray(eights.transpose(0, 2, 1)).reshape(columns, n).view(rows.dtype)


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset` of the open file, which one call may not write."""
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
