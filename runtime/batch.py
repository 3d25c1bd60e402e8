"""Rows of equal length through the graph together, every position's logits kept: for proving, not for speed.

Kernels that compute 8-bit weights in full precision unpack the whole matrix at each call (20 times slower than the ones
that ship), so a replay makes few calls with many rows. The cache is handed from call to call, growing, as the graph's
plain inputs and outputs say; the cache in place is what `backend` uses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from .backend import import_onnxruntime, one_sentence, open_session
from .bundle import Bundle

Float32 = npt.NDArray[np.float32]


class BatchReplay:
    """The graph of a bundle over `rows` texts at once. model: another graph than the bundle's model.onnx."""

    def __init__(self, bundle: Bundle, rows: int, *, model: Path | bytes, threads: int) -> None:
        shape = bundle.manifest.shape
        self._ort = import_onnxruntime(bundle.manifest)
        self._session = open_session(self._ort, bundle, model, threads)
        empty = np.zeros((rows, shape.kv_heads, 0, shape.head_dim), np.dtype(shape.cache_dtype))
        self._past = [empty] * (2 * shape.layers)
        self._names = [f"past_key_values.{layer}.{part}" for layer in range(shape.layers) for part in ("key", "value")]
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._names)]
        self._length = 0

    def extend(self, ids: npt.NDArray[np.int64]) -> Float32:
        """Append tokens [rows, n] to every row; return the logits [rows, n, vocab] after each."""
        rows, count = ids.shape
        self._length += count
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, self._length), np.int64),
            "logits_to_keep": np.array([count], np.int64),
            **dict(zip(self._names, self._past, strict=True)),
        }
        try:
            logits, *self._past = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model", error) from error
        return logits.astype(np.float32, copy=False)  # type: ignore[no-any-return]
