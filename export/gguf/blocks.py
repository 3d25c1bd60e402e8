"""Decoding the rows of GGUF tensors, as values and as stored codes and scales.

Block layouts: `block_q4_0`, `block_q4_1`, `block_q8_0` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; the values equal `gguf.quants.dequantize`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...optimize.tensors import BLOCK, Blocks, Float32, SourceTensor, UInt8

_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_LAYOUTS = {
    "Q4_0": np.dtype([("d", "<f2"), ("codes", "V16")]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "V16")]),
    "Q8_0": np.dtype([("d", "<f2"), ("codes", "V32")]),
}
_EXACT_UP_TO = np.float32(1.0)
"""fp16 numbers are multiples of 2**-24, so m + 8 d is one too, and float32 holds all of those up to 2**24 * 2**-24."""

BLOCK_TYPES = frozenset(_LAYOUTS)


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
    offsets = m + 8 * d in float32; see `inexact_blocks` for when that rounds. Raises NotFiniteError.
    """
    stored, scales = _stored(type_name, rows)
    if type_name == "Q8_0":
        codes = _byte_codes(stored)
        codes ^= np.uint8(0x80)  # int8 + 128, in two's complement
        return Blocks(8, codes.reshape(len(rows), -1), scales)
    codes = _nibble_codes(stored).reshape(len(rows), -1)
    if type_name == "Q4_0":
        return Blocks(4, codes, scales)
    return Blocks(4, codes, scales, _minima(stored).reshape(scales.shape) + np.float32(8) * scales)


def inexact_blocks(tensor: SourceTensor, blocks: Blocks, start: int) -> int:
    """Count the blocks whose `scales * (codes - 2**(bits - 1)) + offsets` differs from the stored values.

    blocks: what `tensor.blocks(start, start + rows)` returned. It is 0 for Q4_0 and Q8_0, and for every Q4_1 block with
    |m + 8 d| <= 1, which is nearly every block of a trained model and costs one comparison a block. Beyond that the
    offset may be rounded, and a weight be off by a unit in the last place of itself or the offset, whichever is larger.
    """
    if blocks.offsets is None:
        return 0
    rows = np.flatnonzero((np.abs(blocks.offsets) > _EXACT_UP_TO).any(axis=1))
    return sum(_differing_blocks(tensor, blocks, start, int(row)) for row in rows)


def _differing_blocks(tensor: SourceTensor, blocks: Blocks, start: int, row: int) -> int:
    assert blocks.offsets is not None
    codes = blocks.codes[row].reshape(-1, BLOCK).astype(np.float32) - np.float32(2 ** (blocks.bits - 1))
    values = blocks.scales[row][:, None] * codes + blocks.offsets[row][:, None]
    stored = tensor.read(start + row, start + row + 1).reshape(-1, BLOCK)
    return int((values != stored).any(axis=1).sum())


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
