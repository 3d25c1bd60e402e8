"""Checkpoints that look quantised: the same names and shapes, with codes of our own where a method makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .formats import Format, with_half
from .quantise import dequantise, quantise, round_scales
from .tensors import Blocks, Float32, SourceTensor

QuantiseRows = Callable[[str, Float32, Format], Blocks]
"""Rows [n, columns] of the matrix of this name as blocks of a format. Rows do not depend on one another."""


def ours(tensor: SourceTensor, format: Format) -> bool:
    """Whether storing `tensor` so takes blocks of integers of our own making."""
    return format.block > 0 and format.coding == "int" and not format.offsets and not tensor.keeps_own(format)


def searched(
    tensors: Mapping[str, SourceTensor],
    formats: Mapping[str, Format],
    quantise_rows: QuantiseRows,
    scale_dtype: npt.DTypeLike,
) -> dict[str, SourceTensor]:
    """`tensors` with the codes that `quantise_rows` makes as rows are asked for, of those in blocks of integers that
    do not keep their own; all others as they are. scale_dtype: of stored scales where the format does not say.
    """
    return {
        name: _searched(tensor, formats[name], quantise_rows, scale_dtype) if ours(tensor, formats[name]) else tensor
        for name, tensor in tensors.items()
    }


def rounded_by(quantise_as: Callable[[Format], Blocks], format: Format, scale_dtype: npt.DTypeLike) -> Blocks:
    """Blocks of `format` with scales as they are stored; who makes them is told of float16 by `Format.half`."""
    found = quantise_as(with_half(format) if np.dtype(scale_dtype) == np.float16 else format)
    return round_scales(replace(found, format=format), scale_dtype)


def _searched(
    tensor: SourceTensor, format: Format, quantise_rows: QuantiseRows, scale_dtype: npt.DTypeLike
) -> SourceTensor:
    def blocks(start: int, stop: int) -> Blocks:
        rows = tensor.read(start, stop)
        if not np.isfinite(rows).all():
            return quantise(rows, format)  # whose scales are not finite either, which the writer tells
        return rounded_by(lambda asked: quantise_rows(tensor.name, rows, asked), format, scale_dtype)

    def read(start: int, stop: int) -> Float32:
        return dequantise(blocks(start, stop), tensor.shape[1])

    return replace(tensor, format=format, read=read, blocks=blocks, order=None, scaled=tensor)
