"""Channel scales that make the columns of matrices alike, so that no few of them decide the scale of a block.

The columns of a block share one scale. Where some are much larger than others, as a norm's weight or a neighbour's rows
may leave them, the small ones are rounded to nothing. At a seam (see `equivalence`) their sizes are free: what they
lose in the matrix moves into the tensor before it. It needs no data, and the function stays (cross-layer equalisation,
arXiv:1906.04721, for blocks along the columns; AWQ, arXiv:2306.00978, chooses such scales by a text).

Kernels may round what a matrix reads to 8 bits too, in blocks of the same columns. Beside weights of 4 bits that is
nothing; beside those of 8 it is the larger part of the loss, so sizes are shared out between both (SmoothQuant,
arXiv:2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..equivalence import Seam
from ..formats import Format
from ..tensors import Float32

_SHARES = {4: 0.0, 8: 0.5}
"""By the bits of weights: the part of the differences between channels that weights take over from what they read."""

_MOST = 2.0**10
"""The most that a channel is moved, either way: products of float16 must stay in its range."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """Root mean squares at a seam, float64 [channels]: of the consumers' columns, taken together, and of what they
    read.
    """

    columns: torch.Tensor
    read: torch.Tensor


def column_sizes(seam: Seam, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of the consumers' columns, float64 [channels]. weights: float32 [rows, columns] by checkpoint name."""
    rows = sum(len(weights[name]) for name in seam.consumers)
    return _by_channel(seam, torch.stack([weights[name].square().sum(0) for name in seam.consumers]).sum(0) / rows)


def read_sizes(seam: Seam, squares: torch.Tensor) -> torch.Tensor:
    """Of what the consumers read, float64 [channels]. squares: the mean of squares of each column."""
    return _by_channel(seam, squares)


def _by_channel(seam: Seam, squares: torch.Tensor) -> torch.Tensor:
    return squares.double().view(-1, seam.times, seam.width).mean(1).flatten().sqrt()


def equalised(sizes: Sizes, formats: Iterable[Format]) -> Float32:
    """The factors [channels] of a seam whose consumers will be stored in `formats`: with weights of 4 bits all columns
    get the same size. Their geometric mean is 1; channels that nothing reads stay, as do all where
    nothing is quantised.
    """
    shares = [_SHARES[format.bits] for format in formats if format.bits in _SHARES]
    used = (sizes.columns > 0) & (sizes.read > 0) & sizes.columns.isfinite() & sizes.read.isfinite()
    if not shares or not used.any():
        return torch.ones(len(used)).numpy()
    share = min(shares)
    wanted = share * sizes.read[used].log() - (1 - share) * sizes.columns[used].log()
    factors = torch.ones_like(sizes.columns)
    factors[used] = (wanted - wanted.mean()).exp().clamp(1 / _MOST, _MOST)
    found: Float32 = factors.float().numpy()
    return found
