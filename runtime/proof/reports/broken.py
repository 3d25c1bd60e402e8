"""What the page shows of a bisection: where the difference begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plots import Picture, Series, log_plot

_FAILED, _NEAREST = 40, 10  # rows that are shown


@dataclass(frozen=True)
class Row:
    """One comparison: of an op group in a layer, None outside of layers. kind: of comparison, "" where there is one."""

    layer: int | None
    group: str
    op: str
    measured: float
    limit: float
    passed: bool
    kind: str = ""

    @property
    def of_limit(self) -> float:
        """The share of the limit that was measured; infinite where it is no number."""
        if not math.isfinite(self.measured):
            return math.inf
        return self.measured / self.limit if self.limit else (math.inf if self.measured else 0.0)


@dataclass(frozen=True)
class Broken:
    """first: the first place that is wrong, "" for none; rows: those that failed, or the nearest to their limits; told:
    which of the two; picture: the largest share of the limit by layer.
    """

    title: str
    first: str
    told: str
    rows: tuple[Row, ...]
    picture: Picture | None


def broken(bisection: Mapping[str, Any]) -> Broken:
    """Choose what to show of a bisection's JSON: `title`; `rows`, each with `layer`, `group`, `op`, `measured`
    (null where it is no number), `limit`, `passed` and perhaps `kind`; and `first`, one of the rows or null.
    """
    rows = [_row(value) for value in bisection["rows"]]
    failed = [row for row in rows if not row.passed]
    count = f"{len(failed)} of {len(rows)} comparisons failed"
    if failed:
        shown, told = failed[:_FAILED], f"{count}{f'; the first {_FAILED}:' if len(failed) > _FAILED else ':'}"
    else:
        shown, told = sorted(rows, key=lambda row: -row.of_limit)[:_NEAREST], f"{count}; nearest to their limits:"
    first = bisection["first"]
    return Broken(
        str(bisection["title"]), "" if first is None else _place(_row(first)), told, tuple(shown), _picture(rows)
    )


def _row(value: Mapping[str, Any]) -> Row:
    measured = value["measured"]
    return Row(
        value["layer"],
        str(value["group"]),
        str(value["op"]),
        math.nan if measured is None else float(measured),
        float(value["limit"]),
        bool(value["passed"]),
        str(value.get("kind", "")),
    )


def _place(row: Row) -> str:
    return f"First place: {f'layer {row.layer}, ' if row.layer is not None else ''}{row.group}: {row.op}"


def _picture(rows: Sequence[Row]) -> Picture | None:
    shares: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.layer is not None:
            layers = shares.setdefault(row.kind, {})
            layers[row.layer] = max(layers.get(row.layer, 0.0), row.of_limit)
    if not shares:
        return None
    series = [
        Series(kind or "op groups", sorted(layers), [layers[layer] for layer in sorted(layers)])
        for kind, layers in shares.items()
    ]
    return log_plot("Largest difference by layer", "layer", "share of the limit", series, limit=1.0)
