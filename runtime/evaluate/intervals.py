"""95 % confidence intervals: what a sample says of a figure, and how surely."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""

_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""Student's, for 1 to 9 degrees of freedom."""

_RESAMPLES, _SEED = 1000, 0


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; low and high are None where the sample has one member, which tells no spread."""

    value: float
    low: float | None
    high: float | None

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the figure."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), low, high)

    def to_json(self) -> dict[str, Any]:
        """`value` and `interval`, a pair or null."""
        return {"value": self.value, "interval": None if self.low is None else [self.low, self.high]}


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution with `freedom` >= 1 degrees of freedom, to 0.001.

    From 10 on by its expansion around the normal one (Abramowitz and Stegun 26.7.5).
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, v = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def mean(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """The mean over all members of groups, given each group's sum and count; groups are what is independent.

    The interval is Student's, of the ratio of two sums (Cochran, Sampling Techniques, 1977, chapter 6).
    """
    total, value = sum(counts), math.fsum(sums) / sum(counts)
    groups = len(sums)
    if groups < 2:
        return Estimate(value, None, None)
    squares = math.fsum((one - value * count) ** 2 for one, count in zip(sums, counts, strict=True))
    reach = student(groups - 1) * math.sqrt(groups / (groups - 1) * squares) / total
    return Estimate(value, value - reach, value + reach)


def bootstrap_mean(groups: Sequence[Sequence[float] | npt.NDArray[np.float64]]) -> Estimate:
    """The mean over all members of groups, with the percentile bootstrap over whole groups as of `quantile`: for groups
    whose sums are far from normal, as few divergences of which some are large.
    """
    sums, counts = np.array([np.sum(group) for group in groups]), np.array([len(group) for group in groups])
    value = float(sums.sum() / counts.sum())
    if len(groups) < 2:
        return Estimate(value, None, None)
    chosen = np.random.default_rng(_SEED).integers(len(groups), size=(_RESAMPLES, len(groups)))
    low, high = np.quantile(sums[chosen].sum(1) / counts[chosen].sum(1), (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def quantile(groups: Sequence[Sequence[float]], share: float) -> Estimate:
    """The value below which `share` of all members lie; the interval by the percentile bootstrap over whole groups,
    with a fixed seed (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """
    values = np.concatenate([np.asarray(group, np.float64) for group in groups])
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    found = _weighted_quantile(values, np.ones(len(values), np.int64), share)
    if len(groups) < 2:
        return Estimate(found, None, None)
    generator = np.random.default_rng(_SEED)
    resampled = []
    for _ in range(_RESAMPLES):
        times = np.bincount(generator.integers(len(groups), size=len(groups)), minlength=len(groups))
        resampled.append(_weighted_quantile(values, times[owners], share))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(found, float(low), float(high))


def _weighted_quantile(values: npt.NDArray[np.float64], times: npt.NDArray[np.int64], share: float) -> float:
    """Of sorted `values` that each stand there so many `times`: the first at which `share` of all is reached."""
    reached = np.cumsum(times)
    return float(values[np.searchsorted(reached, share * reached[-1])])


def wilson(right: int, count: int) -> Estimate:
    """A share of `count` >= 1 with Wilson's score interval (J. American Statistical Association 22, 1927)."""
    share, z2 = right / count, _Z**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    reach = _Z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return Estimate(share, max(0.0, centre - reach), min(1.0, centre + reach))
