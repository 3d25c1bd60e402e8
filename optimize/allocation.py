"""Which of several sizes each part of a model gets, so that all together cost least: for a size, or for a cost.

The multiple-choice knapsack problem. Steps on the lower convex hull of each part's (bytes, cost), the steepest first,
are optimal wherever they end (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11); what they leave of
the limit is filled by what still fits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to store a part: its bytes, and what it costs (KL divergence in nats), neither below 0."""

    bytes: int
    cost: float


Options = Sequence[Option]
"""Of one part; at least one. A choice is the index of one of them."""


def cheapest_within(parts: Sequence[Options], budget: int) -> list[int] | None:
    """A choice for each part of at most `budget` bytes together, of little cost; None where no choice is so small."""
    chosen = [_smallest(options) for options in parts]
    left = budget - sum(options[index].bytes for options, index in zip(parts, chosen, strict=True))
    if left < 0:
        return None
    for part, index in _steps(parts):
        more = parts[part][index].bytes - parts[part][chosen[part]].bytes
        if more > left:
            break
        chosen[part], left = index, left - more
    _fill(parts, chosen, left)
    return chosen


def smallest_within(parts: Sequence[Options], most: float) -> list[int] | None:
    """A choice for each part that costs at most `most` together, of few bytes; None where every choice costs more."""
    chosen = [_smallest(options) for options in parts]
    if math.fsum(min(option.cost for option in options) for options in parts) > most:
        return None
    steps = _steps(parts)
    while total_cost(parts, chosen) > most:
        part, index = next(steps, (-1, 0))
        if part < 0:  # all are at their best; `most` is within rounding of it
            break
        chosen[part] = index
    _shrink(parts, chosen, most)
    return chosen


def total_bytes(parts: Sequence[Options], chosen: Sequence[int]) -> int:
    """Of what was chosen."""
    return sum(options[index].bytes for options, index in zip(parts, chosen, strict=True))


def total_cost(parts: Sequence[Options], chosen: Sequence[int]) -> float:
    """Of what was chosen."""
    return math.fsum(options[index].cost for options, index in zip(parts, chosen, strict=True))


def _smallest(options: Options) -> int:
    return min(range(len(options)), key=lambda index: (options[index].bytes, options[index].cost))


def hull(options: Options) -> list[int]:
    """The options that are worth a step: from the smallest on, each larger and less costly than the one before, by less
    for a byte than the step before.
    """
    found: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: (options[index].bytes, options[index].cost)):
        if found and options[index].cost >= options[found[-1]].cost:
            continue
        while len(found) > 1 and _gain(options, found[-1], index) >= _gain(options, found[-2], found[-1]):
            found.pop()
        found.append(index)
    return found


def _gain(options: Options, one: int, other: int) -> float:
    """Cost that a byte saves from `one` to the larger `other`."""
    more = options[other].bytes - options[one].bytes
    return (options[one].cost - options[other].cost) / more if more else math.inf


def _steps(parts: Sequence[Options]) -> Iterator[tuple[int, int]]:
    """Parts and what they get next, the step that saves most for a byte first."""
    hulls = [hull(options) for options in parts]
    waiting: list[tuple[float, int, int]] = []

    def enter(part: int, place: int) -> None:
        if place + 1 < len(hulls[part]):
            gain = _gain(parts[part], hulls[part][place], hulls[part][place + 1])
            heapq.heappush(waiting, (-gain, part, place + 1))

    for part in range(len(parts)):
        enter(part, 0)
    while waiting:
        _, part, place = heapq.heappop(waiting)
        yield part, hulls[part][place]
        enter(part, place)


Move = tuple[int, int]
"""A part, and the option that it would get."""


def _fill(parts: Sequence[Options], chosen: list[int], left: int) -> None:
    """Spend what is left of the bytes, each time on what saves most cost of all that fits."""

    def worth(part: int, index: int) -> float:
        now, then = parts[part][chosen[part]], parts[part][index]
        return now.cost - then.cost if then.bytes - now.bytes <= left else 0.0

    while (move := _best(parts, worth)) is not None:
        part, index = move
        left -= parts[part][index].bytes - parts[part][chosen[part]].bytes
        chosen[part] = index


def _shrink(parts: Sequence[Options], chosen: list[int], most: float) -> None:
    """Give back bytes, each time the most of all that the cost allows."""

    def worth(part: int, index: int) -> float:
        now, then = parts[part][chosen[part]], parts[part][index]
        fits = spent + then.cost - now.cost <= most
        return float(now.bytes - then.bytes) if fits else 0.0

    spent = total_cost(parts, chosen)
    while (move := _best(parts, worth)) is not None:
        part, index = move
        chosen[part] = index
        spent = total_cost(parts, chosen)


def _best(parts: Sequence[Options], worth: Callable[[int, int], float]) -> Move | None:
    """The move that is worth most, None where none is worth anything."""
    moves = ((part, index) for part, options in enumerate(parts) for index in range(len(options)))
    best = max(moves, key=lambda move: worth(*move), default=None)
    return best if best is not None and worth(*best) > 0 else None
