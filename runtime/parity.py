"""How far one set of logits is from another: the figures that `verify` gates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Float32, Float64, Int64
from .reference import Logits, logsumexp


@dataclass(frozen=True)
class Comparison:
    """One number for each position [n]. difference: largest of a kept logit; kl: KL divergence of the reference from
    the logits, in nats, over the kept top entries and one bucket for the rest; shortfall: how far the reference's own
    logit of the logits' argmax lies below the reference's largest one (0 where they agree).
    """

    difference: Float64
    kl: Float64
    shortfall: Float64

    @staticmethod
    def joined(parts: list[Comparison]) -> Comparison:
        """The same over all positions of several."""
        return Comparison(
            np.concatenate([part.difference for part in parts]),
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.shortfall for part in parts]),
        )


def compare(reference: Logits, logits: Float32) -> Comparison:
    """Compare full `logits` [n, vocab] with the reference's kept entries of the same n positions.

    NaN in the logits makes every figure of its position infinite.
    """
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    logits = np.where(finite[:, None], logits, np.float32(0))
    top = np.take_along_axis(logits, reference.top_ids.astype(np.int64), axis=1)
    sampled = logits[:, reference.sample_ids]
    difference = np.maximum(
        np.abs(top - reference.top_logits).max(axis=1), np.abs(sampled - reference.sampled).max(axis=1)
    ).astype(np.float64)
    kl = _kl(reference, top, logsumexp(logits))
    shortfall = _shortfall(reference, logits.argmax(axis=1))
    return Comparison(*(np.where(finite, values, np.inf) for values in (difference, kl, shortfall)))


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
