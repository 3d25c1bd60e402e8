"""How far models' next tokens are from the original's, by logits that pass by in pieces of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

import numpy as np
import torch

from ..errors import LlamaExportError
from ..optimize.tensors import Float32
from ..runtime.arrays import Float64, Int64
from ..runtime.evaluate.likelihood import slice_rows
from ..runtime.proof.replayer import Replayer


class _Side:
    """One model's logits: their logarithm of the sum of exponentials, the largest, and the target's."""

    def __init__(self, targets: torch.Tensor) -> None:
        rows = len(targets)
        self._targets = targets
        self.top, self.likeliest = torch.full((rows,), -torch.inf), torch.zeros(rows, dtype=torch.int64)
        self.total, self._target = torch.zeros(rows, dtype=torch.float64), torch.full((rows,), torch.nan)

    def add(self, start: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take up a piece [rows, n]; returns its exponentials beside those of the largest so far, and by what those
        before are to be multiplied for that, float64 [rows].
        """
        best, place = logits.max(1)
        higher = best > self.top
        top = torch.where(higher, best, self.top)
        shrunk = (self.top - top).double().exp()
        exponentials = (logits - top[:, None]).exp_()
        self.total = self.total * shrunk + exponentials.sum(1, dtype=torch.float64)
        self.top, self.likeliest = top, torch.where(higher, place + start, self.likeliest)
        here = torch.nonzero((self._targets >= start) & (self._targets < start + logits.shape[1]))[:, 0]
        self._target[here] = logits[here, self._targets[here] - start]
        return exponentials, shrunk

    @property
    def log_total(self) -> torch.Tensor:
        """Of the exponentials, float64 [rows]."""
        return self.total.log() + self.top.double()

    @property
    def nll(self) -> torch.Tensor:
        """The negative log-likelihood of each target in nats, float64 [rows]."""
        return self.log_total - self._target.double()


@dataclass(frozen=True)
class Apart:
    """Of each row: kl, KL(original || other) in nats; same: whether both have the same likeliest token; nll: the
    other's negative log-likelihood of the target.
    """

    kl: Float64
    same: np.ndarray[tuple[int], np.dtype[np.bool_]]
    nll: Float64


class Divergences:
    """Of an original's logits from others' at the same places, each [rows, vocab], piece by piece.

    With p and q the logits it is sum(e^p (p - q)) / sum(e^p) - log sum(e^p) + log sum(e^q), sums in float64. Rounding
    leaves about 1e-7 nats.
    """

    def __init__(self, targets: Sequence[int], others: int) -> None:
        """targets: the token that comes after each row."""
        ids = torch.tensor(targets)
        self._original, self._others = _Side(ids), [_Side(ids) for _ in range(others)]
        self._apart = [torch.zeros(len(targets), dtype=torch.float64) for _ in range(others)]

    def add(self, start: int, original: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
        """The logits [rows, n] of the tokens from `start` on."""
        exponentials, shrunk = self._original.add(start, original)
        for number, (side, logits) in enumerate(zip(self._others, others, strict=True)):
            side.add(start, logits)
            terms = (original - logits).mul_(exponentials).sum(1, dtype=torch.float64)
            self._apart[number] = self._apart[number] * shrunk + terms

    def original_nll(self) -> Float64:
        """As of `Apart`. Raises LlamaExportError where it is not finite."""
        return _finite(self._original.nll, "The checkpoint's").numpy()

    def apart(self, number: int, whose: str) -> Apart:
        """Of the other with this number. Raises LlamaExportError, beginning with `whose`, where it is not finite."""
        side, original = self._others[number], self._original
        kl = self._apart[number] / original.total - original.log_total + side.log_total
        same = original.likeliest == side.likeliest
        found = _finite(kl, whose).clamp_(min=0.0).numpy()
        return Apart(found, same.numpy(), _finite(side.nll, whose).numpy())


def _finite(values: torch.Tensor, whose: str) -> torch.Tensor:
    if not values.isfinite().all():
        raise LlamaExportError(f"{whose} logits are not finite, so its quality cannot be told.")
    return values


class KeptLogits:
    """Logits [rows, vocab] that come row by row and are wanted in pieces of the vocabulary: on disk between, in a file
    without a name.

    cuts: where pieces begin, and the vocabulary's end.
    """

    def __init__(self, folder: Path, rows: int, cuts: Sequence[int]) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._rows, self._cuts, self._kept = rows, tuple(cuts), 0

    def __enter__(self) -> KeptLogits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, logits: Float32) -> None:
        """The next rows [n, vocab]. Raises LlamaExportError where they are not finite."""
        if not np.isfinite(logits).all():
            raise LlamaExportError("its logits are not finite")
        for start, stop in pairwise(self._cuts):
            self._file.seek(4 * (start * self._rows + self._kept * (stop - start)))
            self._file.write(np.ascontiguousarray(logits[:, start:stop], "<f4").data)
        self._kept += len(logits)

    def piece(self, start: int, stop: int) -> Float32:
        """All rows between two neighbouring cuts, [rows, stop - start]."""
        self._file.seek(4 * start * self._rows)
        values = np.empty((self._rows, stop - start), "<f4")
        self._file.readinto(values.data)
        return values


def scored_logits(replayer: Replayer, windows: Sequence[Sequence[int]]) -> Iterator[Float32]:
    """What a replayer gives after every token but each window's last, a few rows [n, vocab] at a time."""
    for window in windows:
        replayer.begin(1)
        ids: Int64 = np.asarray(window[:-1], np.int64)
        step = min(slice_rows(replayer.vocab), replayer.chunk)
        for start in range(0, len(ids), step):
            piece = ids[None, start : start + step]
            yield replayer.run(piece, [start], [piece.shape[1]])[0]
