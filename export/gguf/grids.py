"""ggml's types whose codes name a point of a grid: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

Layouts: `block_iq2_xxs` and so on in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Every coordinate
is a whole number (in IQ1, of eighths), so int8 holds it. The grids and signs are the gguf package's: it dequantises the
blocks with 1 for their scale of half precision, and their own small scales, which are never 0, are divided out. All of
this is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from ...optimize.formats import INT8, Format, int_format
from ...optimize.tensors import Float32
from .encoding import Encoding, Parts, Records, bytes_of, finite, layout

Small = Callable[[Records], npt.NDArray[np.generic]]
"""The small scales of blocks, whole numbers s that stand for 2 s + 1: [n, scales of a block]."""

_WIDE = int_format(8, 16)
_HALF = ("d", "<f2")
_ONE = (0, 0, 0xC000, 0x3000)
"""The four digits of the half 1.0, each on top of the 16 bits where IQ1_M has it."""


def _encoding(name: str, stored: np.dtype[np.void], format: Format, unit: float, small: Small) -> Encoding:
    """unit: what a small scale of 1 is worth for a coordinate of 1."""
    kind = GGMLQuantizationType[name]

    def parts(blocks: Records) -> Parts:
        scales = (2 * small(blocks) + 1).astype(np.float32) * np.float32(unit)
        d, of_one = _taken_out(blocks)
        values = dequantize(of_one.view(np.uint8).reshape(1, -1), kind).reshape(*scales.shape, -1)
        codes = values / scales[..., None]
        codes += np.float32(128)
        return Parts(codes.astype(np.uint8).reshape(len(blocks), -1), d * scales)

    return Encoding(stored, format, 128, parts)


def _taken_out(blocks: Records) -> tuple[Float32, Records]:
    """The scale of half precision, float32 [n, 1], and the blocks with 1 in its place."""
    of_one = blocks.copy()
    if "d" in (blocks.dtype.names or ()):
        of_one["d"] = 1
        return finite(blocks["d"]), of_one
    words = blocks["scales"]  # IQ1_M: a digit of four bits on top of each
    digits = words >> 12
    halves = digits[:, 0] | digits[:, 1] << 4 | digits[:, 2] << 8 | digits[:, 3] << 12
    of_one["scales"] = np.bitwise_or(words & 0x0FFF, np.array(_ONE, np.uint16))
    return finite(halves.view(np.float16)), of_one


def _nibbles(blocks: Records) -> npt.NDArray[np.generic]:
    packed = bytes_of(blocks["scales"])
    return np.stack((packed & 0x0F, packed >> 4), axis=-1).reshape(len(packed), -1)


def _threes(blocks: Records) -> npt.NDArray[np.generic]:
    """Four numbers of three bits in the low twelve bits of each word."""
    numbers = blocks["scales"][..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    return numbers.reshape(len(blocks), -1)


def _high(blocks: Records) -> npt.NDArray[np.generic]:
    return blocks["high"] >> 12 & 7


def _above_signs(blocks: Records) -> npt.NDArray[np.generic]:
    return blocks["signs"] >> 28


def _above_every_second(blocks: Records) -> npt.NDArray[np.generic]:
    return blocks["codes"][:, 1::2] >> 28


_LAYOUTS = {
    "IQ1_S": layout(_HALF, ("codes", "V32"), ("high", "<u2", 8)),
    "IQ1_M": layout(("codes", "V32"), ("high", "V16"), ("scales", "<u2", 4)),
    "IQ2_XXS": layout(_HALF, ("codes", "<u4", 16)),
    "IQ2_XS": layout(_HALF, ("codes", "V64"), ("scales", "V8")),
    "IQ2_S": layout(_HALF, ("codes", "V64"), ("high", "V8"), ("scales", "V8")),
    "IQ3_XXS": layout(_HALF, ("codes", "V64"), ("signs", "<u4", 8)),
    "IQ3_S": layout(_HALF, ("codes", "V64"), ("high", "V8"), ("signs", "V32"), ("scales", "V4")),
}

GRIDS: Mapping[str, Encoding] = {
    name: _encoding(name, _LAYOUTS[name], format, unit, small)
    for name, format, unit, small in (
        ("IQ1_S", INT8, 1 / 8, _high),
        ("IQ1_M", _WIDE, 1 / 8, _threes),
        ("IQ2_XXS", INT8, 1 / 8, _above_every_second),
        ("IQ2_XS", _WIDE, 1 / 8, _nibbles),
        ("IQ2_S", _WIDE, 1 / 8, _nibbles),
        ("IQ3_XXS", INT8, 1 / 4, _above_signs),
        ("IQ3_S", INT8, 1, _nibbles),
    )
}
"""Type -> how it is stored."""
