"""Channel scales that make the columns of matrices alike, so that no few of them decide the scale of a block.

The columns of a block share one scale. Where some are much larger than others, as a norm's weight or a neighbour's rows
may leave them, the small ones are rounded to nothing. At a seam (see `equivalence`) their sizes are free: what they
lose in the matrix moves into the tensor before it. It needs no data, and the function stays (cross-layer equalisation,
arXiv:1906.04721, for blocks along the columns; AWQ, arXiv:2306.00978, chooses such scales by a text).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..equivalence import Seam
from ..tensors import Float32

_MOST = 2.0**10
"""The most that a channel is moved, either way: products of float16 must stay in its range."""


def equalised(seam: Seam, weights: Mapping[str, torch.Tensor]) -> Float32:
    """The factors [channels] of this seam that give all columns of its consumers, taken together, the same root mean
    square; their geometric mean is 1. A channel that nothing reads stays.

    weights: float32 [rows, columns] by checkpoint name, those of the consumers among them.
    """
    squares = sum(weights[name].square().sum(0) for name in seam.consumers)
    assert isinstance(squares, torch.Tensor)
    sizes = squares.view(-1, seam.times, seam.width).sum(1).flatten().sqrt().double()
    used = sizes > 0
    if not used.any() or not sizes.isfinite().all():
        return torch.ones(seam.channels).numpy()
    middle = sizes[used].log().mean().exp()
    factors = torch.where(used, middle / sizes, torch.ones_like(sizes)).clamp(1 / _MOST, _MOST)
    found: Float32 = factors.float().cpu().numpy()
    return found
