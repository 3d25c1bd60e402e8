"""What a checkpoint looks like to the rest of the project: named tensors whose rows are read when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

BLOCK = 32
"""Columns that share one scale in every block format of this project and of GGUF's Q4_0, Q4_1 and Q8_0."""


@dataclass(frozen=True)
class Blocks:
    """Rows of a block-quantised matrix: `w = scales * (codes - 2**(bits - 1)) + offsets`, all in float32.

    codes: uint8 [rows, columns], each in [0, 2**bits); scales: float32 [rows, columns / BLOCK], one for each block of
    consecutive columns; offsets: the same shape as scales, or None when the format is symmetric.
    """

    bits: int
    codes: UInt8
    scales: Float32
    offsets: Float32 | None = None


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint under its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`).

    dtype: how it is stored: F32, F16, BF16, or a GGUF block type Q4_0, Q4_1, Q8_0.
    read(start, stop): rows [start, stop) of the first axis as float32, dequantised if need be.
    blocks(start, stop): the same rows as stored codes and scales, for block types; None for the others.
    Both may be called from several threads at once, and hold no more memory than the rows they return.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Float32]
    blocks: Callable[[int, int], Blocks] | None = None
