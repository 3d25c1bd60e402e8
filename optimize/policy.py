"""Which formats each kind of graph can hold, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .. import names
from . import schemes
from .formats import BLOCKS, FP16, INT8, Format, int_format, with_half


@dataclass(frozen=True)
class Policy:
    """What a kind of graph takes of formats.

    precisions: what `--precision` can be, and the format it gives to matrices. own_embedding: of an embedding that is
    not the head too, and of one that is but cannot have the head's format, where the precision quantises.
    blocked: bits of the block formats of integers. whole_blocks: blocks must divide the columns of projections, which
    otherwise are padded. zeros: whether blocks may have zero points; without, they become offsets. signed: bits whose
    scales may be negative or 0. keeps_dense: floating-point weights stay as they are; otherwise they become fp16. half:
    scales may be float16 beside activations in float32.
    """

    name: str
    precisions: Mapping[str, Format]
    own_embedding: Format
    blocked: frozenset[int]
    signed: frozenset[int] = frozenset()
    whole_blocks: bool = True
    zeros: bool = False
    keeps_dense: bool = False
    half: bool = False

    def projection(self, format: Format, columns: int) -> Format:
        """The format of a projection of so many columns for which a precision chose `format`."""
        if not format.block:
            return format if format.quantised or self.keeps_dense else FP16
        fitting = self._fitting(format, columns)
        return FP16 if fitting is None else self._stored(fitting)

    def embedding(self, format: Format, columns: int, *, tied: bool) -> Format:
        """The format of an embedding for which a precision chose `format`; rows that no block divides are fp16.

        Zero points of 4 bits have to fill their bytes: where the blocks of a row are odd in number, ONNX Runtime 1.23
        takes those of other rows (seen with 1.23.2; 1.32 does not).
        """
        if not format.quantised:
            return self.projection(format, columns)
        for wanted in (format, self.own_embedding) if tied else (self.own_embedding,):
            fitting = self._fitting(wanted, columns) if wanted.block and wanted.coding == "int" else None
            if fitting is not None and columns % fitting.block == 0:
                odd = fitting.zeros and fitting.blocks(columns) * fitting.bits % 8 > 0
                return self._stored(int_format(fitting.bits, fitting.block, half=fitting.half) if odd else fitting)
        return FP16

    def own(self, format: Format, columns: int) -> Format:
        """The format that keeps the checkpoint's own, or fp16: rounding its numbers anew would lose more."""
        if not format.quantised:
            return self.projection(format, columns)
        fits = columns % format.block == 0 or not self.whole_blocks
        return self._stored(format, own=True) if fits and format.bits in self.blocked else FP16

    def _fitting(self, format: Format, columns: int) -> Format | None:
        """The format itself, or with the largest smaller block that divides the columns; None where there is none."""
        if format.coding == "int" and format.bits not in self.blocked:
            return None
        if not self.whole_blocks or columns % format.block == 0:
            return format
        smaller = [block for block in BLOCKS if block < format.block and columns % block == 0]
        return int_format(format.bits, max(smaller)) if smaller and format.coding == "int" else None

    def _stored(self, format: Format, *, own: bool = False) -> Format:
        """The format as the graph reads it. own: with the checkpoint's scales, of either sign. Where they must be
        positive, 4 bits take an offset more, as a block that is mirrored has no code for its lowest value.
        """
        if format.coding != "int":
            return format
        if self.zeros:
            return with_half(format, format.half and self.half)
        positive = format.bits not in self.signed
        offsets = format.offsets or format.zeros or (own and positive and format.bits == 4)
        return replace(int_format(format.bits, format.block, offsets=offsets), positive=positive)


_BOTH = frozenset({4, 8})

ORT = Policy(
    "ONNX Runtime",
    schemes.formats_on(names.ONNXRUNTIME, on=schemes.CPU),
    schemes.DEFAULT_EMBEDDING,
    blocked=_BOTH,
    signed=_BOTH,
    whole_blocks=False,
    zeros=True,
    keeps_dense=True,
    half=True,
)
"""MatMulNBits and GatherBlockQuantized, with activations in float32."""

ORT_CUDA = replace(ORT, precisions=schemes.formats_on(names.ONNXRUNTIME, on=schemes.CUDA), half=False)
"""The same with activations in float16, which scales are then too."""

TENSORRT_RTX = Policy(
    "TensorRT-RTX", schemes.formats_on(names.TENSORRT_RTX), INT8, blocked=_BOTH, signed=frozenset({4})
)
"""Its parser takes negative scales, of 4-bit codes alone (seen with 1.7.1)."""

TENSORRT = Policy("TensorRT", schemes.formats_on(names.TENSORRT), FP16, blocked=frozenset({4}))
"""10.0 and later. 8 bits are for both factors of a product there, which takes calibration; onnx-tensorrt's parser asks
for positive scales, whatever the codes are.
"""

TENSORRT_8 = Policy("TensorRT 8.6", schemes.formats_on(names.TENSORRT, version="8.6"), FP16, blocked=frozenset())
"""No 4 bits, and no blocks."""
