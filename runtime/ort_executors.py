"""The dialects for TensorRT on ONNX Runtime's CPU: the fallback of their bundles, and where parity is proven.

`trt` writes its cache in place, since TensorScatter copies nothing when its input and output are bound to one buffer.
`trt-primitive` returns the new rows alone, and these are put into a buffer that grows with the text: the graph reads
all of what it is given, so a cache as long as the context would cost the same at every token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..names import TRT
from .arrays import Float32, Int64
from .bundle import Bundle
from .cache import lazy_zeros
from .huge_pages import gathering
from .recipe import IDS, KEPT, POSITIONS
from .session import (
    PAST,
    PRESENT,
    cache_names,
    engine_name,
    import_onnxruntime,
    one_sentence,
    open_session,
    read_graph,
)
from .threads import choose_threads

FIRST_BUCKET = 256
"""Tokens in the buffer of a short text; each further buffer has twice as many."""

_LOGITS = "logits"


def onnxruntime_executor(
    bundle: Bundle, *, model: bytes | None = None, rows: int = 1, threads: int | None = None, exact: bool = False
) -> StaticExecutor | BucketExecutor:
    """Load a bundle of a TensorRT dialect. model: another graph than its model.onnx, for the same weights. rows: texts
    in the cache. threads: default, the physical cores. exact: as of `open_session`.

    Raises LlamaExportError as `open_session` does, UsageError when `threads` is out of range.
    """
    kind = StaticExecutor if bundle.manifest.dialect == TRT else BucketExecutor
    return kind(bundle, model=model, rows=rows, threads=threads, exact=exact)


class _OrtExecutor(ABC):
    """What both have: the session, and the shape of the cache.

    watched: further outputs of the graph, which a run leaves in `seen`.
    """

    def __init__(self, bundle: Bundle, *, model: bytes | None, rows: int, threads: int | None, exact: bool) -> None:
        manifest = bundle.manifest
        shape = manifest.shape
        self.threads = choose_threads(threads)
        self.rows = rows
        self.chunk = manifest.limits.prefill_chunk
        self._ort = import_onnxruntime(manifest)
        with gathering():
            graph = read_graph(bundle) if model is None else model
            self._session = open_session(bundle, graph, self.threads, exact=exact)
        self.name = engine_name(self._ort, manifest)
        self._context = manifest.limits.context
        self._dtype = np.dtype(shape.cache_dtype)
        self._names = cache_names(shape)
        self._heads, self._head_dim = shape.kv_heads, shape.head_dim
        self._past: dict[str, npt.NDArray[Any]] = {}
        self.watched: list[str] = []
        self.seen: list[npt.NDArray[Any]] = []
        self.start(rows)

    @abstractmethod
    def start(self, rows: int) -> None:
        """Forget everything; `rows` texts come next."""

    def cache_of(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Keys and values of a layer [rows, kv_heads, at least the tokens run, head_dim]."""
        return self._past[f"{layer}.key"], self._past[f"{layer}.value"]

    def _zeros(self, length: int) -> npt.NDArray[Any]:
        return lazy_zeros((self.rows, self._heads, length, self._head_dim), self._dtype)


class StaticExecutor(_OrtExecutor):
    """`trt`: one buffer for each part of the cache, as long as the context, read and written in place."""

    def start(self, rows: int) -> None:
        """See `_OrtExecutor.start`."""
        self.rows = rows
        make = self._ort.OrtValue.ortvalue_from_numpy  # on the CPU it shares and keeps the array
        self._past = {name: self._zeros(self._context) for name in self._names}
        self._binding = self._session.io_binding()
        for name, part in self._past.items():
            value = make(part)
            self._binding.bind_ortvalue_input(PAST + name, value)
            self._binding.bind_ortvalue_output(PRESENT + name, value)

    def run(self, ids: Int64, positions: Int64, kept: Int64) -> Float32:
        """See `Executor.run`."""
        feeds = {
            name: np.ascontiguousarray(value) for name, value in ((IDS, ids), (POSITIONS, positions), (KEPT, kept))
        }
        for name, value in feeds.items():  # which keeps them until the run has ended
            self._binding.bind_cpu_input(name, value)
        for name in (_LOGITS, *self.watched):  # anew, as the last run's are of another shape
            self._binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model", error) from error
        found = self._binding.get_outputs()[len(self._names) :]  # in the order of the first binding
        logits, *self.seen = (value.numpy() for value in found)
        return logits  # type: ignore[no-any-return]


class BucketExecutor(_OrtExecutor):
    """`trt-primitive`: buffers of 256 tokens, 512 and so on up to the context; a larger one is filled once."""

    def start(self, rows: int) -> None:
        """See `_OrtExecutor.start`."""
        self.rows = rows
        self._length = 0
        self._past = {}
        self._grow(1)

    def run(self, ids: Int64, positions: Int64, kept: Int64) -> Float32:
        """See `Executor.run`."""
        self._grow(int(positions.max()) + 1)
        feeds = {IDS: ids, POSITIONS: positions, KEPT: kept, **{PAST + name: self._past[name] for name in self._names}}
        try:
            outputs = [_LOGITS, *(PRESENT + name for name in self._names), *self.watched]
            logits, *others = self._session.run(outputs, feeds)
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model", error) from error
        present, self.seen = others[: len(self._names)], others[len(self._names) :]
        firsts, count = positions[:, 0].tolist(), positions.shape[1]
        for name, new in zip(self._names, present, strict=True):
            for row, first in enumerate(firsts):
                self._past[name][row, :, first : first + count] = new[row]
        return logits  # type: ignore[no-any-return]

    def _grow(self, needed: int) -> None:
        """Make sure that the buffers hold `needed` tokens."""
        if needed <= self._length:
            return
        length = max(FIRST_BUCKET, self._length)
        while length < needed:
            length *= 2
        length = min(length, self._context)
        for name in self._names:
            larger = self._zeros(length)
            if name in self._past:
                larger[:, :, : self._length] = self._past[name]
            self._past[name] = larger
        self._length = length
