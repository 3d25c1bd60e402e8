"""The seam between generation and the engines that run the TensorRT dialects: a graph, and the cache that goes with it.

An `Executor` knows nothing of texts: it is told which tokens stand at which positions. Positions below the first of a
run are taken from its cache, those of the run are written there, and whatever lies beyond is never seen. So rewinding
costs nothing.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .adapters import adapter_named
from .arrays import Float32, Int64
from .bundle import Bundle
from .sequence import SequenceBackend, choose_capacity


class Executor(Protocol):
    """A loaded graph of the dialects `trt` and `trt-primitive`, with the cache of `rows` texts.

    name: what computes ("onnxruntime 1.32.0 cpu"); threads: of the CPU, 1 where a GPU computes; rows: texts in the
    cache; chunk: the most tokens of a text that one run takes. Not for use from several threads at once.
    """

    name: str
    threads: int
    rows: int
    chunk: int

    def run(self, ids: Int64, positions: Int64, kept: Int64) -> Float32:
        """Run the next tokens of every text.

        ids, positions: int64 [rows, n], n from 1 to `chunk`; positions are consecutive in a row, below the context,
        and every position before the first has been run. kept: int64 [rows, k], k from 1 to n, which of the n tokens
        get logits. Returns float32 [rows, k, vocab], valid until the next call. The cache counts as changed only when
        it returns: after an error or an interrupt the same run can be made again. Raises LlamaExportError when the
        engine fails.
        """


class StepBackend(SequenceBackend):
    """A `Backend` on an executor of one row."""

    def __init__(self, bundle: Bundle, executor: Executor, *, capacity: int | None = None) -> None:
        """capacity: tokens of a text; default and at most, the manifest's context. Raises UsageError beyond that."""
        limits = bundle.manifest.limits
        super().__init__(
            capacity=choose_capacity(capacity, limits),
            vocab=bundle.manifest.shape.vocab,
            chunk=min(limits.prefill_chunk, executor.chunk),
        )
        self.name, self.threads = executor.name, executor.threads
        self._bundle = bundle
        self._executor = executor
        self._first = np.zeros((1, 1), np.int64)

    def use_adapter(self, name: str | None) -> None:
        """Forget the sequence; None is the only choice. Raises UsageError for any other, as `adapter_named` does."""
        if name is not None:
            adapter_named(self._bundle, name)
        self.length = 0

    def _run(self, tokens: Int64, keep: int) -> Float32:
        count = len(tokens)
        positions = np.arange(self.length, self.length + count, dtype=np.int64)[None]
        kept = np.arange(count - keep, count, dtype=np.int64)[None]
        logits: Float32 = self._executor.run(tokens[None], positions, kept)[0]
        self.length += count
        return logits

    def _run_one(self, token: int) -> Float32:
        one = np.full((1, 1), token, np.int64)
        logits: Float32 = self._executor.run(one, np.full((1, 1), self.length, np.int64), self._first)[0, 0]
        self.length += 1
        return logits
