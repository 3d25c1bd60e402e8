"""The little of CUDA that running an engine takes: memory, copies, one stream, graphs; through NVIDIA's cuda-bindings.

Every call of cuda-bindings returns a tuple whose first item is the error code (cuda.bindings.runtime, 13.5).
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import LlamaExportError
from ...tables import size

# cuda-python called it cuda.cudart up to 12.6.0 (CUDA Python 12.6.1 release notes, "new module layout").
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
INSTALL = "`pip install cuda-bindings`, on JetPack 6 `pip install 'cuda-bindings<13'`"
ALIGNMENT = 256
"""Bytes on which every tensor begins, as memory of cudaMalloc does: no kernel asks for more."""


class CudaError(LlamaExportError):
    """A call of CUDA that failed. code: CUDA's name of the error, "cudaErrorMemoryAllocation"."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def out_of_memory(self) -> bool:
        """Whether the GPU has no room for what was asked."""
        return self.code == "cudaErrorMemoryAllocation"


@dataclass(frozen=True)
class Gpu:
    """A GPU. compute_capability: "8.7"; memory in bytes; driver: the newest CUDA that it runs, "13.2"."""

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int
    driver: str


@dataclass(frozen=True)
class Block:
    """Rows of bytes to copy from one place to another. pitches: bytes from row to row; width: bytes of a row."""

    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width: int
    height: int


class Cuda:
    """The first GPU, and everything that was taken from it until `close`. One stream orders all that is done."""

    def __init__(self) -> None:
        """Raises LlamaExportError when cuda-bindings is not installed, or there is no GPU that it can use."""
        self._runtime = import_runtime()
        self._held: dict[int, tuple[str, Any]] = {}
        count = self._call("find a GPU", "cudaGetDeviceCount", remedy=_NO_GPU)
        if not count:
            raise LlamaExportError(f"CUDA finds no GPU here; {_NO_GPU}.")
        self._call("use the GPU", "cudaSetDevice", 0)
        self._stream = self._call("make a stream", "cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self._held[self.stream] = ("cudaStreamDestroy", self._stream)

    def close(self) -> None:
        """Give everything back, the last first."""
        for held in reversed(tuple(self._held)):
            self.release(held)

    def release(self, held: int) -> None:
        """Give back one thing: memory by its address, a recording by what `capture` returned."""
        name, handle = self._held.pop(held)
        getattr(self._runtime, name)(handle)  # its error is not asked for: nothing could be done about it

    def gpu(self) -> Gpu:
        """What the GPU is, and how much of it is free now."""
        attribute = self._runtime.cudaDeviceAttr
        major, minor = (
            self._call("ask the GPU", "cudaDeviceGetAttribute", which, 0)
            for which in (attribute.cudaDevAttrComputeCapabilityMajor, attribute.cudaDevAttrComputeCapabilityMinor)
        )
        name = self._call("ask the GPU", "cudaGetDeviceProperties", 0).name
        free, total = self._call("ask the GPU", "cudaMemGetInfo")
        driver = self._call("ask the driver", "cudaDriverGetVersion")
        text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        told = f"{driver // 1000}.{driver % 1000 // 10}"  # 13020 is 13.2
        return Gpu(text.strip("\0 "), f"{major}.{minor}", total, free, told)

    def allocate(self, count: int, purpose: str) -> int:
        """The address of `count` bytes on the GPU, all zero. Raises CudaError, told with the purpose, without room."""
        try:
            address = int(self._call(f"hold {size(count)} for {purpose}", "cudaMalloc", max(count, 1)))
        except CudaError as error:
            if not error.out_of_memory:
                raise
            gpu = self.gpu()
            raise CudaError(
                f"{gpu.name} has {size(gpu.free_bytes)} free of {size(gpu.total_bytes)}, but {purpose} takes "
                f"{size(count)}; end what else uses it, or build with a smaller --context.",
                error.code,
            ) from error
        self._held[address] = ("cudaFree", address)
        self._call("clear memory", "cudaMemsetAsync", address, 0, max(count, 1), self._stream)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Zeros in memory of the CPU that the GPU copies from and to by itself; to release by `ctypes.data`."""
        kind = np.dtype(dtype)
        count = max(math.prod(shape) * kind.itemsize, 1)
        flags = self._runtime.cudaHostAllocDefault
        address = int(self._call(f"pin {size(count)} of memory", "cudaHostAlloc", count, flags))
        self._held[address] = ("cudaFreeHost", address)
        memory = (ctypes.c_byte * count).from_address(address)
        array: npt.NDArray[Any] = np.frombuffer(memoryview(memory), kind, math.prod(shape)).reshape(shape)
        array[...] = 0
        return array

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        """Copy pinned memory to the GPU, when its turn comes."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("copy to the GPU", "cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy from the GPU to pinned memory, when its turn comes."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(
            "copy from the GPU", "cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, self._stream
        )

    def copy(self, block: Block) -> None:
        """Copy rows from one place on the GPU to another that they do not overlap, when its turn comes."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        rows = (block.target, block.target_pitch, block.source, block.source_pitch, block.width, block.height)
        self._call("copy on the GPU", "cudaMemcpy2DAsync", *rows, kind, self._stream)

    def wait(self) -> None:
        """Return when the GPU has done all that it was told."""
        self._call("finish", "cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> int:
        """Record what `work` puts on the stream, without doing it; return what `launch` does it all by.

        Whatever `work` raises passes through; CudaError when it did what cannot be recorded. The stream is as before.
        """
        runtime = self._runtime
        # Only this thread's calls are held to the rules of a capture.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("record a step", "cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            _, graph = runtime.cudaStreamEndCapture(self._stream)
            if graph is not None and int(graph):
                runtime.cudaGraphDestroy(graph)
            runtime.cudaGetLastError()  # or the next call of a library would be blamed for it
            raise
        try:
            graph = self._call("record a step", "cudaStreamEndCapture", self._stream)
        except CudaError:
            runtime.cudaGetLastError()
            raise
        try:
            ready = self._call("prepare a step", "cudaGraphInstantiate", graph, 0)
        finally:
            self._call("forget a recording", "cudaGraphDestroy", graph)
        recording = int(ready)
        self._held[recording] = ("cudaGraphExecDestroy", ready)
        return recording

    def launch(self, recording: int) -> None:
        """Do what was recorded, when its turn comes."""
        self._call("run a step", "cudaGraphLaunch", self._held[recording][1], self._stream)

    def _call(self, what: str, name: str, *arguments: Any, remedy: str = "") -> Any:
        """Call a function of CUDA; return what it returns beside its error code, a tuple where that is several."""
        code, *values = getattr(self._runtime, name)(*arguments)
        if int(code):
            raise CudaError(f"CUDA cannot {what}: {self._told(code)}{'; ' if remedy else ''}{remedy}.", code.name)
        return values[0] if len(values) == 1 else tuple(values)

    def _told(self, code: Any) -> str:
        _, text = self._runtime.cudaGetErrorString(code)
        return text.decode() if isinstance(text, bytes) else str(text)


_NO_GPU = (
    "an engine needs an NVIDIA GPU and its driver (see `llama-export doctor`), while `--backend onnxruntime` runs the "
    "bundle without"
)


def import_runtime() -> Any:
    """The module of cuda-bindings with CUDA's runtime API. Raises LlamaExportError when it cannot be imported."""
    runtime = next(filter(None, map(_imported, _MODULES)), None)
    if runtime is None:
        raise LlamaExportError(f"CUDA for Python is not installed; {INSTALL}.")
    return runtime


def _imported(name: str) -> Any:
    """A module, None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # a broken installation raises what its parts raise
        raise LlamaExportError(
            f"CUDA for Python is installed but does not work ({type(error).__name__}: {error}); {INSTALL}."
        ) from error
