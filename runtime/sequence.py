"""One sequence of tokens on an engine, and what all engines have in common: checks, chunks, length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .arrays import Float32, Int64
from .bundle import Limits

TokenIds = Sequence[int] | Int64


class Backend(Protocol):
    """What generation needs of an engine: one sequence of tokens, its cache, and the logits after each of them.

    Not for use from several threads at once.
    """

    name: str
    threads: int
    capacity: int
    vocab: int
    length: int

    def extend(self, ids: TokenIds, keep: int = 1) -> Float32:
        """Append tokens to the sequence; return float32 [keep, vocab], the logits after each of the last `keep`."""

    def step(self, token: int) -> Float32:
        """Append one token; return float32 [vocab], the logits after it, valid until the next call."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def use_adapter(self, name: str | None) -> None:
        """Go on with an adapter, None for none, and forget the sequence."""


class SequenceBackend(ABC):
    """The `Backend` over anything that runs one chunk of tokens after those that it has in its cache.

    A subclass sets `name` and `threads`, and adds what it ran to `length` itself, when the run has ended: an
    interrupted one leaves the sequence as it was.
    """

    name: str
    threads: int
    capacity: int
    vocab: int
    length: int

    def __init__(self, *, capacity: int, vocab: int, chunk: int) -> None:
        """capacity: tokens that the cache holds; chunk: the most that one run takes."""
        self.capacity = capacity
        self.vocab = vocab
        self.length = 0
        self._chunk = min(chunk, capacity)

    @abstractmethod
    def _run(self, tokens: Int64, keep: int) -> npt.NDArray[Any]:
        """Run one chunk [n]; return the logits [keep, vocab] after its last `keep` tokens, and add n to `length`."""

    @abstractmethod
    def _run_one(self, token: int) -> npt.NDArray[Any]:
        """Run one token; return the logits [vocab] after it, and add one to `length`."""

    @abstractmethod
    def use_adapter(self, name: str | None) -> None:
        """See `Backend.use_adapter`."""

    def extend(self, ids: TokenIds, keep: int = 1) -> Float32:
        """Append tokens, a chunk at a time; see `Backend.extend`.

        Only the last `keep` positions pay for the output head. Raises UsageError when a token is not in the
        vocabulary, the sequence would exceed the capacity, or `keep` is not from 1 to the number of tokens.
        """
        tokens = np.asarray(ids, np.int64).reshape(-1)
        count = len(tokens)
        if not 1 <= keep <= count:
            raise UsageError(f"keep must be from 1 to the number of tokens {count}, not {keep}.")
        if tokens.min() < 0 or tokens.max() >= self.vocab:
            raise UsageError(f"Token ids must be from 0 to {self.vocab - 1}.")
        self._require_room(count)
        logits = np.empty((keep, self.vocab), np.float32)
        for start in range(0, count, self._chunk):
            part = tokens[start : start + self._chunk]
            stop = start + len(part)
            first = max(start, count - keep)  # of the positions wanted from this chunk
            rows = self._run(part, max(1, stop - first))
            if first < stop:
                logits[first - count + keep : stop - count + keep] = rows
        return logits

    def step(self, token: int) -> Float32:
        """Append one token; see `Backend.step`. Raises UsageError as `extend` does."""
        if not 0 <= token < self.vocab:
            raise UsageError(f"Token ids must be from 0 to {self.vocab - 1}, not {token}.")
        self._require_room(1)
        logits: Float32 = self._run_one(token).astype(np.float32, copy=False)
        return logits

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; free. Raises UsageError when the sequence is shorter."""
        if not 0 <= length <= self.length:
            raise UsageError(f"The sequence can be rewound to a length from 0 to {self.length}, not {length}.")
        self.length = length

    def _require_room(self, count: int) -> None:
        if self.length + count > self.capacity:
            raise UsageError(
                f"{self.length} tokens and {count} more exceed the context of {self.capacity}; "
                "use a shorter text or build with a larger --context."
            )


def choose_capacity(asked: int | None, limits: Limits) -> int:
    """Tokens that the cache holds: `asked`, or the context for None; UsageError when it is not from 1 to that."""
    capacity = limits.context if asked is None else asked
    if not 1 <= capacity <= limits.context:
        raise UsageError(f"capacity must be from 1 to the bundle's context {limits.context}, not {capacity}.")
    return capacity
