"""A backend without a model: it answers with given tokens, and records what it was asked to compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


class FakeBackend:
    """After `prompt` tokens it says `reply`, one by one, then `vocab - 1` for ever."""

    name = "fake"
    threads = 1

    def __init__(self, prompt: int, reply: Sequence[int], *, vocab: int = 261, capacity: int = 64) -> None:
        self.prompt, self.reply = prompt, list(reply)
        self.vocab, self.capacity, self.length = vocab, capacity, 0
        self.computed: list[int] = []

    def extend(self, ids: Sequence[int] | npt.NDArray[np.int64], keep: int = 1) -> Float32:
        self.computed.append(len(ids))
        self.length += len(ids)
        return self._logits()[None].repeat(keep, axis=0)

    def step(self, token: int) -> Float32:
        self.length += 1
        return self._logits()

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length

    def use_adapter(self, name: str | None) -> None:
        self.length = 0

    def _logits(self) -> Float32:
        logits = np.zeros(self.vocab, np.float32)
        at = self.length - self.prompt
        logits[self.reply[at] if 0 <= at < len(self.reply) else self.vocab - 1] = 1
        return logits
