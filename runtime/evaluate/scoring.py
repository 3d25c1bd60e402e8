"""A text's windows on a backend: how likely each scored token is, and how far the model is from its original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ...errors import LlamaExportError
from ...progress import Progress
from ..arrays import Float32
from ..sequence import Backend
from .divergence import divergences
from .ledger import Ledger
from .likelihood import log_probabilities, logits_after
from .windows import Window

GROUP = 4
"""Windows for which the original's weights are read once."""


class Original(Protocol):
    """The model that the bundle was made of, as its checkpoint has it."""

    def read(self, windows: Sequence[Sequence[int]], told: Callable[[float], None]) -> None:
        """Compute windows in one pass over the weights; the ones before are forgotten. told: the share that is done."""

    def logits(self, window: int, start: int, stop: int) -> Float32:
        """The logits [stop - start, vocab] after tokens `start` to `stop` of one of the windows that were read."""


@dataclass(frozen=True)
class AgainstOriginal:
    """nll: of the original, summed over the scored tokens. same: for how many both have the same likeliest token.
    kl: KL(original || bundle) where each of them is predicted, in nats, to 7 digits.
    """

    nll: float
    same: int
    kl: tuple[float, ...]


@dataclass(frozen=True)
class WindowScore:
    """item: the window's number. nll: the negative log-likelihood in nats, summed over the scored tokens. against:
    None without the original.
    """

    item: int
    nll: float
    against: AgainstOriginal | None = None


def score_windows(
    backend: Backend,
    ids: Sequence[int],
    windows: Sequence[Window],
    ledger: Ledger,
    progress: Progress,
    original: Original | None = None,
) -> list[WindowScore]:
    """Score the windows that the ledger has not, in groups of `GROUP` where there is an original; return all scores.

    Of each side at most `likelihood.SLICE_BYTES` of logits are held at once (of the backend's, twice that while it
    hands them over). Raises LlamaExportError naming the window whose logits are not finite.
    """
    done = min(len(ledger.items), len(windows))
    size = 1 if original is None else GROUP
    for begin in range(done, len(windows), size):
        group = windows[begin : begin + size]
        texts = [ids[window.start : window.stop] for window in group]
        if original is not None:
            # Half of a group's time, roughly: both sides do the same work.
            original.read(texts, _half(progress, begin, len(group), len(windows), done))
        for number, (window, text) in enumerate(zip(group, texts, strict=True)):
            item = begin + number
            score = _score(backend, text, window, item, None if original is None else _Side(original, number))
            ledger.append({key: value for key, value in asdict(score).items() if key != "item"})
            behind = 0.0 if original is None else (len(group) - number - 1) / 2
            progress.count(item + 1 + behind, len(windows), done)
    return ledger.read(WindowScore, len(windows))


def _half(progress: Progress, begin: int, count: int, total: int, before: int) -> Callable[[float], None]:
    return lambda share: progress.count(begin + share * count / 2, total, before)


@dataclass(frozen=True)
class _Side:
    """One window of the original."""

    original: Original
    window: int

    def logits(self, start: int, stop: int) -> Float32:
        return self.original.logits(self.window, start, stop)


def _score(backend: Backend, ids: Sequence[int], window: Window, item: int, side: _Side | None) -> WindowScore:
    backend.rewind(0)
    first = window.first - window.start  # the token before it predicts it
    nll, original_nll, same = 0.0, 0.0, 0
    kl: list[float] = []
    for start, logits in logits_after(backend, ids[:-1], first - 1):
        stop = start + len(logits)
        targets = ids[start + 1 : stop + 1]
        nll -= _summed(log_probabilities(logits, targets), f"the bundle's, in window {item + 1}")
        if side is not None:
            theirs = side.logits(start, stop)
            original_nll -= _summed(log_probabilities(theirs, targets), f"the original's, in window {item + 1}")
            apart, agree = divergences(theirs, logits)
            _summed(apart, f"of one of both, in window {item + 1}")
            kl += [float(f"{value:.6e}") for value in apart]
            same += int(agree.sum())
    return WindowScore(item, nll, None if side is None else AgainstOriginal(original_nll, same, tuple(kl)))


def _summed(values: Any, whose: str) -> float:
    total = float(np.sum(values))
    if not np.isfinite(total):
        raise LlamaExportError(
            f"Logits are not finite: {whose}; run `verify` on the bundle, which tells whether it is at fault."
        )
    return total
