"""Checkpoints that look quantised: the same names and shapes, with codes of our own where a method makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from .formats import Format
from .quantise import dequantise, quantise
from .tensors import Blocks, Float32, SourceTensor

QuantiseRows = Callable[[Float32, Format], Blocks]
"""Rows [n, columns] as blocks of a format. Rows do not depend on one another."""


def ours(tensor: SourceTensor, format: Format) -> bool:
    """Whether storing `tensor` so takes blocks of integers of our own making."""
    return format.block > 0 and format.coding == "int" and not format.offsets and not tensor.keeps_own(format)


def searched(
    tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format], quantise_rows: QuantiseRows
) -> dict[str, SourceTensor]:
    """`tensors` with the codes that `quantise_rows` makes as rows are asked for, of those in blocks of integers that
    do not keep their own; all others as they are.
    """
    return {
        name: _searched(tensor, formats[name], quantise_rows) if ours(tensor, formats[name]) else tensor
        for name, tensor in tensors.items()
    }


def _searched(tensor: SourceTensor, format: Format, quantise_rows: QuantiseRows) -> SourceTensor:
    def blocks(start: int, stop: int) -> Blocks:
        rows = tensor.read(start, stop)
        if not np.isfinite(rows).all():
            return quantise(rows, format)  # whose scales are not finite either, which the writer tells
        return quantise_rows(rows, format)

    def read(start: int, stop: int) -> Float32:
        return dequantise(blocks(start, stop), tensor.shape[1])

    return replace(tensor, format=format, read=read, blocks=blocks, order=None)
