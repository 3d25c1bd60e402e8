"""Figures over positions or layers as pictures: where on the page each line, tick and word goes.

The template draws what is here; so all text goes through its escaping, and nothing here knows SVG's or HTML's rules
but the syntax of a path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40
LEAST = 1e-16
"""Smaller figures are drawn as this one: float64's own noise, and 0, which has no logarithm."""
_MOST = 1e4
_TICKS = 8
_DOTTED = 40
"""A line of so few values has a dot at each, so that one that stands alone is seen."""


@dataclass(frozen=True)
class Series:
    """One line: its name, and a value for each place, None where there is none. places: the numbers along the axis."""

    name: str
    places: Sequence[int]
    values: Sequence[float | None]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in the picture's units, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A line of a picture. path: SVG path data; dots: its values, where they are few; beyond: where they were
    infinite or NaN, which cannot be drawn.
    """

    name: str
    path: str
    dots: tuple[tuple[int, int], ...]
    beyond: tuple[int, ...]


@dataclass(frozen=True)
class Picture:
    """A plot. limit, boundary: where the lines of these are, None for none."""

    title: str
    across: str
    upwards: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    limit: float | None
    boundary: float | None


def log_plot(
    title: str,
    across: str,
    upwards: str,
    series: Sequence[Series],
    *,
    limit: float | None = None,
    boundary: int | None = None,
) -> Picture:
    """Lay a picture out whose scale upwards is logarithmic. limit: of the values; boundary: a place before which a line
    is drawn.
    """
    first, last, x = _across(series)
    low, high = _decades([value for one in series for value in one.values if value is not None], limit)

    def y(value: float) -> float:
        share = (math.log10(min(max(value, 10.0**low), 10.0**high)) - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    steps = range(low, high + 1, math.ceil((high - low) / 5))
    return Picture(
        title,
        across,
        upwards,
        tuple(_curve(one, [x(place) for place in one.places], y) for one in series),
        tuple(Tick(x(place), str(place)) for place in _whole_ticks(first, last)),
        tuple(Tick(y(10.0**step), f"1e{step}") for step in steps),
        None if limit is None or limit <= 0 else y(limit),
        None if boundary is None or not first < boundary <= last else x(boundary - 0.5),
    )


def linear_plot(title: str, across: str, upwards: str, series: Sequence[Series]) -> Picture:
    """Lay a picture out whose scale upwards begins at 0; values are finite."""
    first, last, x = _across(series)
    ticks = _whole_ticks(0, max(1, math.ceil(max((value or 0.0 for one in series for value in one.values), default=1))))
    most = max(ticks[-1] + (ticks[1] if len(ticks) > 1 else 1), 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / most)

    return Picture(
        title,
        across,
        upwards,
        tuple(_curve(one, [x(place) for place in one.places], y) for one in series),
        tuple(Tick(x(place), str(place)) for place in _whole_ticks(first, last)),
        tuple(Tick(y(tick), str(tick)) for tick in ticks),
        None,
        None,
    )


def _across(series: Sequence[Series]) -> tuple[int, int, Callable[[float], float]]:
    """The first and the last place, and where on the page each is."""
    places = [place for one in series for place in one.places]
    first, last = min(places, default=0), max(places, default=0)
    return first, last, lambda place: LEFT + (WIDTH - LEFT - RIGHT) * (place - first) / max(last - first, 1)


def _curve(series: Series, across: Sequence[float], y: Callable[[float], float]) -> Curve:
    points = [
        None if value is None or not math.isfinite(value) else (round(at), round(y(value)))
        for at, value in zip(across, series.values, strict=True)
    ]
    beyond = [
        round(at)
        for at, value in zip(across, series.values, strict=True)
        if value is not None and not math.isfinite(value)
    ]
    dots = [point for point in points if point is not None]
    return Curve(series.name, _path(points), tuple(dots) if len(dots) <= _DOTTED else (), tuple(beyond))


def _path(points: Sequence[tuple[int, int] | None]) -> str:
    """A line through the points, which None interrupts; in whole units and steps, which is a third of the length."""
    parts, before = [], None
    for point in points:
        if point is not None and before is None:
            parts.append(f"M{point[0]} {point[1]}l0 0")
        elif point is not None and before is not None:
            parts.append(f" {point[0] - before[0]} {point[1] - before[1]}")
        before = point
    return "".join(parts)


def _decades(values: Iterable[float], limit: float | None) -> tuple[int, int]:
    """The powers of ten below and above all finite values and the limit."""
    shown = [min(max(value, LEAST), _MOST) for value in values if math.isfinite(value) and value > 0]
    shown += [limit] if limit is not None and limit > 0 else []
    if not shown:
        return round(math.log10(LEAST)), 0
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    return low, max(high, low + 1)


def _whole_ticks(first: int, last: int) -> list[int]:
    """Round numbers from first to last, eight at most."""
    step = next(
        factor * 10**power
        for power in range(20)
        for factor in (1, 2, 5)
        if (last - first) / (factor * 10**power) < _TICKS
    )
    return list(range(math.ceil(first / step) * step, last + 1, step))
