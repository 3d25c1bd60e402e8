"""What can be proven: a bundle's graph on ONNX Runtime, its cache handed from call to call, and what really runs.

A graph takes several texts at once. In the dialect `ort` the cache grows from call to call, as the graph's plain inputs
and outputs say; the cache in place is what a `Backend` uses, and is proven through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...names import ORT
from ..adapters import adapter_inputs, adapter_named, load_adapter, no_adapter
from ..arrays import Float32, Int64
from ..bundle import Bundle, Shape
from ..executor import Executor
from ..ort_executors import onnxruntime_executor
from ..sequence import Backend
from ..session import PAST, PRESENT, cache_names, engine_name, import_onnxruntime, one_sentence, open_session
from ..threads import choose_threads
from .hidden_states import hidden_values, with_outputs
from .replayer import CacheView

MOST_ROWS = 8
_CACHE_BYTES = 1 << 29
"""That the cache of all rows may take, for texts of up to `_USUAL_TEXT` tokens."""
_USUAL_TEXT = 1024
_LONGEST_CALL = 1024
"""Tokens of a text in one call: attention takes memory by their square."""


class GraphReplayer:
    """A `Replayer` over a bundle's graph on ONNX Runtime, in any dialect."""

    def __init__(
        self,
        bundle: Bundle,
        graph: bytes,
        threads: int | None,
        *,
        exact: bool,
        adapter: str | None = None,
        layers: Sequence[int] = (),
    ) -> None:
        """graph: the bundle's model.onnx or another one for the same weights. threads: default, the physical cores.
        exact: with kernels that compute in full precision, not those that ship. adapter: the name of one of the
        bundle's. layers: whose hidden states `hidden` gives, where the graph says which value they are.

        Raises LlamaExportError as `open_session` and `load_adapter` do, UsageError when there is no such adapter.
        """
        manifest = bundle.manifest
        self.name = engine_name(import_onnxruntime(manifest), manifest)
        self.vocab, self.context = manifest.shape.vocab, manifest.limits.context
        self.chunk = min(self.context, _LONGEST_CALL)
        self.most_rows = most_rows(manifest.shape, self.context)
        values = hidden_values(graph) if layers else {}
        self._hidden = {layer: values[layer] for layer in layers if layer in values}
        if self._hidden:
            graph = with_outputs(graph, self._hidden.values())
        opened = _OrtRows if manifest.dialect == ORT else _StepRows
        self._rows: _OrtRows | _StepRows = opened(bundle, graph, choose_threads(threads), exact, adapter)

    def begin(self, rows: int) -> None:
        """See `Replayer.begin`."""
        self._rows.start(rows)

    def run(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.run`."""
        logits = self._rows.run(ids, np.asarray(firsts, np.int64), np.asarray(counts, np.int64))
        return logits.astype(np.float32, copy=False)

    def last(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.last`."""
        logits = self._rows.run(ids, np.asarray(firsts, np.int64), np.asarray(counts, np.int64), last=True)
        return logits[:, 0].astype(np.float32, copy=False)

    def run_watched(self, ids: Int64, first: int) -> tuple[Float32, dict[int, Float32]]:
        """Run the next tokens [n] of one text; return the logits [n, vocab] and the hidden states [n, hidden] after
        each of the layers that were asked for, as far as the graph has them.
        """
        names = list(self._hidden.values())
        self._rows.watched = names
        try:
            logits = self.run(ids[None], [first], [len(ids)])[0]
        finally:
            self._rows.watched = []
        found = zip(self._hidden, self._rows.seen, strict=True)
        return logits, {layer: state[0].astype(np.float32) for layer, state in found}

    def cache(self, layer: int) -> CacheView | None:
        """See `Replayer.cache`."""
        return self._rows.cache(layer)


class BackendReplayer:
    """A `Replayer` over what really runs: one text, as `run` and `chat` compute it."""

    most_rows = 1

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.vocab = backend.name, backend.vocab
        self.context = self.chunk = backend.capacity  # it cuts long texts into chunks itself

    def begin(self, rows: int) -> None:
        """See `Replayer.begin`; rows: 1."""
        self._backend.rewind(0)

    def run(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.run`."""
        count = counts[0]
        self._backend.rewind(firsts[0])
        if count == 1:
            return self._backend.step(int(ids[0, 0]))[None, None]
        return self._backend.extend(ids[0, :count], keep=count)[None]

    def last(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.last`."""
        self._backend.rewind(firsts[0])
        return self._backend.extend(ids[0, : counts[0]])

    def cache(self, layer: int) -> CacheView | None:
        """Not readable: it may lie on a GPU."""


class ExecutorReplayer:
    """A `Replayer` over an executor of several rows: the batch that an engine's profile for single tokens has."""

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        limits = bundle.manifest.limits
        self._executor, self._texts = executor, 1
        self.name, self.vocab, self.context = executor.name, bundle.manifest.shape.vocab, limits.context
        self.most_rows, self.chunk = executor.rows, executor.chunk

    def begin(self, rows: int) -> None:
        """See `Replayer.begin`; the executor's further rows repeat the first."""
        self._texts = rows

    def run(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.run`."""
        every, starts = self._filled(ids), self._filled(np.asarray(firsts))
        positions, kept = _places(starts, ids.shape[1])
        return self._executor.run(every, positions, kept)[: self._texts].copy()

    def last(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.last`."""
        positions, _ = _places(self._filled(np.asarray(firsts)), ids.shape[1])
        kept = self._filled(np.asarray(counts, np.int64)[:, None] - 1)
        return self._executor.run(self._filled(ids), positions, kept)[: self._texts, 0].copy()

    def _filled(self, rows: Int64) -> Int64:
        """With the first row again for each that the executor has beyond the texts."""
        spare = self._executor.rows - self._texts
        return np.ascontiguousarray(np.concatenate([rows, rows[:1].repeat(spare, axis=0)]))

    def cache(self, layer: int) -> CacheView | None:
        """Not readable: it lies on a GPU."""


class _OrtRows:
    """The dialect `ort`: present of a call is past of the next, cut where a text is rewound."""

    def __init__(self, bundle: Bundle, graph: bytes, threads: int, exact: bool, adapter: str | None) -> None:
        shape = bundle.manifest.shape
        self._ort = import_onnxruntime(bundle.manifest)
        self._session = open_session(bundle, graph, threads, exact=exact)
        self._names, self._sizes = cache_names(shape), (shape.kv_heads, 0, shape.head_dim)
        self._dtype = np.dtype(shape.activations if exact else shape.cache_dtype)
        inputs = adapter_inputs(self._session)
        self._adapter = (
            load_adapter(bundle, adapter, inputs)
            if adapter is not None
            else no_adapter(inputs, np.dtype(shape.activations))
        )
        self._past: dict[str, npt.NDArray[Any]] = {}
        self.watched: list[str] = []
        self.seen: list[npt.NDArray[Any]] = []

    def start(self, rows: int) -> None:
        """See `Replayer.begin`."""
        self._past = dict.fromkeys(self._names, np.zeros((rows, *self._sizes), self._dtype))

    def run(self, ids: Int64, firsts: Int64, counts: Int64, *, last: bool = False) -> Float32:
        """See `Replayer.run`; last: [rows, 1, vocab] as `Replayer.last`. A row's first is told by how much of its mask
        is valid, at its end by zeros.
        """
        rows, count = ids.shape
        past = int(firsts.max())
        feeds = {
            "input_ids": ids,
            "attention_mask": (np.arange(past + count) < (firsts + counts)[:, None]).astype(np.int64),
            "logits_to_keep": np.array([1 if last else count], np.int64),
            **{PAST + name: np.ascontiguousarray(value[:, :, :past]) for name, value in self._past.items()},
            **self._adapter,
        }
        outputs = ["logits", *(PRESENT + name for name in self._names), *self.watched]
        try:
            logits, *others = self._session.run(outputs, feeds)
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model", error) from error
        present, self.seen = others[: len(self._names)], others[len(self._names) :]
        self._past = dict(zip(self._names, present, strict=True))
        for row in range(rows):  # the graph keeps the last valid positions, which a padded row has fewer of
            valid = int(counts[row])
            if valid < count and not last:
                logits[row, :valid] = logits[row, count - valid :].copy()
        return logits  # type: ignore[no-any-return]

    def cache(self, layer: int) -> CacheView | None:
        """See `Replayer.cache`."""
        keys, values = (self._past[f"{layer}.{part}"].astype(np.float32) for part in ("key", "value"))
        return CacheView(keys, values)


class _StepRows:
    """The dialects for TensorRT, on ONNX Runtime's executors."""

    def __init__(self, bundle: Bundle, graph: bytes, threads: int, exact: bool, adapter: str | None) -> None:
        self._executor = onnxruntime_executor(bundle, model=graph, threads=threads, exact=exact)
        if adapter is not None:
            adapter_named(bundle, adapter)  # raises: these dialects have none to choose

    @property
    def watched(self) -> list[str]:
        """Names of values whose contents the next run leaves in `seen`."""
        return self._executor.watched

    @watched.setter
    def watched(self, names: list[str]) -> None:
        self._executor.watched = names

    @property
    def seen(self) -> list[npt.NDArray[Any]]:
        """What `watched` asked for."""
        return self._executor.seen

    def start(self, rows: int) -> None:
        """See `Replayer.begin`."""
        self._executor.start(rows)

    def run(self, ids: Int64, firsts: Int64, counts: Int64, *, last: bool = False) -> Float32:
        """See `Replayer.run`; last: [rows, 1, vocab] as `Replayer.last`. Padding is written behind the text, where what
        comes next overwrites it.
        """
        positions, kept = _places(firsts, ids.shape[1])
        return self._executor.run(ids, positions, counts[:, None] - 1 if last else kept)

    def cache(self, layer: int) -> CacheView | None:
        """See `Replayer.cache`."""
        return CacheView(*(part.astype(np.float32) for part in self._executor.cache_of(layer)))


def _places(firsts: npt.NDArray[np.int64], count: int) -> tuple[Int64, Int64]:
    """positions and kept [rows, count], as of `Executor.run`, for logits of all tokens."""
    new = np.tile(np.arange(count, dtype=np.int64), (len(firsts), 1))
    return new + firsts[:, None], new


def most_rows(shape: Shape, context: int) -> int:
    """Texts at once whose cache stays within `_CACHE_BYTES`."""
    token = 2 * math.prod((shape.layers, shape.kv_heads, shape.head_dim, np.dtype(shape.activations).itemsize))
    return max(1, min(MOST_ROWS, _CACHE_BYTES // (token * min(context, _USUAL_TEXT))))
