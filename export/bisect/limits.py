"""What rounding explains, by dtype and place: the limits of the comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from . import places as at
from .local import Result

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11}
"""How far a number is rounded at most, relative to its magnitude."""
_SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14}
"""Below it, numbers are rounded by as much as it is: the least normal number."""

_ROUNDINGS: Mapping[str, float] = {
    **dict.fromkeys((at.EMBEDDED, at.CACHED_VALUES, at.ATTENDED, at.LEFT), 4),
    **dict.fromkeys((at.TURNED_QUERIES, at.CACHED_KEYS, at.SCALED_QUERIES, at.ACTIVATED), 8),
}
"""Units that a few operations one after another may be off by."""
_MOST = 16
"""Of all others, beside the sums that they make."""
_PARTS = 2
"""Of a product."""
_CUMULATIVE = 64
"""For each layer passed, relative to the largest number."""


def local_limit(result: Result, dtype: str) -> float:
    """Of `local_figure`. dtype: of the graph's activations; sums are made in float32 in any case.

    A sum of n numbers in another order is off by about sqrt(n) units (Higham, Accuracy and Stability, 4.2). Weights
    with offsets are multiplied in two parts, each with such a sum.
    """
    sums = math.sqrt(result.terms) * (1 if result.place in at.NORMS else _PARTS)
    return _ROUNDINGS.get(result.place, _MOST) * UNIT[dtype] + sums * UNIT["float32"]


def local_figure(result: Result, dtype: str) -> float:
    """The largest difference, relative to the magnitudes whose rounding may make one."""
    return _largest((result.got - result.want).abs() / (result.scale + _SMALLEST[dtype]))


def gain_limit(result: Result, dtype: str) -> float:
    """Of `gain_figure`: single roundings nearly cancel out in the mean of a row, but the sum of its squares is one for
    all of them; and float16 rounds small numbers of a row coarsely.
    """
    return UNIT["float16"] if dtype == "float16" else max(4, math.sqrt(result.terms)) * UNIT["float32"]


def gain_figure(gains: torch.Tensor) -> float:
    """The largest deviation from 1 of the factor between a norm's row and PyTorch's."""
    return _largest((gains - 1).abs())


def cumulative_limit(layer: int, dtype: str) -> float:
    """Of `cumulative_figure`, after so many layers."""
    return _CUMULATIVE * (1 + layer) * UNIT[dtype]


def cumulative_figure(got: torch.Tensor, want: torch.Tensor, whole: torch.Tensor | None = None) -> float:
    """The largest difference, relative to the largest magnitude of PyTorch's tensor, or of the `whole` one."""
    return _largest((got - want).abs()) / (_largest((want if whole is None else whole).abs()) or 1.0)


def _largest(values: torch.Tensor) -> float:
    """Infinite where anything is no number."""
    largest = float(values.max())
    return float("inf") if math.isnan(largest) else largest
