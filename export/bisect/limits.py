"""What rounding explains, by dtype and place: the limits of the comparison."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import places as at
from .local import Result

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11}
"""How far a number is rounded at most, relative to its magnitude."""
_SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14}
"""Below it, numbers are rounded by as much as it is: the least normal number."""

_ROUNDINGS: Mapping[str, float] = {
    **dict.fromkeys((at.INPUT_NORM, at.POST_NORM, at.NORM), 8),
    **dict.fromkeys((at.TURNED_QUERIES, at.CACHED_KEYS, at.SCALED_QUERIES, at.ACTIVATED), 8),
    **dict.fromkeys((at.EMBEDDED, at.CACHED_VALUES, at.ATTENDED, at.LEFT), 4),
    at.ATTENTION: 16,
}
_PRODUCT = 16
"""Of projections: what is added in another order, or in blocks."""
_GAIN = 4
"""Of a whole row by one factor, where the roundings of single numbers cancel out."""
_FLOAT16_GAIN = 1
_CUMULATIVE = 64
"""For each layer passed, relative to the largest number."""


def local_limit(place: str, dtype: str) -> float:
    """Of `local_figure`. dtype: of the graph's activations."""
    return _ROUNDINGS.get(place, _PRODUCT) * UNIT[dtype]


def local_figure(result: Result, dtype: str) -> float:
    """The largest difference, relative to the magnitudes whose rounding may make one."""
    return _largest((result.got - result.want).abs() / (result.scale + _SMALLEST[dtype]))


def gain_limit(dtype: str) -> float:
    """Of `gain_figure`."""
    return (_GAIN if dtype == "float32" else _FLOAT16_GAIN) * UNIT[dtype]


def gain_figure(gains: torch.Tensor) -> float:
    """The largest deviation from 1 of the factor between a norm's row and PyTorch's."""
    return _largest((gains - 1).abs())


def cumulative_limit(layer: int, dtype: str) -> float:
    """Of `cumulative_figure`, after so many layers."""
    return _CUMULATIVE * (1 + layer) * UNIT[dtype]


def cumulative_figure(got: torch.Tensor, want: torch.Tensor, whole: torch.Tensor | None = None) -> float:
    """The largest difference, relative to the largest magnitude of PyTorch's tensor, or of the `whole` that it is of."""
    return _largest((got - want).abs()) / (_largest((want if whole is None else whole).abs()) or 1.0)


def _largest(values: torch.Tensor) -> float:
    """Infinite where anything is no number."""
    largest = float(values.max())
    return largest if largest == largest else float("inf")
