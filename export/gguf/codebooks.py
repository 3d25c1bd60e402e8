"""ggml's types whose codes name a value of a table or one of three: IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0.

Layouts: `block_iq4_nl` and so on, tables: `kvalues_iq4nl`, `kvalues_mxfp4`, in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. The values are whole numbers, so they are codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...optimize.formats import INT8, int_format
from ...optimize.tensors import Float32, UInt8
from .encoding import Encoding, NotFiniteError, Parts, Records, bytes_of, finite, layout, planes


def _table(*values: int) -> bytes:
    """What a byte holding a code of 4 bits is translated to: the value's code among 8 bits."""
    return bytes(value + 128 for value in values).ljust(256, b"\0")


_IQ4 = _table(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = _table(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_LARGEST_FP4 = 12


def _looked_up(blocks: Records, table: bytes, group: int = 16) -> UInt8:
    indices = planes(blocks["indices"], group, 4)
    return np.frombuffer(bytearray(indices).translate(table), np.uint8).reshape(indices.shape)


def _iq4_nl(blocks: Records) -> Parts:
    return Parts(_looked_up(blocks, _IQ4), finite(blocks["d"]))


def _iq4_xs(blocks: Records) -> Parts:
    """The scales have 6 bits: halves of bytes, and two bits of 16."""
    packed = bytes_of(blocks["low_scales"])
    low = np.stack((packed & 0x0F, packed >> 4), axis=-1).reshape(len(blocks), -1)
    high = blocks["high_scales"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (low | high << 4).astype(np.float32) - 32
    return Parts(_looked_up(blocks, _IQ4), finite(blocks["d"]) * scales)


def _mxfp4(blocks: Records) -> Parts:
    """The scale is a power of two, halved as the table's values are doubled; 0 and 1 stand for subnormal numbers."""
    exponents = blocks["exponent"].astype(np.int32)[:, None]
    with np.errstate(over="ignore"):
        scales = np.ldexp(np.float32(1), exponents - 128)
        if not np.isfinite(scales * _LARGEST_FP4).all():
            raise NotFiniteError
    return Parts(_looked_up(blocks, _FP4), scales)


def _e4m3() -> Float32:
    """The numbers that the 256 bytes of an unsigned E4M3 stand for, halved; the sign is ignored, and NaN is 0."""
    exponent, fraction = np.divmod(np.arange(256) & 0x7F, 8)
    numbers = np.where(exponent == 0, fraction / 512, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    numbers[0x7F] = 0
    return (numbers / 2).astype(np.float32)


_E4M3 = _e4m3()


def _nvfp4(blocks: Records) -> Parts:
    return Parts(_looked_up(blocks, _FP4, group=8), _E4M3[bytes_of(blocks["scales"])])


def _tq1(blocks: Records) -> Parts:
    """Five numbers of three values in a byte: its value, over 256, is 0.abcde in base 3. The last four bytes have four
    each.
    """
    packed = bytes_of(blocks["codes"])
    parts = ((packed[:, :32], 5), (packed[:, 32:48], 5), (packed[:, 48:], 4))
    digits = np.hstack([part * np.uint8(3**power) for part, count in parts for power in range(count)])
    codes = (digits.astype(np.uint16) * 3 >> 8).astype(np.uint8)
    codes += np.uint8(8 - 1)
    return Parts(codes, finite(blocks["d"]))


def _tq2(blocks: Records) -> Parts:
    codes = planes(blocks["codes"], 32, 2)
    codes += np.uint8(8 - 1)
    return Parts(codes, finite(blocks["d"]))


_TERNARY = int_format(4, 256)

CODEBOOKS: Mapping[str, Encoding] = {
    "IQ4_NL": Encoding(layout(("d", "<f2"), ("indices", "V16")), INT8, 128, _iq4_nl),
    "IQ4_XS": Encoding(
        layout(("d", "<f2"), ("high_scales", "<u2"), ("low_scales", "V4"), ("indices", "V128")), INT8, 128, _iq4_xs
    ),
    "MXFP4": Encoding(layout(("exponent", "u1"), ("indices", "V16")), INT8, 128, _mxfp4),
    "NVFP4": Encoding(layout(("scales", "V4"), ("indices", "V32")), int_format(8, 16), 128, _nvfp4),
    "TQ1_0": Encoding(layout(("codes", "V52"), ("d", "<f2")), _TERNARY, 8, _tq1),
    "TQ2_0": Encoding(layout(("codes", "V64"), ("d", "<f2")), _TERNARY, 8, _tq2),
}
"""Type -> how it is stored."""
