"""Two models' logits at the same places: how far apart their distributions are, exactly, over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import Float64
from .likelihood import block_rows

Bools = npt.NDArray[np.bool_]


def divergences(original: npt.NDArray[Any], other: npt.NDArray[Any]) -> tuple[Float64, Bools]:
    """KL(original || other) in nats of each row of logits [rows, vocab], computed in float64, and whether both have
    the same likeliest token; NaN where a row of either is not finite.
    """
    kl, same = np.empty(len(original), np.float64), original.argmax(axis=1) == other.argmax(axis=1)
    step = block_rows(original.shape[1])
    for start in range(0, len(original), step):
        log_p, log_q = (_log_softmax(side[start : start + step]) for side in (original, other))
        with np.errstate(invalid="ignore"):
            terms = np.exp(log_p) * (log_p - log_q)
        terms[np.isneginf(log_p)] = 0  # what the original excludes costs nothing
        kl[start : start + step] = terms.sum(axis=1)
    return kl, same


def _log_softmax(logits: npt.NDArray[Any]) -> Float64:
    with np.errstate(invalid="ignore"):
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        logged: Float64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logged
