"""Columns of stored matrices, read in stripes that are wide enough for the disk and kept while neighbours are wanted.

GPTQ and AWQ store weights transposed: a few outputs of a layer are a few columns of its file's matrix, thousands of
short pieces far apart. A stripe of many columns costs hardly more reads, and serves the steps that come next.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from ..safetensors_file import StoredTensor

_STRIPE = 1 << 24
"""Bytes of a stripe: rows of a thousand bytes and more even in the largest Llama."""
_KEPT = 1 << 26
"""Bytes of stripes that one checkpoint keeps: what two threads read at the border of two stripes, and room."""

Array = npt.NDArray[Any]


class Stripes:
    """The stripes of one checkpoint that were read last; used from several threads at once."""

    def __init__(self, *, stripe: int = _STRIPE, kept: int = _KEPT) -> None:
        self.stripe, self._most = stripe, kept
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, int], tuple[Future[Array], int]] = OrderedDict()

    def get(self, key: tuple[str, int], size: int, read: Callable[[], Array]) -> Array:
        """The stripe of this key: one that is kept, or what `read` gives (`size` bytes), which is called once."""
        with self._lock:
            known = self._found.get(key)
            future: Future[Array] = Future() if known is None else known[0]
            self._found[key] = (future, size)
            self._found.move_to_end(key)
            while len(self._found) > 1 and sum(kept for _, kept in self._found.values()) > self._most:
                self._found.popitem(last=False)
        if known is None:
            try:
                future.set_result(read())
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._found.pop(key, None)
        return future.result()


class Columns:
    """Columns of one stored matrix through the stripes of its checkpoint."""

    def __init__(self, stored: StoredTensor, stripes: Stripes) -> None:
        self._stored, self._stripes = stored, stripes
        rows, self._width = stored.shape
        self._row = max(1, rows) * stored.array(0, 0).itemsize  # bytes of a column
        self._step = max(1, min(self._width, stripes.stripe // self._row))

    def __call__(self, start: int, stop: int) -> Array:
        """Columns [start, stop) as stored: [rows, stop - start]."""
        parts = []
        while start < stop:
            index = start // self._step
            first, last = index * self._step, min(self._width, (index + 1) * self._step)
            stripe = self._stripes.get(
                (self._stored.name, index),
                (last - first) * self._row,
                lambda first=first, last=last: self._stored.columns(first, last),  # type: ignore[misc]
            )
            end = min(stop, last)
            parts.append(stripe[:, start - first : end - first])
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
