"""Scales and zero points by search: for each block those that lose least of what matters, without other data.

Rounding to nearest makes a scale of a block's ends. A smaller one cuts these off and is finer for the others. For codes
d (zero point subtracted) and the importance h of each column, the best scale is known: with s = sum(h d w) / sum(h d^2)
the squared error sum(h (w - s d)^2) is sum(h w^2) - sum(h d w)^2 / sum(h d^2). So a few trial scales give codes, and
the codes give their scale: one step of the alternation in HQQ (Badri and Shaji, 2023) and in llama.cpp's k-quants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..formats import Format
from ..quantise import above_zero, half_scales, quantise
from ..tensors import Blocks, Float32, UInt8

_SHRINKS = (1.0, 0.92, 0.84, 0.76)
"""Trial scales, in parts of the one that reaches a block's ends. Finer or smaller ones gained less than a hundredth."""

_ONE = np.float32(1)

_FINE = 6
"""Bits from which on the ends are worth their step."""


@dataclass
class _Best:
    """The best found so far of each block [n, blocks]: gain, what its codes come from, and the scale for them."""

    gain: Float32
    inverse: Float32
    zeros: Float32
    scales: Float32

    def take(self, other: _Best) -> None:
        better = other.gain > self.gain
        for name in ("gain", "inverse", "zeros", "scales"):
            np.copyto(getattr(self, name), getattr(other, name), where=better)


class _Trials:
    """Blocks [n, blocks, block] of a matrix, and what a trial scale would lose of them."""

    def __init__(self, values: Float32, importance: Float32, format: Format) -> None:
        self._values, self._importance, self._format = values, importance, format
        self._weighted = values * importance
        self._codes, self._product = np.empty_like(values), np.empty_like(values)
        self._top = np.float32(2**format.bits - 1)

    def codes(self, inverse: Float32, zeros: Float32) -> Float32:
        """Codes less their zero point, of scales 1 / `inverse`; in place of the last ones."""
        np.multiply(self._values, inverse[..., None], out=self._codes)
        np.rint(self._codes, out=self._codes)
        np.maximum(self._codes, -zeros[..., None], out=self._codes)
        np.minimum(self._codes, (self._top - zeros)[..., None], out=self._codes)
        return self._codes

    def tried(self, inverse: Float32, zeros: Float32) -> _Best:
        codes = self.codes(inverse, zeros)
        along = np.vecdot(codes, self._weighted)
        np.multiply(codes, self._importance, out=self._product)
        scales = along / np.vecdot(codes, self._product)
        return _Best(np.nan_to_num(along * scales, nan=0.0, posinf=0.0, neginf=0.0), inverse, zeros, scales)

    def trials(self) -> Iterator[tuple[Float32, Float32]]:
        """Inverse scales and zero points that are worth a look."""
        largest, smallest = self._values.max(axis=-1), self._values.min(axis=-1)
        shrinks = _SHRINKS if self._format.bits < _FINE else (1.0,)
        middle = np.float32(2 ** (self._format.bits - 1))
        if self._format.zeros:
            largest, smallest = np.maximum(largest, np.float32(0)), np.minimum(smallest, np.float32(0))
            for shrink in map(np.float32, shrinks):
                inverse = self._top / ((largest - smallest) * shrink)
                yield inverse, np.rint(-smallest * shrink * inverse).clip(0, self._top)
            return
        zeros = np.full_like(largest, middle)
        if self._format.positive:
            reach = np.maximum(largest / (middle - 1), -smallest / middle)
        else:
            reach = np.where(largest > -smallest, largest, smallest) / -middle
        for shrink in map(np.float32, shrinks):
            yield _ONE / (reach * shrink), zeros


def search(rows: Float32, format: Format, importance: Float32 | None = None) -> Blocks:
    """Codes of `rows` [n, columns] in `format`, blocks of integers with or without zero points; other formats are
    rounded to nearest.

    importance: [columns], what a squared error in that column counts, such as the mean square of what it multiplies;
    None where all count the same. Scales are as the file keeps them, and codes made for what they became.
    """
    if format.coding != "int" or not format.block or format.offsets:
        return quantise(rows, format)
    n, columns = rows.shape
    width = format.padded(columns)
    padded = np.pad(rows, ((0, 0), (0, width - columns))) if width > columns else rows
    weights = np.ones(columns, np.float32) if importance is None else importance
    counted = np.pad(weights, (0, width - columns)).reshape(1, -1, format.block)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        trials = _Trials(padded.reshape(n, -1, format.block), counted, format)
        found = _best(trials)
        return _blocks(trials, found, format, padded)


def _best(trials: _Trials) -> _Best:
    found: _Best | None = None
    for inverse, zeros in trials.trials():
        tried = trials.tried(inverse, zeros)
        if found is None:
            found = tried
            found.inverse, found.zeros = found.inverse.copy(), found.zeros.copy()
        else:
            found.take(tried)
    assert found is not None
    again = trials.tried(_ONE / found.scales, found.zeros)  # the codes of the scale that the codes gave
    found.take(again)
    return found


def _blocks(trials: _Trials, found: _Best, format: Format, padded: Float32) -> Blocks:
    """Codes and scales as they are stored. Blocks of zeros, or that matter nowhere, and values that are not finite go
    the way of rounding to nearest.
    """
    scales = half_scales(found.scales) if format.half else found.scales
    sound = np.isfinite(scales) & (scales != 0) & (found.gain > 0) & ((scales > 0) | (not format.positive))
    scales = np.where(sound, scales, _ONE)
    codes: UInt8 = (trials.codes(_ONE / scales, found.zeros) + found.zeros[..., None]).astype(np.uint8)
    zeros: UInt8 | None = found.zeros.astype(np.uint8) if format.zeros else None
    if not sound.all():
        plain = quantise(padded, format)
        codes = np.where(sound[..., None], codes, plain.codes.reshape(codes.shape))
        scales = np.where(sound, scales, plain.scales)
        zeros = None if zeros is None or plain.zeros is None else np.where(sound, zeros, plain.zeros)
    return above_zero(Blocks(format, codes.reshape(len(padded), -1), scales, zeros))
