"""Rows of equal length through the graph together, every position's logits kept: for proving, not for speed.

Kernels that compute 8-bit weights in full precision unpack the whole matrix at each call (20 times slower than the ones
that ship), so a replay makes few calls with many rows. In the dialect `ort` the cache is handed from call to call,
growing, as the graph's plain inputs and outputs say; the cache in place is what `backend` uses.
"""

from __future__ import annotations

import numpy as np

from ..names import ORT
from .adapters import adapter_inputs, load_adapter
from .arrays import Float32, Int64
from .bundle import Bundle
from .ort_executors import onnxruntime_executor
from .session import PAST, PRESENT, cache_names, import_onnxruntime, one_sentence, open_session


class BatchReplay:
    """The graph of a bundle over `rows` texts at once, with kernels that compute in full precision.

    model: the graph, the bundle's model.onnx or another one for the same weights.
    """

    def __init__(self, bundle: Bundle, rows: int, *, model: bytes, threads: int, adapter: str | None = None) -> None:
        """adapter: the name of one of the bundle's. Raises LlamaExportError as `open_session` and `load_adapter` do."""
        if bundle.manifest.dialect == ORT:
            self._run = _GrowingCache(bundle, rows, model, threads, adapter).run
        else:
            self._run = onnxruntime_executor(bundle, model=model, rows=rows, threads=threads, exact=True).run
        self._length = 0

    def extend(self, ids: Int64) -> Float32:
        """Append tokens [rows, n] to every row; return the logits [rows, n, vocab] after each."""
        rows, count = ids.shape
        new = np.tile(np.arange(count, dtype=np.int64), (rows, 1))
        logits = self._run(ids, new + self._length, new)
        self._length += count
        return logits


class _GrowingCache:
    """The graph of an `ort` bundle."""

    def __init__(self, bundle: Bundle, rows: int, model: bytes, threads: int, adapter: str | None) -> None:
        shape = bundle.manifest.shape
        self._ort = import_onnxruntime(bundle.manifest)
        self._session = open_session(bundle, model, threads, exact=True)
        empty = np.zeros((rows, shape.kv_heads, 0, shape.head_dim), np.dtype(shape.cache_dtype))
        self._past = dict.fromkeys(cache_names(shape), empty)
        self._outputs = ["logits", *(PRESENT + name for name in self._past)]
        self._adapter = load_adapter(bundle, adapter, adapter_inputs(self._session)) if adapter is not None else {}

    def run(self, ids: Int64, positions: Int64, kept: Int64) -> Float32:
        """As `Executor.run`, for positions that are the same in every row and logits of all tokens."""
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), int(positions[0, -1]) + 1), np.int64),
            "logits_to_keep": np.array([kept.shape[1]], np.int64),
            **{PAST + name: value for name, value in self._past.items()},
            **self._adapter,
        }
        try:
            logits, *present = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model", error) from error
        self._past = dict(zip(self._past, present, strict=True))
        return logits.astype(np.float32, copy=False)  # type: ignore[no-any-return]
