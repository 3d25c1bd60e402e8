"""How fast a model will run: ranges from the bytes that a token reads and the products that it takes.

Writing one token reads every weight but the embedding once, and the keys and values before it, so memory bandwidth
bounds it; reading a prompt takes products whose rate bounds it. Neither is reached in full, so every prediction is a
range between two efficiencies, whose reasons stand beside them. `planner_published.toml` holds what others measured,
and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .devices import GB, Peak, Target

BANDWIDTH_EFFICIENCY = (0.60, 0.90)
"""Of the memory's bandwidth, reached while weights are read for one token. Published decode speeds come to 60 to 86 %
when weights alone are counted; once keys, values and the pauses between kernels are counted apart, as here, the best
reach 86 to 89 % (see `planner_published.toml`).
"""

LAYER_OVERHEAD_SECONDS = (40e-6, 9e-6)
"""Seconds of every layer in which nothing is read, because one kernel has ended and the next not begun: 7 kernels of
1.3 µs with a CUDA graph (measured on an H100 by Hazy Research, "Look Ma, No Bubbles!", 2025-05), and up to 8 of 5 µs on
slower processors (an assumption). Without it a small model on a fast card would be predicted beyond all reason.
"""

DENSE_EFFICIENCY = (0.25, 0.65)
"""Of the peak rate of products, reached by large ones of FP16 weights; an assumption."""

QUANTISED_EFFICIENCY = (0.05, 0.40)
"""The same for weights that are widened on the way: 6 to 10 % of the FP16 peak were published for INT4 on Thor with
prompts of 380 tokens (see `planner_published.toml`); the upper end is an assumption.
"""

USUAL_FILL = 1024
"""Tokens that the cache is taken to hold when the speed of writing is predicted."""

DLA_SHARE = 0.4
"""Of a peak that counts Orin's DLAs, which no engine of ours uses: 105 of 275 TOPS on AGX Orin 64GB (NVIDIA's technical
brief on the AGX Orin series), taken for the other modules too.
"""

_FP16_OF: Mapping[str, float] = {"fp16": 1, "bf16": 1, "int8": 0.5, "fp8": 0.5, "nvfp4": 0.25}
"""FP16 products a second for each of a format: tensor cores do half as many of twice the width."""


@dataclass(frozen=True)
class Range:
    """From a cautious to a hopeful figure, in tokens a second."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Step:
    """What one run of the graph moves and computes: bytes of weights and of keys and values, products (each one
    multiplication and one addition), layers one after another, whether weights are widened on the way, and the tokens
    that come of it.
    """

    weight_bytes: int
    cache_bytes: int
    products: int
    layers: int
    quantised: bool
    tokens: int


def step_rate(step: Step, bandwidth_gbs: float | None, fp16_tflops: float | None) -> Range | None:
    """Tokens a second, None where the device's bandwidth is unknown.

    A step takes the longer of moving its bytes and of computing its products, and the pauses of its layers. Where the
    rate of products is unknown they are left out, which is right for few tokens only.
    """
    if bandwidth_gbs is None:
        return None

    def seconds(end: int) -> float:
        moving = (step.weight_bytes + step.cache_bytes) / (bandwidth_gbs * GB * BANDWIDTH_EFFICIENCY[end])
        efficiency = (QUANTISED_EFFICIENCY if step.quantised else DENSE_EFFICIENCY)[end]
        computing = 2 * step.products / (fp16_tflops * 1e12 * efficiency) if fp16_tflops else 0.0
        return max(moving, computing) + step.layers * LAYER_OVERHEAD_SECONDS[end]

    return Range(step.tokens / seconds(0), step.tokens / seconds(1))


def dense_tflops(target: Target, format: str = "fp16", *, boosted: bool = False) -> float | None:
    """The peak of products in `format`, in 10^12 operations a second, derived from whatever peak is known.

    A sparse figure counts half, and the share of the DLAs is taken off where it has them. None where no peak is known.
    """
    known = [peak for peak in target.peak if peak.format in _FP16_OF]
    if not known or format not in _FP16_OF:
        return None
    nearest = min(known, key=lambda peak: abs(_FP16_OF[peak.format] - _FP16_OF[format]))
    return _tops(nearest, boosted=boosted) * _FP16_OF[nearest.format] / _FP16_OF[format]


def bandwidth(target: Target, *, boosted: bool = False) -> float | None:
    """GB/s, in the Super mode where it has one and `boosted` asks for it."""
    return (target.boost_bandwidth_gbs if boosted else None) or target.bandwidth_gbs


def _tops(peak: Peak, *, boosted: bool) -> float:
    tops = (peak.boost_tops if boosted else None) or peak.tops
    return tops * (0.5 if peak.sparse else 1) * (1 - DLA_SHARE if peak.with_dlas else 1)
