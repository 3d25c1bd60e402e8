"""The formats in which a weight can be stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

BLOCK = 32
"""Columns that share one scale where nothing else is said: the block of this project's own quantisation and of GGUF's
Q4_0, Q4_1 and Q8_0.
"""

BLOCKS = (16, 32, 64, 128, 256)
"""The blocks that MatMulNBits has kernels for, and TensorRT's parser takes."""

Coding = Literal["int", "fp8", "fp4"]
"""What a code stands for: an integer, an E4M3 (arXiv:2209.05433, FN) or an E2M1 (OCP MX 1.0) number."""


@dataclass(frozen=True)
class Format:
    """How the values of one weight are stored.

    bits: of one value. block: consecutive columns that share a scale; 0 for plain floating point, and where `whole`
    rows share one. zeros: whether each block has an integer zero point of its own; without, it is 2**(bits - 1).
    offsets: whether each block has a number added to its values (GGUF's Q4_1), see `tensors.Blocks`.
    coding: of the codes; scales of "fp4" are E4M3 numbers, times one float32 of the whole tensor.
    positive: whether scales must be above zero, as TensorRT's parser asks. Not a part of the name: it limits what is
    written and changes nothing of what it means.
    half: scales and offsets are float16 in the file even where the graph computes in float32.
    """

    name: str
    bits: int
    block: int = 0
    zeros: bool = False
    offsets: bool = False
    whole: bool = False
    coding: Coding = "int"
    positive: bool = False
    half: bool = False

    @property
    def quantised(self) -> bool:
        return self.block > 0 or self.whole

    @property
    def tensor_scale(self) -> bool:
        """Whether one number scales the whole tensor, so that it cannot be stacked with others."""
        return self.coding == "fp4"

    def blocks(self, columns: int) -> int:
        """Scales of a row; the last block is padded."""
        return 1 if self.whole else -(-columns // self.block)

    def padded(self, columns: int) -> int:
        """Columns of the stored codes."""
        return columns if self.whole else self.blocks(columns) * self.block

    def takes_codes_of(self, other: Format) -> bool:
        """Whether blocks of `other` can be stored in this format without being rounded anew: zero points may become
        offsets.
        """
        same = (self.bits, self.block, self.whole, self.coding) == (other.bits, other.block, other.whole, other.coding)
        zeros = self.zeros == other.zeros or (other.zeros and self.offsets)
        return self.quantised and same and zeros and (self.offsets or not other.offsets)

    def zero_bytes(self, columns: int) -> int:
        """Bytes of a row's packed zero points."""
        return -(-self.blocks(columns) * self.bits // 8)


def int_format(
    bits: int, block: int = BLOCK, *, zeros: bool = False, offsets: bool = False, half: bool = False
) -> Format:
    """The block format of these properties: `int4`, `int8-b16`, `int4-b128-zeros`, `int4-offset`, `int8-b64-f16`."""
    parts = (f"int{bits}", f"b{block}" * (block != BLOCK), "zeros" * zeros, "offset" * offsets, "f16" * half)
    return Format("-".join(filter(None, parts)), bits, block, zeros, offsets, half=half)


def with_half(format: Format, half: bool = True) -> Format:
    """The same with scales in float16, or without; formats other than blocks of integers have no choice."""
    if not format.block or format.coding != "int" or format.half == half:
        return format
    other = int_format(format.bits, format.block, zeros=format.zeros, offsets=format.offsets, half=half)
    return replace(other, positive=format.positive)


def format_named(name: str) -> Format | None:
    """The format of this name, None when there is none."""
    fixed = {format.name: format for format in (FP32, FP16, BF16, INT8_ROW, FP8, NVFP4)}
    if name in fixed:
        return fixed[name]
    match = _INTEGERS.fullmatch(name)
    if match is None or int(match["block"] or BLOCK) not in BLOCKS:
        return None
    found = int_format(
        int(match["bits"]),
        int(match["block"] or BLOCK),
        zeros=bool(match["zeros"]),
        offsets=bool(match["offset"]),
        half=bool(match["half"]),
    )
    return found if found.name == name else None


_INTEGERS = re.compile(r"int(?P<bits>[48])(-b(?P<block>\d{1,3}))?(?P<zeros>-zeros)?(?P<offset>-offset)?(?P<half>-f16)?")

FP32 = Format("fp32", 32)
FP16 = Format("fp16", 16)
BF16 = Format("bf16", 16)
INT8 = int_format(8)
INT4 = int_format(4)
INT8_ROW = Format("int8-row", 8, whole=True, positive=True)
FP8 = Format("fp8", 8, whole=True, coding="fp8", positive=True)
NVFP4 = Format("nvfp4", 4, 16, coding="fp4")

FLOATS: Mapping[str, Format] = {"F32": FP32, "F16": FP16, "BF16": BF16}
"""A checkpoint tensor's floating-point dtype -> the format that keeps it as it is."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def stored_bytes(shape: tuple[int, ...], format: Format, scale_bytes: int = 4) -> int:
    """Bytes of a weight of `shape` (rows first) in `format`, scales and offsets included, of `scale_bytes` each where
    the format does not say; blocks are padded at the row's end.
    """
    rows = shape[0]
    columns = shape[1] if len(shape) > 1 else 1
    codes = rows * format.padded(columns) * format.bits // 8 if format.quantised else rows * columns * format.bits // 8
    if not format.quantised:
        return codes
    if format.tensor_scale:
        return codes + rows * format.blocks(columns) + 4
    scales = rows * format.blocks(columns) * (2 if format.half else scale_bytes) * (2 if format.offsets else 1)
    return codes + scales + (rows * format.zero_bytes(columns) if format.zeros else 0)
