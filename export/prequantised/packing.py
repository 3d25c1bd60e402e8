"""Small numbers out of the 32-bit words that quantisers pack them into.

A row of words is one stream of bits, the lowest first: number i has the bits from i * bits on, across words where bits
does not divide 32. GPTQ (also with 3 bits) and compressed-tensors pack so; AWQ's version gemm shuffles the eight
numbers of a word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...optimize.tensors import UInt8

UNIT = 32
"""Numbers that always begin at the start of a word; they fill `bits` words."""

_NIBBLES = np.uint16(0x0F0F)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbours is in a word: AutoAWQ puts 0, 2, 4, 6, 1, 3, 5, 7 into it, from the lowest bits on."""


def packed_words(count: int, bits: int) -> int:
    """32-bit words that `count` numbers take."""
    return -(-count * bits // 32)


def unpack(words: npt.NDArray[Any], bits: int) -> UInt8:
    """Rows of words (int32 [rows, words]) as uint8 [rows, words * 32 // bits]."""
    rows = len(words)
    stored = np.ascontiguousarray(words).view("<u4")
    if bits == 8:
        return stored.view(np.uint8)
    if bits == 4:
        return _nibbles(stored)
    stream = np.unpackbits(stored.view(np.uint8), axis=1, bitorder="little")
    count = stream.shape[1] // bits
    numbers = stream[:, : count * bits].reshape(rows, count, bits)
    return np.packbits(numbers, axis=2, bitorder="little").reshape(rows, count)


def _nibbles(stored: npt.NDArray[Any]) -> UInt8:
    pairs = stored.view(np.uint8).astype("<u2")  # each byte becomes two: 0x00hl, 0x0hhl, 0x0h0l
    pairs |= pairs << 4
    pairs &= _NIBBLES
    return pairs.view(np.uint8)


def unpack_shuffled(words: npt.NDArray[Any]) -> UInt8:
    """Rows of AWQ's words (int32 [rows, words]) as uint8 [words * 8, rows]: transposed, since rows are short here."""
    columns = np.ascontiguousarray(words.T).view("<u4")
    codes = np.empty((len(columns), len(_AWQ_PLACES), columns.shape[1]), np.uint8)
    shifted = np.empty_like(columns)
    for index, place in enumerate(_AWQ_PLACES):
        np.right_shift(columns, np.uint32(4 * place), out=shifted)
        codes[:, index] = shifted.astype(np.uint8) & np.uint8(15)
    return codes.reshape(-1, columns.shape[1])
