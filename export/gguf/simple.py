"""ggml's types with one scale for 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Layouts: `block_q4_0` and so on in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...optimize.formats import INT4, INT8, int_format
from ...optimize.tensors import Float32, UInt8
from .encoding import Encoding, Parts, Records, bytes_of, finite, layout, planes


def _scales(blocks: Records) -> tuple[Float32, Float32 | None]:
    assert blocks.dtype.names is not None
    return finite(blocks["d"]), finite(blocks["m"]) if "m" in blocks.dtype.names else None


def _nibbles(blocks: Records) -> Parts:
    return Parts(planes(blocks["low"], 16, 4), *_scales(blocks))


def _fives(blocks: Records, zero: int) -> Parts:
    """Four low bits and one high bit; `zero` is added."""
    codes = _high_bits(blocks)
    codes <<= np.uint8(4)
    codes |= planes(blocks["low"], 16, 4)
    codes += np.uint8(zero)
    return Parts(codes, *_scales(blocks))


def _high_bits(blocks: Records) -> UInt8:
    """Bit j of a block's `high` is of its weight j."""
    bits: UInt8 = np.unpackbits(bytes_of(blocks["high"]), axis=1, bitorder="little")
    return bits


def _bytes(blocks: Records) -> Parts:
    codes = bytes_of(blocks["codes"])
    codes ^= np.uint8(0x80)  # int8 + 128, in two's complement
    return Parts(codes, *_scales(blocks))


SIMPLE: Mapping[str, Encoding] = {
    "Q4_0": Encoding(layout(("d", "<f2"), ("low", "V16")), INT4, 8, _nibbles),
    "Q4_1": Encoding(layout(("d", "<f2"), ("m", "<f2"), ("low", "V16")), int_format(4, offsets=True), 0, _nibbles),
    "Q5_0": Encoding(
        layout(("d", "<f2"), ("high", "V4"), ("low", "V16")), INT8, 128, lambda blocks: _fives(blocks, 128 - 16)
    ),
    "Q5_1": Encoding(
        layout(("d", "<f2"), ("m", "<f2"), ("high", "V4"), ("low", "V16")),
        int_format(8, offsets=True),
        128,
        lambda blocks: _fives(blocks, 128),
    ),
    "Q8_0": Encoding(layout(("d", "<f2"), ("codes", "V32")), INT8, 128, _bytes),
}
"""Type -> how it is stored."""
