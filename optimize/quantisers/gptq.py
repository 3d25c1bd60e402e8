"""Codes that make up for one another: GPTQ (Frantar et al., arXiv:2210.17323) on a grid that is searched beforehand,
then coordinate descent on codes and scales (as CDQuant, arXiv:2406.17542, does).

All work on the error that a matrix W [rows, columns] leaves in its product, sum over inputs x of |(W - Q) x|^2 =
trace((W - Q) H (W - Q)^T), H the mean of x x^T [columns, columns]. Rows do not depend on one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from ..formats import Format
from ..quantise import above_zero, half_scales
from ..tensors import Blocks
from .search import search

DAMPING = 0.01
"""Added to H's diagonal, in parts of its mean: inputs that a short text lacks count a little."""

ROUNDS = 2
"""Of coordinate descent, after which little changes."""

CORRECTION = 0.5
"""How far weights go towards making up for the errors of those before: all the way fits the text too well."""

_RIDGE = 0.05
"""Damping of that fit."""

_SOLVED = 1024
"""Right-hand sides of a system of equations that are in memory together."""

_CHUNK = 64
"""Columns after which an error reaches the columns beyond, by one matrix product instead of many."""


@dataclass
class _Grid:
    """The numbers that each place of a matrix can hold: scale * (0 ... top - zero), [rows, blocks] each."""

    format: Format
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def top(self) -> int:
        return int(2**self.format.bits) - 1

    def wide(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points of each column, [columns, rows]: the steps go from column to column."""
        block = self.format.block
        return self.scales.T.repeat_interleave(block, 0), self.zeros.T.repeat_interleave(block, 0)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a matrix of so many columns multiplies, padded to whole blocks: the same for all matrices that read it.

    importance: [columns], the diagonal of H. hessian: H with some damping. order: columns by their importance, the
    largest first; upper: the upper Cholesky factor of the inverse of `hessian` in that order.
    """

    importance: torch.Tensor
    hessian: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor


def inputs_of(hessian: torch.Tensor, width: int, damping: float = DAMPING) -> Inputs:
    """hessian: the mean of x x^T, float32 [columns, columns]; width: columns with those that pad the last block."""
    more = width - len(hessian)
    padded = pad(hessian, (0, more, 0, more)) if more else hessian
    damped = _damped(padded, damping)
    order = torch.argsort(padded.diagonal(), descending=True, stable=True)
    return Inputs(padded.diagonal().clone(), damped, order, _inverse_factor(damped, order))


def correction(hessian: torch.Tensor, cross: torch.Tensor, share: float = CORRECTION) -> torch.Tensor:
    """A [columns, columns] such that W A is what a matrix should have been to make of its inputs x, which have the
    errors of all that was quantised before, what W makes of the right ones, o: least squares over the text, and of that
    a `share` of the way, since a short text tells only so much (cf. GPTAQ, arXiv:2504.02692).

    hessian: the mean of x x^T; cross: of x o^T.
    """
    damped = _damped(hessian, _RIDGE)
    added = damped.diagonal() - hessian.diagonal()
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        return torch.eye(len(hessian), device=hessian.device)
    found = torch.empty_like(hessian)
    for start in range(0, len(hessian), _SOLVED):
        stop = min(len(hessian), start + _SOLVED)
        wanted = cross[:, start:stop].clone()
        wanted[start:stop].diagonal().add_(added[start:stop])
        found[start:stop] = torch.cholesky_solve(wanted, factor).T
    found.mul_(share).diagonal().add_(1 - share)
    return found


def gptq(weight: torch.Tensor, inputs: Inputs, format: Format, *, rounds: int = ROUNDS) -> Blocks:
    """Codes of `weight` float32 [rows, columns] in `format` (blocks of integers), for what it multiplies, on the device
    of both. rounds: of coordinate descent.

    Columns are rounded in the order of their importance, the largest first (act-order); blocks stay where they are.
    """
    weight = pad(weight, (0, len(inputs.importance) - weight.shape[1]))
    found = search(weight.cpu().numpy(), format, inputs.importance.cpu().numpy())
    middle = 2 ** (format.bits - 1)
    zeros = np.full_like(found.scales, middle) if found.zeros is None else found.zeros.astype(np.float32)
    scales = np.where(found.scales == 0, np.float32(1), found.scales)  # a block of zeros: any scale gives it codes of 0
    grid = _Grid(format, *(torch.from_numpy(part).to(weight.device) for part in (scales, zeros)))
    codes = _compensated(weight, inputs, grid)
    for _ in range(rounds):
        _fit_scales(weight, inputs.hessian, grid, codes)
        _descend(weight, inputs.hessian, grid, codes)
    stored = (codes + grid.wide()[1]).T.to(torch.uint8).contiguous().cpu().numpy()
    return above_zero(Blocks(format, stored, grid.scales.cpu().numpy(), found.zeros))


def _damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = hessian.clone()
    damped.diagonal().add_(damping * mean)
    return damped


def _compensated(weight: torch.Tensor, inputs: Inputs, grid: _Grid) -> torch.Tensor:
    """GPTQ: round a column, and let the columns that are not rounded yet make up for it. Returns codes less zero
    points, [columns, rows].
    """
    order, upper = inputs.order, inputs.upper
    left = weight.T[order]
    scales, zeros = (part[order] for part in grid.wide())
    lowest, highest = -zeros, grid.top - zeros
    codes = torch.empty_like(left)
    for start in range(0, len(left), _CHUNK):
        stop = min(len(left), start + _CHUNK)
        factor, chunk = upper[start:stop, start:stop], left[start:stop]
        errors = torch.empty_like(chunk)
        for at in range(stop - start):
            column, scale = chunk[at], scales[start + at]
            code = (column / scale).round_().clamp_(lowest[start + at], highest[start + at])
            codes[start + at] = code
            errors[at] = (column - code * scale) / factor[at, at]
            if at + 1 < stop - start:
                chunk[at + 1 :].addr_(factor[at, at + 1 :], errors[at], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return codes[back]


def _inverse_factor(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, rows and columns in `order`; where float32 finds none, with more
    damping. Two more of such a matrix are in memory at most.
    """
    for more in (0.0, 0.01, 0.1, 1.0):
        ordered = (_damped(hessian, more) if more else hessian)[order[:, None], order]
        factor, failed = torch.linalg.cholesky_ex(ordered)
        del ordered
        if failed:
            continue
        inverse = torch.cholesky_inverse(factor)
        del factor
        upper: torch.Tensor
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return upper
    return torch.diag(hessian.diagonal()[order].clamp(min=1e-30).rsqrt())


def _fit_scales(weight: torch.Tensor, hessian: torch.Tensor, grid: _Grid, codes: torch.Tensor) -> None:
    """Set each block's scale, one after another, to the best for the codes and the other blocks."""
    block = grid.format.block
    pull = hessian @ (weight.T - codes * grid.wide()[0])
    for number in range(grid.scales.shape[1]):
        span = slice(number * block, (number + 1) * block)
        part, old = codes[span], grid.scales[:, number]
        best = old + (part * pull[span]).sum(0) / (part * (hessian[span, span] @ part)).sum(0)
        if grid.format.half:
            best = torch.from_numpy(half_scales(best.cpu().numpy())).to(best.device)
        sound = torch.isfinite(best) & (best * old > 0)
        best = torch.where(sound, best, old)
        pull.addmm_(hessian[:, span], part * (best - old), alpha=-1)
        grid.scales[:, number] = best


def _descend(weight: torch.Tensor, hessian: torch.Tensor, grid: _Grid, codes: torch.Tensor) -> None:
    """Set each code, one after another, to the best beside all others."""
    scales, zeros = grid.wide()
    lowest, highest = -zeros, grid.top - zeros
    pull = hessian @ (weight.T - codes * scales)
    own = hessian.diagonal()
    for start in range(0, len(own), _CHUNK):
        stop = min(len(own), start + _CHUNK)
        near, here = hessian[start:stop, start:stop], pull[start:stop].clone()
        changes = torch.zeros_like(here)
        for at in range(stop - start):
            column = start + at
            scale, old = scales[column], codes[column]
            code = (old + here[at] / (own[column] * scale)).round_().clamp_(lowest[column], highest[column])
            changes[at] = (code - old) * scale
            codes[column] = code
            here.addr_(near[at], changes[at], alpha=-1)
        pull.addmm_(hessian[:, start:stop], changes, alpha=-1)
