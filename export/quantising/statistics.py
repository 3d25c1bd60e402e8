"""What a matrix reads over a text, summed up: all that a calibrated method needs to know of the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ...errors import LlamaExportError

_PANEL = 1024
"""Rows of a sum of products that are computed together, from the diagonal on: the other half is its mirror image."""

_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Means over the tokens of a text, on the device that computes; matrices that read the same share them.

    hessian: float32 [columns, columns], the mean of x xᵀ, x being what the matrix reads with all that is quantised
    before it. cross: float32 [columns, columns], the mean of x oᵀ, o being what it reads in the unquantised model; None
    where the method does not ask. tokens: how many there were.
    """

    hessian: torch.Tensor
    cross: torch.Tensor | None
    tokens: int
    _made: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, make: Callable[[], _Made]) -> _Made:
        """What `make` gives, made for the first of the matrices that share these statistics: a factorisation, say."""
        if key not in self._made:
            self._made[key] = make()
        found: _Made = self._made[key]
        return found


@dataclass(frozen=True, eq=False)
class Channels:
    """Of each channel that a matrix reads in the unquantised model, over a text: float32 [columns] on the CPU.

    mean_square: the mean of squares; largest: the largest magnitude.
    """

    mean_square: torch.Tensor
    largest: torch.Tensor


class Sums:
    """Statistics in the making. name: of a matrix that reads this, for errors."""

    def __init__(self, name: str, columns: int, device: torch.device, *, cross: bool) -> None:
        self._name, self._tokens = name, 0
        self._hessian = torch.zeros((columns, columns), device=device)
        self._cross = torch.zeros((columns, columns), device=device) if cross else None

    def add(
        self, read: torch.Tensor, original: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> None:
        """Some tokens more, [..., columns]: as they are read, and in the unquantised model. weights: what each counts,
        [tokens].
        """
        read = read.flatten(0, -2)
        self._tokens += len(read)
        if weights is not None:
            read = read * weights.to(read.device).sqrt()[:, None]
        for start in range(0, read.shape[1], _PANEL):
            stop = min(read.shape[1], start + _PANEL)
            self._hessian[start:stop, start:].addmm_(read[:, start:stop].T, read[:, start:])
        if self._cross is not None:
            assert original is not None
            original = original.flatten(0, -2)
            if weights is not None:
                original = original * weights.to(original.device).sqrt()[:, None]
            self._cross.addmm_(read.T, original)

    def statistics(self) -> Statistics:
        """All tokens have been added. Raises LlamaExportError where they are not finite."""
        hessian = self._hessian
        for start in range(0, len(hessian), _PANEL):
            stop = min(len(hessian), start + _PANEL)
            square = hessian[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            hessian[stop:, start:stop] = hessian[start:stop, stop:].T
        if not hessian.diagonal().isfinite().all():
            raise not_finite(self._name)
        hessian.div_(self._tokens)
        return Statistics(hessian, None if self._cross is None else self._cross.div_(self._tokens), self._tokens)


class ChannelSums:
    """Channels in the making."""

    def __init__(self) -> None:
        self._squares = self._largest = torch.zeros(0)
        self._tokens = 0

    def add(self, read: torch.Tensor) -> None:
        """Some tokens more, [..., columns]."""
        read = read.flatten(0, -2)
        squares, largest = read.square().sum(0).cpu(), read.abs().amax(0).cpu()
        self._squares = self._squares + squares if self._tokens else squares
        self._largest = torch.maximum(self._largest, largest) if self._tokens else largest
        self._tokens += len(read)

    def channels(self) -> Channels:
        """All tokens have been added."""
        return Channels(self._squares / self._tokens, self._largest)


def token_weights(left: torch.Tensor) -> torch.Tensor:
    """What an error in the hidden states that a layer `left` [..., hidden] counts at each token, [tokens], 1 on
    average: the norm that reads them divides by their size, which at the first tokens may be hundreds of times that of
    others (massive activations, arXiv:2402.17762).
    """
    weights = 1 / left.flatten(0, -2).square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return weights / weights.mean()


def not_finite(name: str) -> LlamaExportError:
    """What to say where the input of this matrix is not finite."""
    return LlamaExportError(
        f"The input of {name} is not finite in float32, so nothing can be calibrated with it; the checkpoint is "
        "damaged, download or copy it again."
    )
