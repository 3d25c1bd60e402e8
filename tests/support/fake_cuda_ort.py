"""ONNX Runtime as with a GPU, computing on the CPU: values lie on a device, CUDA graphs are recorded and replayed.

As the real one it reads what a recording needs once, when it records: a replay knows no binding, only the addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import onnxruntime
from onnxruntime import ExecutionMode, SessionOptions

CUDA = "CUDAExecutionProvider"
__version__ = onnxruntime.__version__


class OrtValue:
    """A tensor on "cpu" or "cuda"; the latter only ever changes in place."""

    def __init__(self, array: npt.NDArray[Any], device: str) -> None:
        self.array, self.device = array, device
        self.updates = 0

    @classmethod
    def ortvalue_from_numpy(cls, array: npt.NDArray[Any], device: str = "cpu", device_id: int = 0) -> OrtValue:
        assert device_id == 0
        return cls(array if device == "cpu" else array.copy(), device)

    def update_inplace(self, array: npt.NDArray[Any]) -> None:
        assert (array.shape, array.dtype) == (self.array.shape, self.array.dtype)
        self.array[...] = array
        self.updates += 1

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def numpy(self) -> npt.NDArray[Any]:
        return self.array.copy()


class RunOptions:
    def __init__(self) -> None:
        self.graph_id = 0

    def add_run_config_entry(self, key: str, value: str) -> None:
        assert key == "gpu_graph_id"
        self.graph_id = int(value)


class Binding:
    """Passes everything on to the real binding, and remembers what lies on the device."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.real = session.io_binding()
        self.on_device: dict[str, OrtValue] = {}

    def bind_ortvalue_input(self, name: str, value: OrtValue) -> None:
        self.on_device[name] = value
        self.bind_input(name, "cpu", 0, value.array.dtype.type, value.array.shape, value.data_ptr())

    def bind_ortvalue_output(self, name: str, value: OrtValue) -> None:
        self.on_device[name] = value
        self.real.bind_output(name, "cpu", 0, value.array.dtype.type, value.array.shape, value.data_ptr())

    def bind_input(self, name: str, *where: Any) -> None:
        self.real.bind_input(name, *where)

    def bind_output(self, name: str, *where: Any) -> None:
        self.real.bind_output(name, *where)

    def get_outputs(self) -> Any:
        return self.real.get_outputs()


@dataclass
class FakeOrt:
    """The module. refuses: the session cannot have CUDA graphs; fails: recording one fails.

    sessions: those made, with their provider options; runs: the graph id of every run, "recorded" or "replayed" where
    it was.
    """

    refuses: bool = False
    fails: bool = False
    sessions: list[Session] = field(default_factory=list)
    runs: list[tuple[int, str]] = field(default_factory=list)
    OrtValue: type = OrtValue
    RunOptions: type = RunOptions
    SessionOptions: type = SessionOptions
    ExecutionMode: type = ExecutionMode
    __version__: str = __version__

    def get_available_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def disable_telemetry_events(self) -> None:
        """As the real one, when there is nothing to disable."""

    def InferenceSession(self, graph: bytes, options: Any, **settings: Any) -> Session:  # noqa: N802 (its name)
        session = Session(self, graph, options, **settings)
        self.sessions.append(session)
        return session


class Session:
    def __init__(self, ort: FakeOrt, graph: bytes, options: Any, *, providers: list[Any], enable_fallback: int) -> None:
        assert not enable_fallback, "it prints to stdout and takes the CPU"
        (name, self.options), *_ = [one if isinstance(one, tuple) else (one, {}) for one in providers]
        assert name == CUDA
        self.records = self.options == {"enable_cuda_graph": "1"}
        if self.records and ort.refuses:
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user as all compute graph nodes "
                "have not been partitioned to the CUDAExecutionProvider"
            )
        self.ort = ort
        self.real = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.recorded: dict[int, tuple[Binding, dict[str, int]]] = {}

    def get_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def io_binding(self) -> Binding:
        return Binding(self.real)

    def run_with_iobinding(self, binding: Binding, options: RunOptions | None = None) -> None:
        graph_id = options.graph_id if options is not None else 0
        if not self.records:
            assert graph_id == 0
            self._run(binding, graph_id, "plain")
        elif graph_id == -1:
            self._run(binding, graph_id, "plain")
        elif graph_id not in self.recorded:
            self._record(binding, graph_id)
        else:
            replayed, addresses = self.recorded[graph_id]
            assert replayed is binding, "a replay would not see another binding"
            assert addresses == {name: value.data_ptr() for name, value in replayed.on_device.items()}
            self._run(replayed, graph_id, "replayed")

    def _record(self, binding: Binding, graph_id: int) -> None:
        assert graph_id > 0, "0 is reserved"
        if self.ort.fails:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing\nand more lines")
        assert {value.device for value in binding.on_device.values()} == {"cuda"}
        inputs = {value.name for value in self.real.get_inputs()}
        outputs = {value.name for value in self.real.get_outputs()}
        assert inputs | outputs <= binding.on_device.keys(), "a recording copies nothing to or from the CPU"
        for _ in range(3):  # the real one also runs a step several times before it has recorded it
            self._run(binding, graph_id, "recorded")
        self.recorded[graph_id] = binding, {name: value.data_ptr() for name, value in binding.on_device.items()}

    def _run(self, binding: Binding, graph_id: int, how: str) -> None:
        self.real.run_with_iobinding(binding.real)
        self.ort.runs.append((graph_id, how))
