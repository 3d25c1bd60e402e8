"""An `ort` bundle on an NVIDIA GPU: prompts as on the CPU, single tokens from a CUDA graph.

A step of a small model is hundreds of short kernels, and starting them takes longer than they run. Recorded once as a
CUDA graph, they are started as one. A recording has the addresses and shapes of its inputs and outputs in it: these
stay where they are, and the mask is as long as the cache, with zeros behind the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LlamaExportError
from .backend import OnnxRuntimeBackend
from .bundle import Bundle
from .session import PAST, PRESENT, one_sentence

RECORDING: Mapping[str, str] = {"enable_cuda_graph": "1"}
"""The options of the CUDA provider (onnxruntime.ai: CUDA Execution Provider, "Using CUDA Graphs")."""

_GRAPH_ID = "gpu_graph_id"  # onnxruntime_run_options_config_keys.h: -1 neither records nor replays, 0 is reserved


class CudaBackend(OnnxRuntimeBackend):
    """A `Backend` on CUDA. note: why it works without a CUDA graph, a sentence; None where it has one."""

    def __init__(self, bundle: Bundle, **settings: Any) -> None:
        """settings: as of `OnnxRuntimeBackend`, which says what is raised; want of CUDA graphs raises nothing."""
        self.note: str | None = None
        self._graph = b""
        self._steps: CudaSteps | None = None
        self._recorded: dict[str | None, CudaSteps] = {}
        super().__init__(bundle, **settings)
        if self._steps is None:  # adapters have had theirs recorded
            self._record(None)

    def use_adapter(self, name: str | None) -> None:
        """See `OnnxRuntimeBackend.use_adapter`; each adapter has a recording of its own, made when it is first used."""
        super().use_adapter(name)
        self._record(name)

    def _run_one(self, token: int) -> npt.NDArray[Any]:
        if self._steps is None:
            return super()._run_one(token)
        row = self._steps.run(token, self.length)
        self.length += 1  # only now, as in `_run_bound`
        return row

    def _open(self, graph: bytes) -> Any:
        self._graph = graph
        try:
            return Unrecorded(self._ort, self._open_session(graph, RECORDING))
        except LlamaExportError as error:
            self._explain(error)
            return self._open_session(graph)

    def _record(self, adapter: str | None) -> None:
        """Record a step of the first position, whatever is there; without the session's leave, do nothing."""
        if self.note is not None:
            return
        if adapter not in self._recorded:
            failure = self._record_new(adapter)
            if failure is not None:
                self._go_on_without(adapter, failure)
                return
        self._steps = self._recorded[adapter]

    def _record_new(self, adapter: str | None) -> LlamaExportError | None:
        """Why it failed, without the frames that would keep the session alive; None when it did not."""
        try:
            steps = CudaSteps(self, len(self._recorded) + 1)
            steps.run(0, 0)
        except LlamaExportError as error:
            return LlamaExportError(str(error))
        self._recorded[adapter] = steps
        return None

    def _go_on_without(self, adapter: str | None, failure: LlamaExportError) -> None:
        """In a new session: the old one's stream may still be waiting for the end of a recording."""
        self._explain(failure)
        self._steps = None
        self._recorded.clear()
        self._binding = self._session = None  # the GPU need not hold the weights twice
        self._session = self._open_session(self._graph)
        self._binding = self._bind()
        if self._adapter_inputs:
            super().use_adapter(adapter)

    def _explain(self, error: LlamaExportError) -> None:
        reason = str(error).rstrip(".")
        self.note = f"Every token starts its kernels one by one, without a CUDA graph, which is slower: {reason}."


class Unrecorded:
    """A session whose runs are neither recorded nor replayed, though it can do both."""

    def __init__(self, ort: Any, session: Any) -> None:
        self.session = session
        self._options = run_options(ort, -1)

    def run_with_iobinding(self, binding: Any) -> None:
        self.session.run_with_iobinding(binding, self._options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


class CudaSteps:
    """One recording: its inputs and outputs on the GPU, which are changed in place before each replay."""

    def __init__(self, backend: CudaBackend, graph_id: int) -> None:
        """graph_id: from 1, another for every recording of a session. Raises LlamaExportError when the GPU's memory
        does not do.
        """
        self._ort = backend._ort
        self._session = backend._session.session
        self._options = run_options(self._ort, graph_id)
        self._id = np.zeros((1, 1), np.int64)
        self._valid = np.zeros((1, backend.capacity), np.int64)
        self._count = 0
        try:
            self._bind(backend)
        except Exception as error:
            raise one_sentence(self._ort, "cannot take memory for a CUDA graph", error) from error

    def run(self, token: int, length: int) -> npt.NDArray[Any]:
        """Run one token behind `length` others; return the logits [vocab], in the graph's type.

        The first call records. Raises LlamaExportError when ONNX Runtime fails.
        """
        self._id[0, 0] = token
        self._set_count(length + 1)
        try:
            self._ids.update_inplace(self._id)
            self._mask.update_inplace(self._valid)
            self._session.run_with_iobinding(self._binding, self._options)
            row: npt.NDArray[Any] = self._logits.numpy()[0, 0]
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model's CUDA graph", error) from error
        return row

    def _set_count(self, count: int) -> None:
        """Let the mask begin with `count` ones."""
        self._valid[0, self._count : count] = 1
        self._valid[0, count : self._count] = 0
        self._count = count

    def _bind(self, backend: CudaBackend) -> None:
        """Bind everything to the GPU; `logits_to_keep` keeps its default of 1, which lies with the weights."""
        make = self._ort.OrtValue.ortvalue_from_numpy
        self._ids, self._mask = (make(array, backend._device, 0) for array in (self._id, self._valid))
        self._logits = make(np.zeros_like(backend._last), backend._device, 0)
        binding = self._session.io_binding()
        for name, value in (("input_ids", self._ids), ("attention_mask", self._mask), *backend._adapter_values.items()):
            binding.bind_ortvalue_input(name, value)
        for name, value in backend._cache.items():
            binding.bind_ortvalue_input(PAST + name, value)
            binding.bind_ortvalue_output(PRESENT + name, value)
        binding.bind_ortvalue_output("logits", self._logits)
        self._binding = binding
        self._kept = tuple(backend._adapter_values.values())  # the recording reads them for as long as it lives


def run_options(ort: Any, graph_id: int) -> Any:
    """The options of a run that records or replays the CUDA graph of this number; -1 does neither."""
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, str(graph_id))
    return options
