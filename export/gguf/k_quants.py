"""ggml's K-quants: 256 weights under one scale, with small integer scales for each 16 or 32 of them.

Layouts: `block_q2_K` and so on in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. A scale of half
precision times an integer of at most 8 bits has 19 bits at most, so float32 holds each block's own scale exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...optimize.formats import int_format
from ...optimize.tensors import UInt8
from .encoding import Encoding, Parts, Records, bytes_of, finite, layout, planes

_HALF = ("d", "<f2")


def _q2(blocks: Records) -> Parts:
    both = bytes_of(blocks["scales"])  # a scale in the low and a minimum in the high half of each
    codes = planes(blocks["codes"], 32, 2)
    codes += np.uint8(8)
    return Parts(codes, finite(blocks["d"]) * (both & 0x0F), -(finite(blocks["dmin"]) * (both >> 4)))


def _q3(blocks: Records) -> Parts:
    codes = planes(blocks["high"], 32, 1)  # the bit is set where nothing is subtracted
    codes <<= np.uint8(2)
    codes += planes(blocks["low"], 32, 2)
    codes += np.uint8(8 - 4)
    return Parts(codes, finite(blocks["d"]) * (_six_bits(blocks).astype(np.float32) - 32))


def _six_bits(blocks: Records) -> UInt8:
    """The scales of Q3_K, uint8 [n, 16]: low halves in 8 bytes, the two high bits in 4."""
    packed = bytes_of(blocks["scales"])
    low, high = packed[:, :8], packed[:, 8:]
    scales: UInt8 = np.hstack((low & 0x0F, low >> 4))
    scales |= np.hstack([(high >> shift & 3) << 4 for shift in (0, 2, 4, 6)])
    return scales


def _q4(blocks: Records) -> Parts:
    return _with_minima(blocks, planes(blocks["low"], 32, 4))


def _q5(blocks: Records) -> Parts:
    codes = planes(blocks["high"], 32, 1)
    codes <<= np.uint8(4)
    codes |= planes(blocks["low"], 32, 4)
    codes += np.uint8(128)
    return _with_minima(blocks, codes)


def _with_minima(blocks: Records, codes: UInt8) -> Parts:
    """Q4_K and Q5_K: scales and minima of 6 bits, those of the first four blocks in the low bits of 4 bytes each; the
    others' low halves share the last 4 bytes, their high bits are above those of the first four.
    """
    packed = bytes_of(blocks["scales"])
    first, second, halves = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.hstack((first & 0x3F, halves & 0x0F | (first >> 6) << 4))
    minima = np.hstack((second & 0x3F, halves >> 4 | (second >> 6) << 4))
    return Parts(codes, finite(blocks["d"]) * scales, -(finite(blocks["dmin"]) * minima))


def _q6(blocks: Records) -> Parts:
    codes = planes(blocks["high"], 32, 2)
    codes <<= np.uint8(4)
    codes |= planes(blocks["low"], 64, 4)
    codes += np.uint8(128 - 32)
    return Parts(codes, finite(blocks["d"]) * bytes_of(blocks["scales"]).view(np.int8))


K_QUANTS: Mapping[str, Encoding] = {
    "Q2_K": Encoding(
        layout(("scales", "V16"), ("codes", "V64"), _HALF, ("dmin", "<f2")), int_format(4, 16, offsets=True), 8, _q2
    ),
    "Q3_K": Encoding(layout(("high", "V32"), ("low", "V64"), ("scales", "V12"), _HALF), int_format(4, 16), 8, _q3),
    "Q4_K": Encoding(
        layout(_HALF, ("dmin", "<f2"), ("scales", "V12"), ("low", "V128")), int_format(4, offsets=True), 0, _q4
    ),
    "Q5_K": Encoding(
        layout(_HALF, ("dmin", "<f2"), ("scales", "V12"), ("high", "V32"), ("low", "V128")),
        int_format(8, offsets=True),
        128,
        _q5,
    ),
    "Q6_K": Encoding(layout(("low", "V128"), ("high", "V64"), ("scales", "V16"), _HALF), int_format(8, 16), 128, _q6),
}
"""Type -> how it is stored."""
