"""What the page shows of `quality.json`: what quantisation cost, at the end of the model and matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ....tables import size
from ...quality import EndFigures, Matrix, Quality
from ..verdict import number
from .plots import Picture, Series, linear_plot, log_plot

_MOST_ROWS = 4000
"""Matrices of the table: a model of 500 layers."""

_GROUPS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Lines of the pictures, and the matrices whose worst they show."""


@dataclass(frozen=True)
class Row:
    """Of the table of ends: a head and its cells."""

    head: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Costs:
    """told: what was measured and how; missing: why nothing was measured as it runs, "" where it was; heads, rows: the
    table of ends; bytes: by format; pictures: by layer; matrices: the table of all, left_out of which are not shown.
    """

    told: str
    missing: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    bytes: tuple[tuple[str, str], ...]
    pictures: tuple[Picture, ...]
    matrices: tuple[Matrix, ...]
    left_out: int


def costs(quality: Quality) -> Costs:
    """Choose what to show."""
    end, text = quality.end, quality.text
    rows = [("stored weights", end.weights)] + ([("as it runs", end.shipped)] if end.shipped is not None else [])
    predicted = "" if quality.prediction is None else f" A KL of {number(quality.prediction.kl)} was predicted."
    return Costs(
        f"Method: {quality.method}, {quality.bits:.3g} bits a weight. Measured where it was built, on {text.tokens:,} "
        f"tokens of {text.name} in {text.windows} windows; the original's perplexity is "
        f"{number(end.original_perplexity)}.{predicted}",
        end.not_shipped or "",
        ("KL, mean", "95 % interval", "KL, 99 %", "KL, most", "same likeliest token", "perplexity", "by"),
        tuple(Row(head, _cells(one)) for head, one in rows),
        tuple((name, size(count)) for name, count in quality.bytes.items()),
        tuple(_pictures(quality.matrices)),
        quality.matrices[:_MOST_ROWS],
        max(0, len(quality.matrices) - _MOST_ROWS),
    )


def _cells(found: EndFigures) -> tuple[str, ...]:
    low, high = found.kl.low, found.kl.high
    between = "" if low is None or high is None else f"{number(low)} to {number(high)}"
    shares = (f"{100 * found.top1_agreement:.1f} %", number(found.perplexity), found.by)
    return (number(found.kl.value), between, number(found.kl_p99), number(found.kl_max), *shares)


def _pictures(matrices: Sequence[Matrix]) -> list[Picture]:
    if not any(matrix.layer is not None for matrix in matrices):
        return []
    errors = _series(matrices, lambda matrix: matrix.output_error)
    bits = _series(matrices, lambda matrix: matrix.bits)
    return [
        log_plot("Output error by layer", "layer", "relative to the output", errors),
        linear_plot("Bits of a weight by layer", "layer", "bits", bits),
    ]


def _series(matrices: Sequence[Matrix], value: Callable[[Matrix], float]) -> list[Series]:
    found = []
    for name, parts in _GROUPS.items():
        most: dict[int, float] = {}
        for matrix in matrices:
            if matrix.layer is not None and any(part in matrix.name for part in parts):
                most[matrix.layer] = max(most.get(matrix.layer, 0.0), value(matrix))
        if most:
            layers = sorted(most)
            found.append(Series(name, layers, [most[layer] for layer in layers]))
    return found
