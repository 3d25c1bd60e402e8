# ruff: noqa: N802, N815 (the names are NVIDIA's)
"""The module of cuda-bindings on memory of the CPU, which checks how it is used.

Work on a stream waits until something waits for the stream, as on a GPU: who reads or writes too early gets wrong
numbers. Fresh memory is NaN. Every copy has to lie inside one allocation of the right kind.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256


class cudaError_t(IntEnum):  # noqa: N801
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):  # noqa: N801
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


KINDS = {1: ("host", "device"), 2: ("device", "host"), 3: ("device", "device")}
OK = cudaError_t.cudaSuccess


@dataclass
class Allocation:
    memory: np.ndarray
    address: int
    size: int
    kind: str


@dataclass(frozen=True)
class Handle:
    """A stream or a graph, which cuda-bindings hands out as objects that are numbers as well."""

    number: int

    def __int__(self) -> int:
        return self.number


@dataclass
class FakeCuda:
    """One GPU. total: bytes of its memory; no_capture: recordings are refused; missing: why there is no GPU."""

    name: str = "Orin"
    capability: tuple[int, int] = (8, 7)
    total: int = 1 << 30
    no_capture: bool = False
    missing: cudaError_t | None = None
    allocations: dict[int, Allocation] = field(default_factory=dict)
    handles: dict[int, Any] = field(default_factory=dict)
    queue: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None
    calls: list[str] = field(default_factory=list)

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)

    @property
    def live(self) -> int:
        """How many things were not given back."""
        return len(self.allocations) + len(self.handles)

    @property
    def used(self) -> int:
        return sum(one.size for one in self.allocations.values() if one.kind == "device")

    def cudaGetDeviceCount(self):
        return (self.missing, None) if self.missing else (OK, 1)

    def cudaSetDevice(self, device):
        return (OK,)

    def cudaGetErrorString(self, error):
        return OK, error.name.removeprefix("cudaError").encode()

    def cudaGetLastError(self):
        self.calls.append("cudaGetLastError")
        return (OK,)

    def cudaDriverGetVersion(self):
        return OK, 12060

    def cudaDeviceGetAttribute(self, attribute, device):
        return OK, self.capability[attribute]

    def cudaGetDeviceProperties(self, device):
        return OK, SimpleNamespace(name=self.name.encode() + b"\0\0")

    def cudaMemGetInfo(self):
        return OK, self.total - self.used, self.total

    def cudaMalloc(self, size):
        if self.used + size > self.total:
            return cudaError_t.cudaErrorMemoryAllocation, 0
        return OK, self._allocate(size, "device")

    def cudaHostAlloc(self, size, flags):
        return OK, self._allocate(size, "host")

    def cudaFree(self, address):
        return self._free(address, "device")

    def cudaFreeHost(self, address):
        return self._free(address, "host")

    def cudaStreamCreateWithFlags(self, flags):
        return OK, self._handle([])

    def cudaStreamDestroy(self, stream):
        self.cudaStreamSynchronize(stream)
        del self.handles[int(stream)]
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        assert self.recording is None, "a stream cannot be waited for while it is recorded"
        work, self.queue = self.queue, []
        for one in work:
            one()
        return (OK,)

    def cudaMemsetAsync(self, address, value, size, stream):
        self._enqueue("memset", lambda: self._view(address, size, "device").fill(value))
        return (OK,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self._enqueue(kind.name, lambda: self._copy(target, source, size, kind))
        return (OK,)

    def cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        assert height == 1 or width <= min(target_pitch, source_pitch)
        assert max(target_pitch, source_pitch) < 1 << 31

        def rows() -> None:
            for row in range(height):
                self._copy(target + row * target_pitch, source + row * source_pitch, width, kind)

        self._enqueue("copy2D", rows)
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self.recording is None
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.recording = self.recording, None
        if self.no_capture or recorded is None:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        self.calls.append("capture")
        return OK, self._handle(recorded)

    def cudaGraphInstantiate(self, graph, flags):
        return OK, self._handle(self.handles[int(graph)])

    def cudaGraphDestroy(self, graph):
        del self.handles[int(graph)]
        return (OK,)

    def cudaGraphExecDestroy(self, graph):
        del self.handles[int(graph)]
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):
        assert self.recording is None
        self.calls.append("launch")
        self.queue += self.handles[int(graph)]
        return (OK,)

    def put(self, name: str, work: Callable[[], None]) -> None:
        """Put something on the stream that is no call of CUDA."""
        self._enqueue(name, work)

    def view(self, address: int, size: int) -> np.ndarray:
        """Memory of the GPU, which all has to lie in one allocation."""
        return self._view(address, size, "device")

    def _enqueue(self, name: str, work: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(work)
            return
        self.calls.append(name)
        self.queue.append(work)

    def _handle(self, value: Any) -> Handle:
        handle = Handle(max(self.handles, default=1) + 1)
        self.handles[int(handle)] = value
        return handle

    def _allocate(self, size: int, kind: str) -> int:
        assert size > 0
        assert self.recording is None, "nothing may be allocated while a stream is recorded"
        memory = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.allocations[address] = Allocation(memory, address, size, kind)
        return address

    def _free(self, address: int, kind: str):
        self.cudaStreamSynchronize(None)  # as CUDA does
        assert self.allocations[address].kind == kind
        del self.allocations[address]
        return (OK,)

    def _view(self, address: int, size: int, kind: str) -> np.ndarray:
        inside = [
            one
            for one in self.allocations.values()
            if one.kind == kind and one.address <= address and address + size <= one.address + one.size
        ]
        assert inside, f"{size} bytes at {address} lie in no memory of the {kind}"
        return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))

    def _copy(self, target: int, source: int, size: int, kind: cudaMemcpyKind) -> None:
        of, to = KINDS[kind]
        assert abs(target - source) >= size or not size, "the two places of a copy overlap"
        self._view(target, size, to)[:] = self._view(source, size, of)
