"""Known mistakes, tried where a place differs: which of them gives the graph's numbers?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
Attempt = tuple[str, Callable[[], Tensor]]
"""What went wrong, and what it would give."""

_SHIFTS = (1, -1, 2, -2)
_MOST_HEADS = 16
"""Beyond it, pairs of heads are too many to try."""
_NEAR, _NEAR_HALF = 1e-3, 5e-3
"""Of the largest magnitude: an attempt that comes so near is told, if it is also a tenth of the difference. The second
is for numbers in float16: attention without its scale differs so much by rounding alone.
"""


def fitting(got: Tensor, want: Tensor, attempts: Iterable[Attempt]) -> str:
    """The first attempt that gives `got`, "" where none does; `want` is PyTorch's."""
    size = float(want.abs().max()) or 1.0
    before = float((got - want).abs().max()) / size
    near = _NEAR_HALF if torch.equal(got, got.half().to(got.dtype)) else _NEAR
    for told, attempt in attempts:
        if not float((got - attempt()).abs().max()) / size > min(near, before / 10):
            return told
    return ""


def epsilon(x: Tensor, epsilon: float, gains: Tensor) -> str:
    """Of a norm: the epsilon that explains the gains [n] of the rows of x [n, width], where one does."""
    mean = x.double().pow(2).mean(-1)
    row = int((mean / (gains - 1).abs().clamp(min=1e-12)).argmin())  # where rounding hides least of it
    found = float((mean[row] + epsilon) / gains[row] ** 2 - mean[row])
    expected = ((mean + epsilon) / (mean + max(found, 0.0))).sqrt()
    left = float((gains - expected).abs().max())
    if found < 0 or left > 0.1 * float((gains - 1).abs().max()):
        return ""
    return f"an epsilon of {found:.2g} instead of {epsilon:.2g}"


def exchanged_heads(want: Tensor) -> Iterator[Attempt]:
    """want: [heads, n, head_dim]."""
    if len(want) > _MOST_HEADS:
        return
    for first, second in itertools.combinations(range(len(want)), 2):
        order = list(range(len(want)))
        order[first], order[second] = second, first
        yield f"heads {first} and {second} exchanged", lambda order=order: want[order]  # type: ignore[misc]


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of some tokens. turn: what it makes of them at other positions than theirs; plain: [heads,
    n, head_dim] before it; positions: of the tokens; turns: radians per position of each pair [head_dim / 2]; theta: of
    the config, None where the rope type is not the plain one.
    """

    turn: Callable[[int], Tensor]
    plain: Tensor
    positions: Tensor
    turns: Tensor
    theta: float | None

    def attempts(self) -> Iterator[Attempt]:
        """Mistakes that a rotated tensor may have."""
        yield "no rotation at all", lambda: self.plain
        yield from self.shifts()
        yield from exchanged_heads(self.turn(0))

    def shifts(self) -> Iterator[Attempt]:
        """Other positions."""
        for shift in _SHIFTS:
            if int(self.positions.min()) + shift >= 0:
                yield f"positions off by {shift:+d}", lambda shift=shift: self.turn(shift)  # type: ignore[misc]

    def frequencies(self, got: Tensor) -> str:
        """What the angles between `got` and the plain tensor say of theta, where the token at position 1 is there."""
        at = (self.positions == 1).nonzero()
        if not len(at) or got.shape != self.plain.shape:
            return ""
        half = got.shape[-1] // 2
        before, after = (value[:, int(at[0]), :].double() for value in (self.plain, got))
        cross = (before[:, :half] * after[:, half:] - before[:, half:] * after[:, :half]).sum(0)
        along = (before[:, :half] * after[:, :half] + before[:, half:] * after[:, half:]).sum(0)
        found = torch.atan2(cross, along)
        wrong = ((found - self.turns).abs() / self.turns).argmax()
        turned, right = float(found[wrong]), float(self.turns[wrong])
        other = f"pair {int(wrong)} turns by {turned:.4g} a position instead of {right:.4g}"
        if self.theta is None or half < 2:
            return other
        pairs = torch.arange(1, half, dtype=torch.float64)
        thetas = found[1:].clamp(min=1e-12) ** (-half / pairs)
        middle = float(thetas.median())
        if float((thetas / middle - 1).abs().max()) > 0.05:
            return other
        return f"a rope theta of {middle:.5g} instead of {self.theta:.5g}"
