"""A bundle's graph with its inner values as outputs, run piece by piece in full precision on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ...names import ORT, TRT
from ...runtime.arrays import Float32, Int64
from ...runtime.bundle import CPU_PROVIDER, Bundle
from ...runtime.recipe import IDS, KEPT, POSITIONS
from ...runtime.session import PAST, PRESENT, cache_names, engine_name, import_onnxruntime, one_sentence, open_session


@dataclass(frozen=True)
class Piece:
    """Tokens of the text that run in one call: `count` from position `first` on. name: of its pass."""

    name: str
    first: int
    count: int

    @property
    def stop(self) -> int:
        return self.first + self.count


class Probe:
    """One text of at most `length` tokens through the graph `model`, whose values `exposed` can be asked for."""

    def __init__(
        self, bundle: Bundle, model: onnx.ModelProto, exposed: Sequence[str], *, length: int, threads: int
    ) -> None:
        """Raises LlamaExportError as `open_session` does."""
        bundle = replace(bundle, manifest=replace(bundle.manifest, providers=(CPU_PROVIDER,)))
        self._manifest, self._ort = bundle.manifest, import_onnxruntime(bundle.manifest)
        self.name = engine_name(self._ort, bundle.manifest)
        self._session = open_session(bundle, _exposing(model, exposed), threads, exact=True)
        self._dialect, self._names = bundle.manifest.dialect, cache_names(bundle.manifest.shape)
        self._length = bundle.manifest.limits.context if self._dialect == TRT else length
        self._cache: dict[str, npt.NDArray[Any]] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the text."""
        shape = self._manifest.shape
        heads = {value.name: value.shape for value in self._session.get_inputs()}
        length = 0 if self._dialect == ORT else self._length
        self._cache = {
            name: np.zeros((1, shape.kv_heads, length, heads[PAST + name][3]), np.dtype(shape.activations))
            for name in self._names
        }

    def run(self, ids: Int64, piece: Piece, wanted: Sequence[str]) -> dict[str, Float32]:
        """Run the tokens `ids` [count] of the next piece; return the values `wanted` without their batch axis.

        Of the cache, `present.N.key|value`, the rows of all tokens so far: [kv_heads, piece.stop, head_dim].
        """
        feeds = {**self._inputs(ids[None], piece), **{PAST + name: value for name, value in self._cache.items()}}
        plain = [name for name in wanted if not name.startswith(PRESENT)]
        try:
            found = self._bound(feeds, plain)
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model", error) from error
        cached = {PRESENT + name: value[0, :, : piece.stop] for name, value in self._cache.items()}
        values = {name: found[name][0] if name in found else cached[name] for name in wanted}
        return {name: value.astype(np.float32) for name, value in values.items()}  # copies: the cache goes on

    def _inputs(self, ids: Int64, piece: Piece) -> dict[str, npt.NDArray[Any]]:
        new = np.arange(piece.count, dtype=np.int64)[None]
        if self._dialect == ORT:
            mask, keep = np.ones((1, piece.stop), np.int64), np.array([piece.count], np.int64)
            return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": keep}
        return {IDS: ids, POSITIONS: new + piece.first, KEPT: new}

    def _bound(self, feeds: Mapping[str, npt.NDArray[Any]], plain: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Run, and take the cache over; return the values `plain`."""
        binding, make = self._session.io_binding(), self._ort.OrtValue.ortvalue_from_numpy
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, make(np.ascontiguousarray(value)))
        for name in plain:
            binding.bind_output(name, "cpu")
        for name in self._names:
            if self._dialect == TRT:  # in place, as TensorScatter would copy a buffer as long as the context
                binding.bind_ortvalue_output(PRESENT + name, make(self._cache[name]))
            else:
                binding.bind_output(PRESENT + name, "cpu")
        self._session.run_with_iobinding(binding)
        found = [value.numpy() for value in binding.get_outputs()]
        if self._dialect != TRT:
            for name, present in zip(self._names, found[len(plain) :], strict=True):
                self._take(name, present, feeds)
        return dict(zip(plain, found, strict=False))

    def _take(self, name: str, present: npt.NDArray[Any], feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        if self._dialect == ORT:
            self._cache[name] = present
            return
        first, count = int(feeds[POSITIONS][0, 0]), present.shape[2]
        self._cache[name][:, :, first : first + count] = present


def _exposing(model: onnx.ModelProto, exposed: Sequence[str]) -> bytes:
    """The graph with more outputs, whose types ONNX Runtime infers."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    outputs = {value.name for value in changed.graph.output}
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in exposed if name not in outputs)
    serialized: bytes = changed.SerializeToString()
    return serialized
