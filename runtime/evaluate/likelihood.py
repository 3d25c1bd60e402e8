"""Logits in slices of bounded size, and the log-probabilities of tokens in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import Float32, Float64
from ..sequence import Backend

SLICE_BYTES = 64 << 20
"""Of logits at once, in float32."""

_BLOCK_BYTES = 8 << 20
"""Of what is computed with them at once."""


def slice_rows(vocab: int) -> int:
    """How many rows of logits are held at once."""
    return max(1, SLICE_BYTES // (4 * vocab))


def block_rows(vocab: int) -> int:
    """How many rows are computed with at once."""
    return max(1, _BLOCK_BYTES // (8 * vocab))


def logits_after(backend: Backend, ids: Sequence[int], first: int) -> Iterator[tuple[int, Float32]]:
    """Append `ids` to the backend's sequence; yield the logits after each token from number `first` on, in slices
    [rows, vocab] from the first to the last, each with the number of its first token.
    """
    if first:
        backend.extend(ids[:first])
    rows = slice_rows(backend.vocab)
    for start in range(first, len(ids), rows):
        part = ids[start : start + rows]
        yield start, backend.extend(part, keep=len(part))


def log_sum_exp(logits: npt.NDArray[Any]) -> Float64:
    """The logarithm of the sum of exponentials of each row, [rows, vocab] -> [rows]; NaN where a row has a NaN or an
    infinity above zero.
    """
    sums = np.empty(len(logits), np.float64)
    step = block_rows(logits.shape[1])
    with np.errstate(invalid="ignore"):
        for start in range(0, len(logits), step):
            block = logits[start : start + step]
            top = block.max(axis=1, keepdims=True)
            sums[start : start + step] = np.log(np.exp(block - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    return sums


def log_probabilities(logits: npt.NDArray[Any], targets: Sequence[int]) -> Float64:
    """The log-probability that rows of logits [rows, vocab] give to their targets; not finite where the row is not."""
    chosen = logits[np.arange(len(logits)), np.asarray(targets)]
    log_p: Float64 = chosen.astype(np.float64) - log_sum_exp(logits)
    return log_p
