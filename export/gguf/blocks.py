"""Decoding the rows of GGUF tensors, as values and as stored codes and scales.

Block layouts: `block_q4_0`, `block_q4_1`, `block_q8_0` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; the values equal `gguf.quants.dequantize`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ...optimize.formats import BLOCK, FLOATS, INT4, INT8, Format, int_format
from ...optimize.tensors import Blocks, Float32, UInt8

_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_LAYOUTS = {
    "Q4_0": np.dtype([("d", "<f2"), ("codes", "V16")]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "V16")]),
    "Q8_0": np.dtype([("d", "<f2"), ("codes", "V32")]),
}
BLOCK_TYPES = frozenset(_LAYOUTS)

FORMATS: Mapping[str, Format] = {**FLOATS, "Q4_0": INT4, "Q4_1": int_format(4, offsets=True), "Q8_0": INT8}
"""Tensor type -> the format that keeps it as it is."""


class NotFiniteError(ValueError):
    """A block's scale or minimum is infinite or not a number."""


def decode_values(type_name: str, rows: UInt8) -> Float32:
    """Return stored rows (uint8 [rows, row bytes]) of `type_name` as float32 [rows, columns].

    Raises NotFiniteError for a block type with a scale that is not finite.
    """
    if type_name in BLOCK_TYPES:
        return _dequantise(type_name, rows)
    if type_name == "F32":
        return rows.view("<f4").astype(np.float32, copy=False)
    if type_name == "F16":
        return rows.view("<f2").astype(np.float32)
    words = rows.view("<u2").astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


def decode_blocks(type_name: str, rows: UInt8) -> Blocks:
    """Return stored rows (uint8 [rows, row bytes]) of a block type as codes, scales and offsets.

    Q4_0 and Q8_0: w = d * q with signed q, so codes = q + 2**(bits - 1), exactly. Q4_1: w = d * q + m with q from 0, so
    offsets = m + 8 * d, which float32 nearly always holds; where it does not, `rounded` counts the block, and a weight
    may be off by a unit in the last place of itself or the offset, whichever is larger. Raises NotFiniteError.
    """
    format, (stored, scales) = FORMATS[type_name], _stored(type_name, rows)
    if type_name == "Q8_0":
        codes = _byte_codes(stored)
        codes ^= np.uint8(0x80)  # int8 + 128, in two's complement
        return Blocks(format, codes.reshape(len(rows), -1), scales)
    codes = _nibble_codes(stored).reshape(len(rows), -1)
    if type_name == "Q4_0":
        return Blocks(format, codes, scales)
    exact = _minima(stored).reshape(scales.shape) + 8 * scales.astype(np.float64)
    offsets = exact.astype(np.float32)
    return Blocks(format, codes, scales, None, offsets, int(np.count_nonzero(offsets != exact)))


def _dequantise(type_name: str, rows: UInt8) -> Float32:
    stored, scales = _stored(type_name, rows)
    if type_name == "Q8_0":
        values = _byte_codes(stored).view(np.int8).astype(np.float32)
    else:
        values = _nibble_codes(stored).astype(np.float32)
        if type_name == "Q4_0":
            values -= np.float32(8)
    values *= scales.reshape(-1, 1)
    if type_name == "Q4_1":
        values += _minima(stored)[:, None]
    return values.reshape(len(rows), -1)


def _stored(type_name: str, rows: UInt8) -> tuple[npt.NDArray[np.void], Float32]:
    """Return the rows as one record a block, and the scales as float32 [rows, blocks of a row]."""
    stored = rows.reshape(-1).view(_LAYOUTS[type_name])
    scales = stored["d"].astype(np.float32).reshape(len(rows), -1)
    _check_finite(scales)
    return stored, scales


def _minima(stored: npt.NDArray[np.void]) -> Float32:
    minima: Float32 = stored["m"].astype(np.float32)
    _check_finite(minima)
    return minima


def _check_finite(numbers: Float32) -> None:
    if not np.isfinite(numbers).all():
        raise NotFiniteError


def _byte_codes(stored: npt.NDArray[np.void]) -> UInt8:
    """Return a copy of the 32 bytes of every block: uint8 [blocks, 32]."""
    return stored["codes"].copy().view(np.uint8).reshape(-1, BLOCK)


def _nibble_codes(stored: npt.NDArray[np.void]) -> UInt8:
    """Return uint8 [blocks, 32]: byte j of a block holds element j in its low and element j + 16 in its high half."""
    packed = stored["codes"].copy().view(np.uint64).reshape(-1, 2)
    codes = np.empty((len(packed), 4), np.uint64)
    np.bitwise_and(packed, _NIBBLES, out=codes[:, :2])
    packed >>= np.uint64(4)
    np.bitwise_and(packed, _NIBBLES, out=codes[:, 2:])
    return codes.view(np.uint8)
