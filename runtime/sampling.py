"""From logits to the next token.

The filters run in the order of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p; each
sees only what the one before left. (llama.cpp applies its temperature last, so the same numbers keep more there.)
Ties at a border are kept, so the result never depends on how a sort orders equals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import LlamaExportError, UsageError
from .arrays import Float32, Float64, Int64


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. Raises UsageError naming the value that is out of range.

    temperature: 0 takes the most likely token (and ignores the filters), higher values flatten the distribution.
    top_k: keep the k most likely tokens, 0 keeps all. top_p: keep the most likely tokens until their probabilities
    reach p, 1 keeps all. min_p: drop tokens less likely than min_p times the likeliest, 0 drops none.
    repetition_penalty: divide positive and multiply negative logits of tokens that are already in the text (Keskar et
    al. 2019), 1 changes nothing. seed: of NumPy's PCG64; the same seed gives the same tokens in every run; None takes
    a new one from the system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature = self.temperature
        checks = (
            ("temperature", temperature, temperature == 0 or 0.001 <= temperature <= 100, "0, or from 0.001 to 100"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
        )
        for name, value, valid, expected in checks:
            if not valid:  # comparisons with NaN are false
                raise UsageError(f"{name} must be {expected}, not {value}.")


def greedy(logits: Float32) -> int:
    """Return the index of the largest logit, the lowest index of equals. Raises LlamaExportError on NaN or infinity."""
    index = int(logits.argmax())  # NumPy's argmax finds a NaN if there is one
    if not math.isfinite(logits[index]):
        raise LlamaExportError(
            f"The model computed {logits[index]} for token {index}; the bundle is damaged or its precision overflows: "
            "run `llama-export verify` on it."
        )
    return index


def penalise(logits: Float32, seen: Int64, penalty: float) -> Float32:
    """Return a copy of `logits` in which the tokens `seen` (each once) are made less likely by `penalty` > 1."""
    out = logits.copy()
    values = out[seen]
    out[seen] = np.where(values > 0, values / penalty, values * penalty)
    return out


def top_k(logits: Float32, candidates: Int64, k: int) -> Int64:
    """Return the candidates with the k largest logits, and those equal to the k-th."""
    if k >= len(candidates):
        return candidates
    values = logits[candidates]
    kept: Int64 = candidates[values >= np.partition(values, len(values) - k)[len(values) - k]]
    return kept


def top_p(logits: Float32, candidates: Int64, p: float) -> Int64:
    """Return the most likely candidates whose probabilities before each sum to less than `p`; at least one.

    Probabilities are taken over the candidates. Only as many logits are sorted as are needed, since a few hundred of
    128k usually hold nearly all of the mass.
    """
    values = logits[candidates]
    weights = np.exp(values - values.max())
    total = float(weights.sum(dtype=np.float64))
    count = min(256, len(weights))
    while True:
        largest = np.flatnonzero(weights >= np.partition(weights, len(weights) - count)[len(weights) - count])
        order = largest[np.argsort(-weights[largest], kind="stable")]
        until = np.cumsum(weights[order], dtype=np.float64)
        before = until - weights[order]
        if until[-1] >= p * total or len(order) == len(weights):
            kept: Int64 = candidates[np.sort(order[before < p * total])]
            return kept
        count = min(count * 8, len(weights))


def min_p(logits: Float32, candidates: Int64, p: float) -> Int64:
    """Return the candidates at least `p` times as likely as the likeliest."""
    values = logits[candidates]
    return candidates[values >= values.max() + math.log(p)] if p > 0 else candidates


def distribution(logits: Float32, options: SamplingOptions) -> tuple[Int64, Float64]:
    """Return the tokens that can be drawn, ascending, and their probabilities (float64, sum 1); temperature above 0.

    Raises LlamaExportError when the largest logit is NaN or infinite.
    """
    largest = logits[greedy(logits)]
    scaled = (logits - largest) / np.float32(options.temperature)
    candidates = np.arange(len(scaled))
    if options.top_k:
        candidates = top_k(scaled, candidates, options.top_k)
    if options.top_p < 1:
        candidates = top_p(scaled, candidates, options.top_p)
    candidates = min_p(scaled, candidates, options.min_p)
    weights = np.exp(scaled[candidates]).astype(np.float64)
    return candidates, weights / weights.sum()


class Sampler:
    """Chooses the tokens of one text, remembering what a repetition penalty and a seed need."""

    def __init__(self, options: SamplingOptions, prompt: Iterable[int] = ()) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._penalised = options.repetition_penalty != 1
        self._seen = dict.fromkeys(prompt) if self._penalised else {}

    def pick(self, logits: Float32) -> int:
        """Return the next token for float32 [vocab] logits, which are not changed."""
        options = self._options
        if self._penalised:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            logits = penalise(logits, seen, options.repetition_penalty)
        token = greedy(logits) if options.temperature == 0 else self._draw(logits)
        if self._penalised:
            self._seen[token] = None
        return token

    def _draw(self, logits: Float32) -> int:
        candidates, probabilities = distribution(logits, self._options)
        at = np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right")
        return int(candidates[min(int(at), len(candidates) - 1)])  # the sum may end just below 1
