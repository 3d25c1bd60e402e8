"""Running an engine: prompts in chunks with one profile, tokens one at a time with the other, by a CUDA graph.

A step is one upload (tokens, positions, wanted logits), one run, one download (logits), and for `trt-primitive` one
copy of the new keys and values to their place. All but that copy, whose place moves, is recorded once and then
launched as a whole.
"""

from __future__ import annotations

import contextlib
import weakref

import numpy as np

from ...errors import UsageError
from ...names import TRT, TRT_PRIMITIVE
from ..arrays import Float32, Int64
from ..bundle import Bundle
from ..recipe import DECODE, PREFILL
from . import api
from .cuda import Cuda
from .engine import EngineFile, load_engine
from .kernels import Kernels
from .kv_cache import Cache, GrowingCache, StaticCache
from .lane import Lane, Recording

_CACHES: dict[str, type[Cache]] = {TRT: StaticCache, TRT_PRIMITIVE: GrowingCache}


class TensorRTExecutor:
    """An `Executor` on TensorRT or TensorRT-RTX, as the bundle's engine asks. Holds GPU memory until `close`."""

    name: str
    threads: int = 1
    rows: int
    chunk: int

    def __init__(self, bundle: Bundle, file: EngineFile, *, rows: int = 1) -> None:
        """Load an engine and reserve all that it needs for `rows` texts as long as the context.

        Raises UsageError when rows is not from 1 to the manifest's batch, LlamaExportError when the engine does not
        load, is not of the bundle, or the GPU has no room.
        """
        limits, shape = bundle.manifest.limits, bundle.manifest.shape
        if not 1 <= rows <= limits.batch:
            raise UsageError(f"rows must be from 1 to the bundle's batch {limits.batch}, not {rows}.")
        with contextlib.ExitStack() as opened:
            cuda = Cuda()
            opened.callback(cuda.close)
            gpu = cuda.gpu()
            engine = load_engine(bundle, file, gpu)
            cache = _CACHES[bundle.manifest.dialect](cuda, shape, limits, rows)
            kernels = Kernels(engine, file.kernels)
            opened.callback(kernels.save)
            scratch = api.scratch_bytes(engine.handle)
            memory = (cuda.allocate(scratch, "the engine's work"), scratch)
            chunk = min(limits.prefill_chunk, limits.context)
            ways = (PREFILL, 1, chunk), (DECODE, rows, 1)
            self._prefill, self._decode = (
                Lane(cuda, engine, kernels.cache, profile, memory, rows=texts, width=width, vocab=shape.vocab)
                for profile, texts, width in ways
            )
            opened.callback(self._prefill.close)
            opened.callback(self._decode.close)
            cuda.wait()
            self._close = weakref.finalize(self, opened.pop_all().close)
        self.name = f"{file.module} {file.version} {gpu.name}"
        self.rows, self.chunk = rows, chunk
        self._cuda, self._cache = cuda, cache
        self._context = limits.context
        self._recording = Recording(cuda, self._decode)
        self._decoded = cache.length  # for which `_decode` is bound; compared, as an interrupt may come at any time

    def close(self) -> None:
        """Give the GPU's memory back; the executor cannot run afterwards."""
        self._close()

    def run(self, ids: Int64, positions: Int64, kept: Int64) -> Float32:
        """See `Executor.run`. Raises UsageError when the arguments are not as it says."""
        rows, count = ids.shape
        starts = [int(start) for start in positions[:, 0]]
        end = max(starts) + count
        if rows != self.rows or not 1 <= count <= self.chunk or min(starts) < 0 or end > self._context:
            raise UsageError(
                f"A run takes {self.rows} rows of 1 to {self.chunk} tokens below position {self._context}, "
                f"not {rows} rows of {count} up to {end - 1}."
            )
        self._cuda.wait()  # a run that was interrupted may still read what is written next
        self._cache.fit(max(starts), end)
        if self._cache.length != self._decoded:
            self._recording.forget()
            self._decode.unbind()
            self._decoded = self._cache.length
        run = self._run_one if count == 1 else self._run_many
        return run(ids, positions, kept, starts)

    def _run_one(self, ids: Int64, positions: Int64, kept: Int64, starts: list[int]) -> Float32:
        lane = self._decode
        if not lane.bound:
            lane.bind((*self._cache.inputs(None), *self._cache.outputs(None, 1)), 1, 1)
        lane.write(ids, positions, kept)
        self._recording.run()
        self._cache.keep(None, starts, 1)
        self._cuda.wait()
        return lane.logits

    def _run_many(self, ids: Int64, positions: Int64, kept: Int64, starts: list[int]) -> Float32:
        """A row after another: engines read prompts of one text."""
        lane, (rows, count) = self._prefill, ids.shape
        gathered = []
        for row, start in enumerate(starts):
            past, present = self._cache.inputs(row, empty=not start), self._cache.outputs(row, count)
            lane.bind((*past, *present), count, kept.shape[1])
            lane.write(ids[row], positions[row], kept[row])
            lane.run()
            self._cache.keep(row, [start], count)
            self._cuda.wait()
            gathered.append(lane.logits if rows == 1 else lane.logits.copy())
        return gathered[0] if rows == 1 else np.concatenate(gathered)
