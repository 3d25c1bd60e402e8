"""How far one set of logits is from another: the figures that `verify` gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays import Float32, Float64, Int64
from .reference import Logits, logsumexp

BEST = 5
"""Tokens that are told of a position."""
_OVERLAP = 10


@dataclass(frozen=True)
class Comparison:
    """One number for each position [n]; all but `best_ids` and `best_logits` are the worst there is where a logit is
    not finite.

    difference: largest of a kept logit. relative: the same over the largest magnitude of a kept logit of the reference.
    cosine, norm_ratio: between the kept logits as vectors; the ratio of lengths. kl: KL divergence of the reference
    from the logits, in nats, over the kept top entries and one bucket for the rest. shortfall: how far the reference's
    own logit of the logits' argmax lies below the reference's largest one (0 where they agree). top10: share of the
    reference's ten likeliest tokens that are among the logits' ten. best_ids, best_logits [n, 5]: the logits' own.
    """

    difference: Float64
    relative: Float64
    cosine: Float64
    norm_ratio: Float64
    kl: Float64
    shortfall: Float64
    top10: Float64
    best_ids: Int64
    best_logits: Float32

    def __len__(self) -> int:
        return len(self.kl)

    @staticmethod
    def joined(parts: Sequence[Comparison]) -> Comparison:
        """The same over all positions of several."""
        names = [field.name for field in dataclasses.fields(Comparison)]
        return Comparison(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def compare(reference: Logits, logits: Float32) -> Comparison:
    """Compare full `logits` [n, vocab] with the reference's kept entries of the same n positions."""
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    logits = np.where(finite[:, None], logits, np.float32(0))
    top = np.take_along_axis(logits, reference.top_ids.astype(np.int64), axis=1)
    got = np.concatenate([top, logits[:, reference.sample_ids]], axis=1).astype(np.float64)
    want = np.concatenate([reference.top_logits, reference.sampled], axis=1).astype(np.float64)
    difference = np.abs(got - want).max(axis=1)
    best = _best(logits, max(BEST, min(_OVERLAP, logits.shape[1])))

    def or_worst(values: npt.NDArray[np.float64], worst: float) -> Float64:
        return np.where(finite, values, worst)

    return Comparison(
        difference=or_worst(difference, np.inf),
        relative=or_worst(difference / np.maximum(np.abs(want).max(axis=1), _TINY), np.inf),
        cosine=or_worst(_cosine(got, want), -1),
        norm_ratio=or_worst((_length(got) + _TINY) / (_length(want) + _TINY), np.inf),
        kl=or_worst(_kl(reference, top, logsumexp(logits)), np.inf),
        shortfall=or_worst(_shortfall(reference, best[:, 0]), np.inf),
        top10=or_worst(_overlap(reference, best), 0),
        best_ids=best[:, :BEST],
        best_logits=np.take_along_axis(logits, best[:, :BEST], axis=1),
    )


_TINY = 1e-30


def _length(rows: Float64) -> Float64:
    length: Float64 = np.sqrt(np.square(rows).sum(axis=1))
    return length


def _cosine(got: Float64, want: Float64) -> Float64:
    cosine: Float64 = ((got * want).sum(axis=1) + _TINY) / (_length(got) * _length(want) + _TINY)
    return cosine


def _best(logits: Float32, count: int) -> Int64:
    """The `count` likeliest tokens, likeliest first and of equals the first; fewer in a smaller vocabulary."""
    count = min(count, logits.shape[1])
    found = np.sort(np.argpartition(logits, logits.shape[1] - count, axis=1)[:, logits.shape[1] - count :], axis=1)
    order = np.argsort(-np.take_along_axis(logits, found, axis=1), axis=1, kind="stable")
    best: Int64 = np.take_along_axis(found, order, axis=1).astype(np.int64)
    return best


def _overlap(reference: Logits, best: Int64) -> Float64:
    top = reference.top_ids[:, :_OVERLAP]
    share: Float64 = (top[:, :, None] == best[:, None, :_OVERLAP]).any(axis=2).mean(axis=1)
    return share


def _kl(reference: Logits, top: Float32, total: Float64) -> Float64:
    log_p, log_q = reference.top_logits - reference.logsumexp[:, None], top - total[:, None]
    p = np.exp(log_p)
    p_rest = np.maximum(1 - p.sum(axis=1), 1e-12)
    q_rest = np.maximum(1 - np.exp(log_q).sum(axis=1), 1e-12)
    kl: Float64 = (p * (log_p - log_q)).sum(axis=1) + p_rest * np.log(p_rest / q_rest)
    return np.maximum(kl, 0)


def _shortfall(reference: Logits, chosen: Int64) -> Float64:
    matches = reference.top_ids == chosen[:, None]
    # A token outside of the kept top is at least as far below as the last one kept.
    column = np.where(matches.any(axis=1), matches.argmax(axis=1), reference.top_ids.shape[1] - 1)
    own = np.take_along_axis(reference.top_logits, column[:, None], axis=1)[:, 0]
    return (reference.top_logits[:, 0] - own).astype(np.float64)
