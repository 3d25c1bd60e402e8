"""Another tool's graph in ONNX Runtime, token by token and in pieces, with the cache handed from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import LlamaExportError
from ...arrays import Float32, Int64
from ...onnx_file import with_accuracy_level
from ...session import one_sentence, onnxruntime_module
from ...threads import choose_threads
from ..replayer import CacheView
from .folder import ForeignFolder
from .graph import Port

MOST_ROWS, MOST_CHUNK = 8, 1024
"""Texts at once, and tokens of a text in one call: their logits have to fit into memory."""

_SILENT = 4  # ONNX Runtime's severity "fatal": its errors arrive as exceptions
_DEAD = -1


class ForeignReplayer:
    """A `Replayer` of a foreign folder. notes: what it could not ask of this graph, sentences for people.

    Every slot of the cache holds a token at its position, or nothing that counts. GroupQueryAttention takes a token's
    slot for its position. Other graphs append all rows' tokens side by side and are told by the mask which of the slots
    count, so after texts of different lengths a row's slots have gaps.
    """

    def __init__(self, folder: ForeignFolder, *, threads: int | None = None, exact: bool = False) -> None:
        """exact: with kernels that compute in full precision, where the graph leaves that open. Raises UsageError when
        `threads` is out of range, LlamaExportError when ONNX Runtime cannot be imported or cannot load the graph.
        """
        self._folder, self._signature = folder, folder.signature
        self._ort = onnxruntime_module()
        self._session = _open(self._ort, folder, choose_threads(threads), exact=exact)
        self.name = f"onnxruntime {self._ort.__version__} cpu"
        self.vocab, self.context = folder.vocab, folder.context
        self.chunk = min(self.context, MOST_CHUNK)
        self.most_rows = MOST_ROWS if takes_padding(folder) else 1
        self.notes = (*folder.notes, *_notes(folder, self.most_rows))
        self._past: list[npt.NDArray[Any]] = []
        self._names = [port.name for pair in self._signature.past for port in pair]
        presents = [name for pair in self._signature.present for name in pair]
        self._outputs = [self._signature.logits.name, *presents]
        self.begin(1)

    def begin(self, rows: int) -> None:
        """See `Replayer.begin`."""
        sizes = (rows, self._folder.kv_heads, 0, self._folder.head_dim)
        self._places = np.zeros((rows, 0), np.int64)
        self._past = [np.zeros(sizes, self._folder.cache_dtype)] * len(self._names)

    def run(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.run`."""
        if self._signature.last_only and ids.shape[1] > 1:
            return self._one_by_one(ids, firsts, counts)
        return self._call(ids, np.asarray(firsts, np.int64), np.asarray(counts, np.int64))

    def last(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.last`; of all logits, as tools differ in what their graphs can be asked for."""
        logits: Float32 = self.run(ids, firsts, counts)[np.arange(len(counts)), np.asarray(counts) - 1]
        return logits

    def cache(self, layer: int) -> CacheView:
        """See `Replayer.cache`."""
        return CacheView(self._in_order(self._past[2 * layer]), self._in_order(self._past[2 * layer + 1]))

    def _one_by_one(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """For graphs that give logits of the last token alone. Texts that have ended run their last token again."""
        begin, count = np.asarray(firsts, np.int64), np.asarray(counts, np.int64)
        rows = np.arange(len(ids))
        single, logits = np.ones_like(count), []
        for step in range(ids.shape[1]):
            now = np.minimum(step, count - 1)
            logits.append(self._call(ids[rows, now][:, None], begin + now, single))
        if (count == ids.shape[1]).all():  # the last token's logits by the way of many tokens at once, too
            logits[-1] = self._call(ids, begin, count)
        return np.concatenate(logits, axis=1)

    def _call(self, ids: Int64, firsts: Int64, counts: Int64) -> Float32:
        """One run of the graph. firsts, counts: [rows]."""
        rows, count = ids.shape
        steps = np.arange(count, dtype=np.int64)[None]
        inside = steps < counts[:, None]
        positions = firsts[:, None] + np.minimum(steps, counts[:, None] - 1)
        new = np.where(inside, positions, _DEAD)
        kept = self._kept(firsts)
        places = np.concatenate([self._places[:, :kept], new], axis=1)
        if self._folder.grouped:
            kept = int(firsts.max())
            slots = np.arange(kept + count, dtype=np.int64)[None]
            places = np.where(slots < (firsts + counts)[:, None], slots, _DEAD)
        feeds = self._feeds(ids, positions, places >= 0, kept)
        try:
            logits, *present = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise one_sentence(self._ort, f"cannot run {self._folder.graph}", error) from error
        given = 1 if self._signature.last_only else count
        if logits.size != rows * given * self.vocab or any(one.shape[2] < places.shape[1] for one in present):
            raise LlamaExportError(
                f"{self._folder.graph} was given {count} tokens and a cache of {kept}, but returned logits of "
                f"{logits.shape} and a cache of {present[0].shape}; it is no decoder that can be compared."
            )
        self._past, self._places = present, places
        return np.asarray(logits, np.float32).reshape(rows, given, self.vocab)

    def _kept(self, firsts: Int64) -> int:
        """Forget what was run from `firsts` on; return up to which slot any is left."""
        self._places = np.where(self._places < firsts[:, None], self._places, _DEAD)
        used = np.flatnonzero((self._places >= 0).any(axis=0))
        return int(used[-1]) + 1 if used.size else 0

    def _feeds(self, ids: Int64, positions: Int64, mask: npt.NDArray[np.bool_], kept: int) -> dict[str, Any]:
        """What the graph is given. mask: [rows, kept + new]."""
        found = self._signature
        past = [np.ascontiguousarray(one[:, :, :kept]) for one in self._past]
        if found.branch is not None and kept == 0:  # the branch without a cache takes one of any content
            past = [np.zeros((*one.shape[:2], 1, one.shape[3]), one.dtype) for one in past]
        feeds = dict(zip(self._names, past, strict=True))
        given: list[tuple[Port | None, npt.NDArray[Any]]] = [
            (found.ids, ids),
            (found.mask, mask),
            (found.positions, positions),
        ]
        for port, value in given:
            if port is not None:
                feeds[port.name] = value.astype(port.dtype)
        if found.branch is not None:
            feeds[found.branch.name] = np.array([kept > 0])
        if found.keep is not None:
            feeds[found.keep.name] = np.full((1,) * len(found.keep.dims), ids.shape[1], found.keep.dtype)
        return feeds

    def _in_order(self, part: npt.NDArray[Any]) -> Float32:
        """A part of the cache with every row's tokens at their positions, [rows, heads, positions, size]."""
        rows, heads, _, size = part.shape
        result = np.zeros((rows, heads, int(self._places.max(initial=_DEAD)) + 1, size), np.float32)
        for row, places in enumerate(self._places):
            slots = np.flatnonzero(places >= 0)
            result[row][:, places[slots]] = part[row][:, slots]
        return result


def _open(ort: Any, folder: ForeignFolder, threads: int, *, exact: bool) -> Any:
    """The session of the folder's graph on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _SILENT
    # Of the products that ONNX Runtime itself makes of DequantizeLinear and MatMul; 4 is its own default.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0" if exact else "4")
    graph: str | bytes = str(folder.graph)
    try:
        if exact and folder.blockwise:
            graph = with_accuracy_level(folder.graph.read_bytes(), 0)
            where = str(folder.graph.parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", where)
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except LlamaExportError:
        raise
    except Exception as error:  # whatever a graph of unknown origin makes of it
        raise one_sentence(ort, f"cannot load {folder.graph}", error) from error


def takes_padding(folder: ForeignFolder) -> bool:
    """Whether the graph can be told of texts that end sooner. One that is asked for the last logits may count them from
    a text's end or from the padding's.
    """
    found = folder.signature
    return found.mask is not None and found.keep is None and (folder.grouped or folder.has_positions)


def _notes(folder: ForeignFolder, most_rows: int) -> list[str]:
    notes = []
    if not folder.full_precision:
        notes.append("Kernels of this graph round activations to 8 bits, and cannot be asked in full precision.")
    if folder.signature.last_only:
        notes.append(
            "The graph gives logits of the last token alone, so prompts ran token by token, and in one piece only to "
            "their last token."
        )
    if most_rows == 1:
        notes.append(
            "The graph cannot be told where a shorter text ends, so texts of different lengths did not run together."
        )
    return notes
