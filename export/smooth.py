"""SmoothQuant (arXiv:2211.10438): what is hard to round in a projection's input moves into its weights.

An input that is rounded with one scale loses what lies below its largest channels. Dividing those, and multiplying the
weights' columns by as much, changes no product (`optimize.equivalence`); by how much is tried here on a text, for each
input by what is left of its products when both sides are rounded as the bundle rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..optimize.equivalence import Seam
from ..optimize.formats import Format
from ..optimize.quantise import MOST
from ..optimize.tensors import Float32

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""How far channels are made equal that are tried, the paper's alpha. SmolLM2-135M takes 0.7 to 1 nearly everywhere."""

MARGINS = (1.0, 1.25, 1.5, 2.0, 2.5)
"""What is tried of reaching further than the text does. The more equal channels are, the more of them go beyond their
largest magnitudes in another text, and are cut off there.
"""

USUAL_MARGIN = 1.5
"""That with which strengths are compared."""

TOKENS = 512
"""Of a text, about how many are kept; half of them are looked at when strengths are compared."""

REACH = 32.0
"""The largest factor, and the inverse of the least: rows that are divided by more would have scales below the normal
numbers of float16, in which graphs hold them.
"""

LEAST_SCALE = 2.0**-14
"""The smallest normal float16: graphs hold scales in the dtype of activations, where smaller ones lose digits, and one
divided by them is infinite.
"""

_LEAST = 1e-5
"""Largest magnitudes below this are taken for it: channels that are never used get no factor of their own."""

Rows = Callable[[], Iterable[torch.Tensor]]
"""A matrix's rows from the first to the last, a few at a time, [n, columns] float32."""


@dataclass
class Seen:
    """What entered a projection, of the even and of the odd sequences of a text: the largest magnitude of each channel,
    [columns], and some tokens [tokens, columns], the first of each sequence among them.
    """

    largest: tuple[torch.Tensor, torch.Tensor]
    some: tuple[list[torch.Tensor], list[torch.Tensor]]

    @classmethod
    def nothing(cls, columns: int) -> Seen:
        return cls((torch.zeros(columns), torch.zeros(columns)), ([], []))

    def add(self, values: torch.Tensor, every: int) -> None:
        """`values` [tokens, columns] of a sequence have entered, and every so many of them are kept."""
        half = len(self.some[0]) > len(self.some[1])
        largest = self.largest[half]
        torch.maximum(largest, values.abs().amax(0), out=largest)
        self.some[half].append(values[::every].clone())

    @property
    def whole(self) -> torch.Tensor:
        """The largest magnitudes over all tokens."""
        return torch.maximum(*self.largest)

    @property
    def other(self) -> torch.Tensor:
        """Tokens of sequences that `largest[0]` does not know, as long as there are several."""
        return torch.cat(self.some[1] or self.some[0])


@dataclass(frozen=True)
class Smoothed:
    """What is to be done with an input.

    factors: float32 [channels], what the seam is scaled by; None where it stays. amax: the largest magnitude that is
    rounded as it is then: larger ones are cut off. noise: what rounding input and weights adds to the products over
    their size, the root of the mean of squares over tokens of another text.
    """

    factors: Float32 | None
    amax: float
    noise: float


@dataclass(frozen=True)
class _Way:
    """To smooth with this strength, None for not at all, and to reach so many times the largest magnitude."""

    strength: float | None
    margin: float


@dataclass(frozen=True)
class _Try:
    """factors and amax: as in `Smoothed`. columns: [columns] what inputs are divided by; None for ones."""

    factors: Float32 | None
    columns: torch.Tensor | None
    amax: float


def input_scale(amax: float, format: Format) -> float:
    """What is divided by where `amax` becomes the largest number beside weights in `format`: a float16, at least
    `LEAST_SCALE` and finite, so that graphs with scales of either size and the reference hold the same number.
    """
    return float(np.float16(min(max(amax / _most(format), LEAST_SCALE), float(np.finfo(np.float16).max))))


def smooth(seam: Seam | None, seen: Seen, matrices: Sequence[Rows], format: Format) -> Smoothed:
    """Choose how far to smooth an input before it and the `matrices` that read it are rounded to 8 bits in `format`
    (`int8-row` or `fp8`), if at all, and how far to reach: by what rounding does to products in one half of a text,
    when only the other is known.

    seam: through which channels can be scaled; None where they cannot. Memory: a few of the matrices' rows, and `seen`.
    """
    weights = None if seam is None else torch.stack([_largest(rows()) for rows in matrices]).amax(0)
    some = seen.other

    def tried(way: _Way, largest: torch.Tensor) -> _Try:
        if way.strength is None or seam is None or weights is None:
            return _Try(None, None, float(largest.max()) * way.margin)
        return _scaled(seam, largest, weights, way)

    def best(ways: Sequence[_Way]) -> tuple[_Way, float]:
        tries = [tried(way, seen.largest[0]) for way in ways]
        errors = torch.stack([_errors(some, rows(), tries, format) for rows in matrices]).mean((0, 2))
        number = int(errors.argmin())
        return ways[number], float(errors[number].sqrt())

    strengths = (None, *STRENGTHS) if seam is not None else (None,)
    way, _ = best([_Way(strength, USUAL_MARGIN) for strength in strengths])
    way, noise = best([_Way(way.strength, margin) for margin in MARGINS])
    chosen = tried(way, seen.whole)
    return Smoothed(chosen.factors, chosen.amax, noise)


def _largest(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude in each column."""
    return torch.stack([part.abs().amax(0) for part in parts]).amax(0)


def _scaled(seam: Seam, inputs: torch.Tensor, weights: torch.Tensor, way: _Way) -> _Try:
    """The paper's equation 4. The factors' middle is 1, so that float16 holds what grows and what shrinks by them.

    inputs, weights: [columns] largest magnitudes; of columns that share a factor the largest counts.
    """
    assert way.strength is not None
    entering, reading = (seam.channels_of(largest.clamp(min=_LEAST).numpy()) for largest in (inputs, weights))
    logs = way.strength * np.log(entering) - (1 - way.strength) * np.log(reading)
    logs -= (logs.min() + logs.max()) / 2
    factors = np.clip(np.exp(logs), 1 / REACH, REACH).astype(np.float32)
    columns = torch.from_numpy(seam.columns(factors))
    return _Try(factors, columns, float((inputs / columns).max()) * way.margin)


def _errors(some: torch.Tensor, parts: Iterable[torch.Tensor], tries: Sequence[_Try], format: Format) -> torch.Tensor:
    """What each try makes of products with a matrix, [tries, tokens]: squares of differences over those of the token's
    products, or over the middle of all tokens' where that is more.
    """
    errors, sizes = torch.zeros(len(tries), len(some)), torch.zeros(len(some))
    for part in parts:
        exact = some @ part.T
        sizes += exact.square().sum(1)
        for number, one in enumerate(tries):
            inputs, weights = (some, part) if one.columns is None else (some / one.columns, part * one.columns)
            step = input_scale(one.amax, format)
            found = rounded(inputs, step, format) @ rounded_rows(weights, format).T
            errors[number] += (found - exact).square().sum(1)
    return errors / torch.maximum(sizes, sizes.median()).clamp(min=torch.finfo(torch.float32).tiny)


def rounded(values: torch.Tensor, step: float | torch.Tensor, format: Format) -> torch.Tensor:
    """`values` as multiples of `step` by the numbers of the format, as ONNX's QuantizeLinear has it: what is too large
    becomes the largest.
    """
    steps = values / step
    if format.coding == "int":
        return steps.round_().clamp_(-128, 127) * step
    return steps.clamp_(-_most(format), _most(format)).to(torch.float8_e4m3fn).to(torch.float32) * step


def rounded_rows(weights: torch.Tensor, format: Format) -> torch.Tensor:
    """`weights` [rows, columns] as `optimize.quantise` rounds them, one scale a row."""
    highest, lowest = weights.amax(1, keepdim=True), weights.amin(1, keepdim=True)
    if format.coding == "int":
        steps = torch.maximum(highest / 127, lowest / -128)
    else:
        steps = torch.maximum(highest, -lowest) / _most(format)
    return rounded(weights, torch.where(steps > 0, steps, 1.0), format)


def _most(format: Format) -> float:
    """The largest number that inputs are rounded to beside weights in `format`."""
    return 127.0 if format.coding == "int" else MOST[format.coding]


def in_parts(matrix: torch.Tensor, values: int) -> Iterator[torch.Tensor]:
    """The rows of a matrix, about so many values at a time."""
    yield from torch.split(matrix, max(1, values // matrix.shape[1]))
