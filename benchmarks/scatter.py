"""Draws labelled points with intervals as SVG, y on a logarithmic scale, for light and for dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 64, 52
_CHARACTER, _LINE = 6.3, 14
"""Pixels of a label, about."""
_COLOURS = (("#0969da", "#4493f8"), ("#bc4c00", "#db6d28"), ("#1a7f37", "#3fb950"), ("#8250df", "#ab7df8"))
_MORE = ("#59636e", "#9198a1")
_STYLE = """text { font-family: -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; font-size: 12px }
    text { fill: #1f2328 }
    .title { font-size: 15px; font-weight: 600 }
    .middle { text-anchor: middle } .end { text-anchor: end }
    .page { fill: #ffffff; stroke: #d1d9e0 }
    .grid { stroke: #d1d9e0; stroke-width: 1 }
    .join { fill: none; stroke-width: 1.5; stroke-dasharray: 5 4 }
    .bar { stroke-width: 1.5 }"""
_DARK = "text { fill: #f0f6fc } .page { fill: #0d1117; stroke: #3d444d } .grid { stroke: #3d444d }"


@dataclass(frozen=True)
class Point:
    """A label, the group that gives the colour, and where it lies; low and high are the ends of y's interval."""

    label: str
    group: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


@dataclass(frozen=True)
class Scale:
    """From x and log y to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        low, high = map(math.log, self.y)
        return TOP + (high - math.log(max(y, self.y[0]))) / (high - low) * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers 1, 2 and 5 times powers of ten in [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for step in (1, 2, 5) if low <= (tick := step * 10.0**power) <= high]


def steps(low: float, high: float, most: int = 9) -> list[float]:
    """At most `most` + 1 evenly spaced round numbers in [low, high]."""
    wide = (high - low) / most
    power = 10.0 ** math.floor(math.log10(wide))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wide)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scale_of(points: Sequence[Point]) -> Scale:
    """A scale with room on all sides."""
    xs = [point.x for point in points]
    room = (max(xs) - min(xs)) * 0.06 or max(xs) * 0.1
    lows, highs = [point.low for point in points if point.low > 0], [point.high for point in points]
    ys = [point.y for point in points]
    return Scale((min(xs) - room, max(xs) + 2 * room), (min([*lows, *ys]) * 0.8, max([*highs, *ys]) * 1.25))


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no smaller or equal one is below of, by x."""
    result: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not result or point.y < result[-1].y:
            result.append(point)
    return result


def place_labels(points: Sequence[Point], scale: Scale) -> list[tuple[float, float]]:
    """Where each label begins (left, baseline): beside its point where nothing is in the way, else where least is."""
    marks = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in ((scale.across(one.x), scale.down(one.y)) for one in points)]
    taken: list[Box] = []
    result = []
    for index, (point, mark) in enumerate(zip(points, marks, strict=True)):
        width, middle = _CHARACTER * len(point.label), (mark.top + mark.bottom) / 2
        offers = [
            Box(left, middle + shift - _LINE / 2, left + width, middle + shift + _LINE / 2)
            for shift in (0, -_LINE, _LINE, -2 * _LINE, 2 * _LINE, -3 * _LINE, 3 * _LINE)
            for left in (mark.right + 3, mark.left - 3 - width, mark.left - width / 2)
            if left > LEFT and left + width < WIDTH - 4
        ]
        others = [*taken, *marks[:index], *marks[index + 1 :]]
        best = min(
            offers or [Box(mark.right, mark.top, mark.right + width, mark.bottom)],
            key=lambda box: sum(map(box.meets, others)),
        )
        taken.append(best)
        result.append((best.left, best.bottom - 3))
    return result


def scatter(points: Sequence[Point], title: str, x: str, y: str, *, joined: str) -> str:
    """The picture as SVG: y logarithmic, a colour for each group, the frontier of the group `joined` as a line.

    Raises ValueError without points.
    """
    if not points:
        raise ValueError("there is nothing to draw")
    scale = scale_of(points)
    groups = sorted({point.group for point in points}, key=lambda group: (group != joined, group))
    names = {group: f"g{number}" for number, group in enumerate(groups)}
    body = [f'<text class="title" x="{LEFT}" y="26">{escape(title)}</text>']
    body += _axes(scale, x, y)
    body += _legend(names)
    line = frontier(point for point in points if point.group == joined)
    if len(line) > 1:
        path = " ".join(f"{scale.across(point.x):.1f},{scale.down(point.y):.1f}" for point in line)
        body.append(f'<polyline class="join {names[joined]}" points="{path}"/>')
    for point, (left, base) in zip(points, place_labels(points, scale), strict=True):
        across, name = scale.across(point.x), names[point.group]
        ends = f'y1="{scale.down(point.low):.1f}" x2="{across:.1f}" y2="{scale.down(point.high):.1f}"'
        body.append(f'<line class="bar {name}" x1="{across:.1f}" {ends}/>')
        circle = f'<circle class="{name} dot" cx="{across:.1f}" cy="{scale.down(point.y):.1f}" r="4">'
        body.append(f"{circle}<title>{escape(_told(point))}</title></circle>")
        body.append(f'<text x="{left:.1f}" y="{base:.1f}">{escape(point.label)}</text>')
    labelled = 'role="img" aria-labelledby="title description"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {labelled}>'
    listed = escape(f"{y} by {x}: " + "; ".join(map(_told, points)))
    page = f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>'
    told = (f'<title id="title">{escape(title)}</title>', f'<desc id="description">{listed}.</desc>')
    parts = [head, *told, _styles(len(groups)), page, *body]
    return "\n  ".join(parts) + "\n</svg>\n"


def _told(point: Point) -> str:
    """A point in words, for those who do not see it, and under the pointer."""
    return f"{point.label}: {point.x:.1f}, {point.y:.3g} ({point.low:.3g} to {point.high:.3g})"


def _styles(count: int) -> str:
    pairs = [*_COLOURS, *[_MORE] * max(0, count - len(_COLOURS))][:count]

    def colours(shade: int) -> str:
        return "\n    ".join(
            f".g{number} {{ stroke: {pair[shade]} }} .g{number}.dot {{ fill: {pair[shade]} }}"
            for number, pair in enumerate(pairs)
        )

    dark = f"@media (prefers-color-scheme: dark) {{\n    {_DARK}\n    {colours(1)}\n    }}"
    return f"<style>\n    {_STYLE}\n    {colours(0)}\n    {dark}\n  </style>"


def _axes(scale: Scale, x: str, y: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    result = []
    for tick in ticks(*scale.y):
        down = f"{scale.down(tick):.1f}"
        result.append(f'<line class="grid" x1="{LEFT}" y1="{down}" x2="{right}" y2="{down}"/>')
        result.append(f'<text class="end" x="{LEFT - 8}" y="{float(down) + 4:.1f}">{tick:g}</text>')
    for tick in steps(*scale.x):
        across = f"{scale.across(tick):.1f}"
        result.append(f'<line class="grid" x1="{across}" y1="{TOP}" x2="{across}" y2="{bottom}"/>')
        result.append(f'<text class="middle" x="{across}" y="{bottom + 18}">{tick:g}</text>')
    result.append(f'<text class="middle" x="{(LEFT + right) / 2}" y="{bottom + 38}">{escape(x)}</text>')
    middle = (TOP + bottom) / 2
    result.append(f'<text class="middle" x="18" y="{middle}" transform="rotate(-90 18 {middle})">{escape(y)}</text>')
    return result


def _legend(names: dict[str, str]) -> list[str]:
    result, left = [], float(LEFT)
    for group, name in names.items():
        result.append(f'<circle class="{name} dot" cx="{left + 5:.1f}" cy="45" r="4"/>')
        result.append(f'<text x="{left + 14:.1f}" y="49">{escape(group)}</text>')
        left += 34 + _CHARACTER * len(group)
    return result
