"""Running the graph of an `ort` bundle: one session, and a cache that every call updates in place.

GroupQueryAttention writes the new keys and values into its past buffer when `present.*` is bound to the same memory,
so a step copies nothing. The buffers are as long as the context; `attention_mask` tells how much of them is valid.
Rewinding is therefore only a smaller length, and positions past it are overwritten by the next tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .adapters import Matrices, adapter_inputs, load_adapter, no_adapter
from .arrays import Int64
from .bundle import Bundle, Shape
from .cache import lazy_zeros
from .huge_pages import gathering
from .sequence import SequenceBackend, choose_capacity
from .session import (
    DEVICES,
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


class OnnxRuntimeBackend(SequenceBackend):
    """A `Backend` on ONNX Runtime, CPU or CUDA as the manifest's first provider says; see also `cuda_backend`."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        model: bytes | None = None,
        threads: int | None = None,
        capacity: int | None = None,
        adapter: str | None = None,
    ) -> None:
        """Load the graph.

        model: another graph than the bundle's model.onnx, with the same inputs, outputs and weights. threads: default,
        the physical cores. capacity: tokens that the cache holds; default and at most, the manifest's context. adapter:
        as in `use_adapter`. Raises LlamaExportError as `open_session` does, UsageError when an argument is out of
        range.
        """
        manifest = bundle.manifest
        self.threads = choose_threads(threads)
        super().__init__(
            capacity=choose_capacity(capacity, manifest.limits),
            vocab=manifest.shape.vocab,
            chunk=manifest.limits.prefill_chunk,
        )
        self._ort = import_onnxruntime(manifest)
        self._device = DEVICES[manifest.provider]
        self._bundle = bundle
        self._session = self._open(read_graph(bundle) if model is None else model)
        self.name = engine_name(self._ort, manifest)
        self._ids = np.zeros((1, self._chunk), np.int64)
        self._mask = np.ones((1, self.capacity), np.int64)
        self._keep = np.ones(1, np.int64)
        self._logits_dtype = np.dtype("float16" if "float16" in self._session.get_outputs()[0].type else "float32")
        self._last = np.zeros((1, 1, self.vocab), self._logits_dtype)
        self._cache = self._make_cache(manifest.shape)
        self.matrices: Matrices = {}
        self._adapter_values: dict[str, Any] = {}
        self._adapter_inputs = adapter_inputs(self._session)
        self._binding = self._bind()
        if self._adapter_inputs or adapter is not None:
            self.use_adapter(adapter)

    def use_adapter(self, name: str | None) -> None:
        """Go on as the model with an adapter of the bundle, None for the model itself, and forget the sequence.

        Raises UsageError when the bundle has no such adapter, LlamaExportError when its file is damaged.
        """
        dtype = np.dtype(self._bundle.manifest.shape.activations)
        inputs = self._adapter_inputs
        matrices = no_adapter(inputs, dtype) if name is None else load_adapter(self._bundle, name, inputs)
        make = self._ort.OrtValue.ortvalue_from_numpy
        self._adapter_values = {input_name: make(matrix, self._device, 0) for input_name, matrix in matrices.items()}
        for input_name, value in self._adapter_values.items():
            self._binding.bind_ortvalue_input(input_name, value)
        self.matrices = matrices  # on the CPU the bound values share their memory
        self.length = 0

    def _run(self, tokens: Int64, keep: int) -> npt.NDArray[Any]:
        """Run one chunk; return [keep, vocab] logits in the graph's type."""
        self._ids[0, : len(tokens)] = tokens
        rows: npt.NDArray[Any]
        if keep == 1:
            self._run_bound(len(tokens))
            rows = self._last[0]
            return rows
        try:
            self._bind_keep(keep)
            self._run_bound(len(tokens))
            rows = self._binding.get_outputs()[-1].numpy()[0]  # in the order of the first binding: logits come last
            return rows
        finally:
            self._bind_keep(1)

    def _run_one(self, token: int) -> npt.NDArray[Any]:
        self._ids[0, 0] = token
        self._run_bound(1)
        row: npt.NDArray[Any] = self._last[0, 0]
        return row

    def _run_bound(self, count: int) -> None:
        """Run the first `count` of the prepared ids; the logits go where they are bound."""
        total = self.length + count
        binding = self._binding
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, count), self._ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model", error) from error
        self.length = total  # only now: an interrupted run leaves the sequence as it was

    def _open(self, graph: bytes) -> Any:
        """Load the graph and return its session."""
        return self._open_session(graph)

    def _open_session(self, graph: bytes, provider_options: Mapping[str, str] | None = None) -> Any:
        with gathering():
            return open_session(self._bundle, graph, self.threads, provider_options=provider_options)

    def _bind(self) -> Any:
        binding = self._session.io_binding()
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(PAST + name, value)
            binding.bind_ortvalue_output(PRESENT + name, value)
        self._binding = binding
        self._bind_keep(1)
        return binding

    def _bind_keep(self, keep: int) -> None:
        """Ask for the logits of the last `keep` positions: one into our buffer, more into one of ONNX Runtime's.

        It takes no buffer that is larger than the declared [batch, 1, vocab].
        """
        self._keep[0] = keep
        binding, last = self._binding, self._last
        binding.bind_input("logits_to_keep", "cpu", 0, np.int64, (1,), self._keep.ctypes.data)
        if keep == 1:
            binding.bind_output("logits", "cpu", 0, last.dtype.type, last.shape, last.ctypes.data)
        else:
            binding.bind_output("logits", "cpu")

    def _make_cache(self, shape: Shape) -> dict[str, Any]:
        """Return the buffers of every layer, [1, kv_heads, capacity, head_dim], as OrtValues on the device."""
        sizes, dtype = (1, shape.kv_heads, self.capacity, shape.head_dim), np.dtype(shape.cache_dtype)
        make = self._ort.OrtValue.ortvalue_from_numpy  # on the CPU it shares and keeps the array, elsewhere it copies
        return {name: make(lazy_zeros(sizes, dtype), self._device, 0) for name in cache_names(shape)}
