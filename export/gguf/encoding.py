"""What a GGUF block type is to the rest: the layout of a stored block, and how many of them become numbers.

Whatever the type, a weight is `scale * (code - base) + minimum`, in float32 as ggml computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...optimize.formats import Format
from ...optimize.tensors import Float32, UInt8

Records = npt.NDArray[np.void]


class NotFiniteError(ValueError):
    """A block's scale or minimum is infinite or not a number."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Decoded blocks, n of them.

    codes: uint8 [n, columns of a stored block]; scales: float32 [n, scales of a stored block]; minima: the same, or
    None for types without.
    """

    codes: UInt8
    scales: Float32
    minima: Float32 | None = None


@dataclass(frozen=True)
class Encoding:
    """A GGUF block type.

    layout: one stored block. format: the one that keeps its values, with as many columns to a scale. base: the code
    whose weight is the minimum, 0 without minima. parts: decodes stored blocks; raises NotFiniteError.
    """

    layout: np.dtype[np.void]
    format: Format
    base: int
    parts: Callable[[Records], Parts]


def layout(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[np.void]:
    """The packed record of these fields, each a name, a numpy type and how many of them where it is not one."""
    return np.dtype(list(fields))


def planes(packed: npt.NDArray[np.void], group: int, bits: int) -> UInt8:
    """Spread numbers of `bits` bits over bytes: uint8 [n, bytes * 8 / bits].

    Of every `group` bytes (a multiple of 8) the lowest bits of all come first, then the next bits of all, and so on,
    which is how ggml packs.
    """
    words = packed.copy().view(np.uint64)
    mask = np.uint64(0x0101010101010101 * (2**bits - 1))
    whole = np.dtype(f"V{group}")  # copied as one item
    spread = np.empty((words.nbytes // group, 8 // bits), whole)
    for index in range(8 // bits):
        spread[:, index] = (words & mask).view(whole)
        words >>= np.uint64(bits)
    return spread.view(np.uint8).reshape(len(packed), -1)


def bytes_of(packed: npt.NDArray[np.void]) -> UInt8:
    """The bytes of a field of each block: uint8 [n, size of the field]."""
    return packed.copy().view(np.uint8).reshape(len(packed), -1)


def finite(numbers: npt.NDArray[np.float16]) -> Float32:
    """A field of one half-precision number for each block as float32 [n, 1]; NotFiniteError when one is not finite."""
    widened: Float32 = numbers.astype(np.float32)[:, None]
    if not np.isfinite(widened).all():
        raise NotFiniteError
    return widened
