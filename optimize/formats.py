"""The formats in which a weight can be stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UsageError, did_you_mean

BLOCK = 32
"""Columns that share one scale where nothing else is said: the block of this project's own quantisation and of GGUF's
Q4_0, Q4_1 and Q8_0.
"""

BLOCKS = (16, 32, 64, 128, 256)
"""The blocks that MatMulNBits has kernels for."""


@dataclass(frozen=True)
class Format:
    """How the values of one weight are stored.

    bits: of one value. block: consecutive columns that share a scale, 0 for plain floating point.
    zeros: whether each block has an integer zero point of its own; without, it is 2**(bits - 1).
    offsets: whether each block has a number added to its values (GGUF's Q4_1), see `tensors.Blocks`.
    """

    name: str
    bits: int
    block: int = 0
    zeros: bool = False
    offsets: bool = False

    @property
    def quantised(self) -> bool:
        return self.block > 0

    def blocks(self, columns: int) -> int:
        """Blocks of a row; the last one is padded."""
        return -(-columns // self.block)

    def zero_bytes(self, columns: int) -> int:
        """Bytes of a row's packed zero points."""
        return -(-self.blocks(columns) * self.bits // 8)


def int_format(bits: int, block: int = BLOCK, *, zeros: bool = False, offsets: bool = False) -> Format:
    """The block format of these properties: `int4`, `int8-b16`, `int4-b128-zeros`, `int4-offset`."""
    parts = (f"int{bits}", f"b{block}" * (block != BLOCK), "zeros" * zeros, "offset" * offsets)
    return Format("-".join(filter(None, parts)), bits, block, zeros, offsets)


def format_named(name: str) -> Format | None:
    """The format of this name, None when there is none."""
    dense = {format.name: format for format in (FP32, FP16, BF16)}
    if name in dense:
        return dense[name]
    match = _INTEGERS.fullmatch(name)
    if match is None or int(match["block"] or BLOCK) not in BLOCKS:
        return None
    found = int_format(
        int(match["bits"]), int(match["block"] or BLOCK), zeros=bool(match["zeros"]), offsets=bool(match["offset"])
    )
    return found if found.name == name else None


_INTEGERS = re.compile(r"int(?P<bits>[48])(-b(?P<block>\d{1,3}))?(?P<zeros>-zeros)?(?P<offset>-offset)?")

FP32 = Format("fp32", 32)
FP16 = Format("fp16", 16)
BF16 = Format("bf16", 16)
INT8 = int_format(8)
INT4 = int_format(4)

FLOATS: Mapping[str, Format] = {"F32": FP32, "F16": FP16, "BF16": BF16}
"""A checkpoint tensor's floating-point dtype -> the format that keeps it as it is."""

PRECISIONS: Mapping[str, Format] = {format.name: format for format in (FP32, FP16, INT8, INT4)}
"""What `--precision` takes, and the format that it gives to matrices."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def precision_format(precision: str) -> Format:
    """Return the matrix format of a `--precision`; UsageError names the known ones for any other word."""
    if precision not in PRECISIONS:
        raise UsageError(
            f"Unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}."
            + did_you_mean(precision, PRECISIONS)
        )
    return PRECISIONS[precision]


def stored_bytes(shape: tuple[int, ...], format: Format, scale_bytes: int = 4) -> int:
    """Bytes of a weight of `shape` (rows first) in `format`, scales and offsets of `scale_bytes` each included; blocks
    are padded at the row's end.
    """
    rows = shape[0]
    columns = shape[1] if len(shape) > 1 else 1
    if not format.quantised:
        return rows * columns * format.bits // 8
    block = format.block * format.bits // 8 + scale_bytes * (2 if format.offsets else 1)
    return rows * (format.blocks(columns) * block + (format.zero_bytes(columns) if format.zeros else 0))
