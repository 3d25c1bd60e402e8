"""What frontier.py measured, in figures with intervals, a table, and the points of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import report
    from .scatter import Point
else:
    import report
    from scatter import Point

Float64 = NDArray[np.float64]

_RESAMPLES, _SEED = 4000, 0


@dataclass(frozen=True)
class Figures:
    """One tool on one model (a seed of channel scales) and one text.

    bytes: of all files that running needs. kl, top1, nll, original_nll: the mean over each window, in its order.
    """

    tool: str
    group: str
    model: str
    text: str
    bytes: int
    kl: Sequence[float]
    top1: Sequence[float]
    nll: Sequence[float]
    original_nll: Sequence[float]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(strata: Sequence[Float64]) -> Interval:
    """The mean over strata of their means, with the percentile bootstrap over the members of each, by a fixed seed
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Here strata are texts, members windows.
    """
    generator = np.random.default_rng(_SEED)
    means = np.zeros(_RESAMPLES)
    for values in strata:
        chosen = generator.integers(len(values), size=(_RESAMPLES, len(values)))
        means += values[chosen].mean(1) / len(strata)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(np.mean([values.mean() for values in strata])), float(low), float(high))


@dataclass(frozen=True)
class Summary:
    """One tool over all texts and models. by_text: mean KL divergence of each; by_model: over texts, of each.

    perplexity, original_perplexity: by text. cells: what was measured, by model and text.
    """

    tool: str
    group: str
    bytes: float
    kl: Interval
    top1: float
    by_text: Mapping[str, float]
    by_model: Mapping[str, float]
    perplexity: Mapping[str, float]
    original_perplexity: Mapping[str, float]
    cells: Mapping[tuple[str, str], Float64]


def by_windows(cells: Mapping[tuple[str, str], Float64]) -> list[Float64]:
    """For each text a value for each window, the mean over models: windows are what is independent, seeds are not."""
    texts = dict.fromkeys(text for _, text in cells)
    return [np.mean([values for (_, other), values in cells.items() if other == text], axis=0) for text in texts]


def summary(found: Sequence[Figures]) -> Summary:
    """Sum up the results of one tool."""
    cells = {(one.model, one.text): np.array(one.kl) for one in found}
    texts, models = dict.fromkeys(one.text for one in found), dict.fromkeys(one.model for one in found)

    def perplexity(name: str, text: str) -> float:
        return math.exp(np.mean([np.mean(getattr(one, name)) for one in found if one.text == text]))

    return Summary(
        found[0].tool,
        found[0].group,
        float(np.mean([one.bytes for one in found])),
        bootstrap(by_windows(cells)),
        float(np.mean([np.mean(one.top1) for one in found])),
        {text: float(np.mean([np.mean(one.kl) for one in found if one.text == text])) for text in texts},
        {model: float(np.mean([np.mean(one.kl) for one in found if one.model == model])) for model in models},
        {text: perplexity("nll", text) for text in texts},
        {text: perplexity("original_nll", text) for text in texts},
        cells,
    )


def summaries(found: Sequence[Figures]) -> list[Summary]:
    """Each tool's summary, the smallest first."""
    names = dict.fromkeys(one.tool for one in found)
    return sorted((summary([one for one in found if one.tool == name]) for name in names), key=lambda one: one.bytes)


def difference(one: Summary, other: Summary) -> Interval | None:
    """The mean of `one`'s KL divergence less `other`'s, window by window of what both were measured on; None where that
    is nothing. A tie where the interval holds 0.
    """
    common = {cell: values - other.cells[cell] for cell, values in one.cells.items() if cell in other.cells}
    return bootstrap(by_windows(common)) if common else None


def rival(peer: Summary, ours: Sequence[Summary]) -> Summary | None:
    """The best of ours that is no larger than a peer."""
    return min((one for one in ours if one.bytes <= peer.bytes), key=lambda one: one.kl.value, default=None)


def _of_common(one: Summary, other: Summary) -> float:
    """The mean of `one`'s KL divergence over what both were measured on."""
    cells = {cell: values for cell, values in one.cells.items() if cell in other.cells}
    return float(np.mean([values.mean() for values in by_windows(cells)]))


def verdict(gap: Interval) -> str:
    if gap.low <= 0 <= gap.high:
        return "tie"
    return "ours is better" if gap.high < 0 else "ours is worse"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 0.1 else f"{value:.3f}"


def _spread(interval: Interval) -> str:
    return f"{_number(interval.value)} ({_number(interval.low)} to {_number(interval.high)})"


def _row(one: Summary, texts: Sequence[str]) -> list[str]:
    seeds = one.by_model.values()
    return [
        one.tool,
        f"{one.bytes / 1e6:.1f}",
        _spread(one.kl),
        f"{_number(min(seeds))} to {_number(max(seeds))} ({len(seeds)})",
        *(_number(one.by_text[text]) if text in one.by_text else "" for text in texts),
        f"{100 * one.top1:.1f}",
        *(f"{one.perplexity[text]:.2f}" if text in one.perplexity else "" for text in texts),
    ]


def markdown(found: Sequence[Summary], ours: str) -> str:
    """The table of all tools, and of each peer the best of ours (the group `ours`) that is no larger."""
    if not found:
        return "Nothing is measured yet."
    texts = list(dict.fromkeys(text for one in found for text in one.by_text))
    header = [
        *("quantised by", "MB", "KL, nats (95 %)", "by seed"),
        *(f"KL, {text}" for text in texts),
        "same top token, %",
        *(f"perplexity, {text}" for text in texts),
    ]
    parts = [report.table(header, [_row(one, texts) for one in found])]
    originals = {text: value for one in found for text, value in one.original_perplexity.items()}
    parts.append("In float32: " + ", ".join(f"{value:.2f} on {text}" for text, value in originals.items()) + ".")
    mine = [one for one in found if one.group == ours]
    rows = []
    for peer in (one for one in found if one.group != ours):
        best = rival(peer, mine)
        gap = difference(best, peer) if best else None
        if best is None or gap is None:
            continue
        ratio = f"{_of_common(best, peer) / _of_common(peer, best):.2f}"
        told = f"{gap.value:+.3g} ({gap.low:+.3g} to {gap.high:+.3g})"
        rows.append([peer.tool, f"{best.tool}, {best.bytes / 1e6:.1f} MB", ratio, told, verdict(gap)])
    if rows:
        columns = ("peer", "ours, no larger", "KL, ratio", "difference window by window (95 %)", "")
        parts.append(report.table(columns, rows))
    return "\n\n".join(parts)


def points(found: Sequence[Summary]) -> list[Point]:
    """What the picture shows: megabytes, and KL divergence with its interval."""
    return [Point(one.tool, one.group, one.bytes / 1e6, one.kl.value, one.kl.low, one.kl.high) for one in found]
