"""Decoding the rows of GGUF tensors, as values and as stored codes and scales.

The values equal ggml's own (`dequantize_row_*` in https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c) and
those of `gguf.quants.dequantize`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...optimize.formats import FLOATS, Format
from ...optimize.tensors import Blocks, Float32, UInt8
from .codebooks import CODEBOOKS
from .encoding import Encoding, Parts
from .grids import GRIDS
from .k_quants import K_QUANTS
from .simple import SIMPLE

ENCODINGS: Mapping[str, Encoding] = {**SIMPLE, **K_QUANTS, **CODEBOOKS, **GRIDS}
"""The block types, all that the gguf package can dequantise."""

FORMATS: Mapping[str, Format] = {**FLOATS, **{name: encoding.format for name, encoding in ENCODINGS.items()}}
"""Tensor type -> the format that keeps its values."""


def decode_values(type_name: str, rows: UInt8) -> Float32:
    """Return stored rows (uint8 [rows, row bytes]) of `type_name` as float32 [rows, columns].

    Raises NotFiniteError for a block type with numbers that are not finite.
    """
    if type_name in ENCODINGS:
        return _values(ENCODINGS[type_name], rows)
    if type_name == "F32":
        return rows.view("<f4").astype(np.float32, copy=False)
    if type_name == "F16":
        return rows.view("<f2").astype(np.float32)
    words = rows.view("<u2").astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


def decode_blocks(type_name: str, rows: UInt8) -> Blocks:
    """Return stored rows (uint8 [rows, row bytes]) of a type of ENCODINGS as codes, scales and offsets.

    w = scale * (code - base) + minimum is kept as scale * (code - zero) + offset, so the offset is the minimum where
    base is the format's zero point, else minimum + (zero - base) * scale, which float32 nearly always holds; where it
    does not, `rounded` counts the block, and a weight may be off by a unit in the last place of itself or the offset,
    whichever is larger. Raises NotFiniteError.
    """
    encoding, n = ENCODINGS[type_name], len(rows)
    parts = _parts(encoding, rows)
    codes, scales = parts.codes.reshape(n, -1), parts.scales.reshape(n, -1)
    if parts.minima is None:
        return Blocks(encoding.format, codes, scales)
    minima, shift = parts.minima.reshape(n, -1), 2 ** (encoding.format.bits - 1) - encoding.base
    if not shift:
        return Blocks(encoding.format, codes, scales, None, minima)
    exact = minima + shift * scales.astype(np.float64)
    offsets = exact.astype(np.float32)
    return Blocks(encoding.format, codes, scales, None, offsets, int(np.count_nonzero(offsets != exact)))


def _parts(encoding: Encoding, rows: UInt8) -> Parts:
    return encoding.parts(rows.reshape(-1).view(encoding.layout))


def _values(encoding: Encoding, rows: UInt8) -> Float32:
    parts = _parts(encoding, rows)
    values = parts.codes.reshape(*parts.scales.shape, -1).astype(np.float32)
    values -= np.float32(encoding.base)
    values *= parts.scales[..., None]
    if parts.minima is not None:
        values += parts.minima[..., None]
    return values.reshape(len(rows), -1)
