"""What a checkpoint looks like to the rest of the project: named tensors whose rows are read when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .formats import Format

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

_STEP = 1 << 19
"""Values that are looked at together."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Rows of a block-quantised matrix: `w = scales * (codes - zeros) + offsets`, all in float32.

    codes: uint8 [rows, columns], each in [0, 2**bits), columns padded to whole blocks; scales: float32 [rows, blocks];
    zeros: uint8 [rows, blocks], or None where all are 2**(bits - 1); offsets: float32 [rows, blocks], or None.
    Where the format codes floating-point numbers, codes are their bits, and nothing is subtracted.
    unit: what the scales are multiples of (NVFP4), else 1: a code is worth `float32(scales * unit)`.
    rounded: blocks that are not exactly those of the checkpoint, whose offset float32 cannot hold.
    """

    format: Format
    codes: UInt8
    scales: Float32
    zeros: UInt8 | None = None
    offsets: Float32 | None = None
    rounded: int = 0
    unit: float = 1.0


@dataclass(frozen=True, eq=False)
class SourceTensor:
    """One tensor of a checkpoint under its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`).

    dtype: how it is stored, for people: F32, F16, BF16, a GGUF block type, or a method such as GPTQ.
    format: the one that keeps the values, or comes nearest.
    read(start, stop): rows [start, stop) of the first axis as float32, dequantised if need be.
    blocks(start, stop): the same rows as the codes and scales that are stored, in `format`; None where there are none,
    or where no format holds them.
    order: int64 [columns], the column that each column of `blocks` is, where they were quantised in an order of their
    own (GPTQ's desc_act); None where columns stand in place.
    scaled: what was quantised to these codes: the checkpoint's tensor, or that with channel scales moved into it (see
    `equivalence`); None where that is the checkpoint's, or these are its own codes.
    `read` and `blocks` may be called from several threads at once, and hold little more than the rows they return.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: Format
    read: Callable[[int, int], Float32]
    blocks: Callable[[int, int], Blocks] | None = None
    order: Int64 | None = None
    scaled: SourceTensor | None = None

    def keeps_own(self, format: Format) -> bool:
        """Whether storing this tensor in `format` takes over the checkpoint's own codes."""
        return self.blocks is not None and format.takes_codes_of(self.format)

    @cached_property
    def largest(self) -> float:
        """The largest finite magnitude in it; the first time, all rows are read."""
        step = max(1, _STEP // int(np.prod(self.shape[1:])))
        return max(self._largest(start, min(self.shape[0], start + step)) for start in range(0, self.shape[0], step))

    def _largest(self, start: int, stop: int) -> float:
        rows = self.read(start, stop)
        lowest, highest = rows.min(), rows.max()
        if np.isfinite(lowest) and np.isfinite(highest):
            return float(max(-lowest, highest))
        return float(np.abs(rows[np.isfinite(rows)]).max(initial=0.0))

    def order_in(self, format: Format) -> Int64 | None:
        """The order in which `format` stores the columns; None for their natural one."""
        return self.order if self.keeps_own(format) else None
