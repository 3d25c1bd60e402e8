"""The layer over CUDA: with the real bindings as far as they go without a GPU, the rest on the fake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.runtime.tensorrt.cuda import Block, Cuda, CudaError, import_runtime
from support.fake_tensorrt_cuda import FakeCuda

CALLS: dict[str, Callable[[Cuda], object]] = {
    "gpu": lambda cuda: cuda.gpu(),
    "allocate": lambda cuda: cuda.allocate(10, "a test"),
    "pinned": lambda cuda: cuda.pinned((2, 3), np.float16),
    "upload": lambda cuda: cuda.upload(256, np.zeros(3)),
    "download": lambda cuda: cuda.download(np.zeros(3), 256),
    "copy": lambda cuda: cuda.copy(Block(256, 64, 1024, 32, 32, 4)),
    "wait": lambda cuda: cuda.wait(),
    "capture": lambda cuda: cuda.capture(lambda: None),
    "launch": lambda cuda: cuda.launch(7),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_real_bindings_take_our_arguments(name: str) -> None:
    """Without a GPU every call fails, but one with wrong arguments fails with TypeError."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings are not installed")
    if not int(runtime.cudaGetDeviceCount()[0]):
        pytest.skip("this machine has a GPU: test_tensorrt_gpu.py says more")
    cuda = Cuda.__new__(Cuda)  # its start would already fail
    cuda._runtime, cuda._stream = runtime, runtime.cudaStream_t(0)
    cuda._held = {7: ("cudaGraphExecDestroy", runtime.cudaGraphExec_t(7))}
    with pytest.raises(CudaError, match=r"^CUDA cannot .*\.$") as caught:
        CALLS[name](cuda)
    assert caught.value.code.startswith("cudaError")
    cuda.release(7)


def test_the_start_says_what_an_engine_needs() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings are not installed")
    if not int(runtime.cudaGetDeviceCount()[0]):
        pytest.skip("this machine has a GPU")
    with pytest.raises(LlamaExportError, match="an engine needs an NVIDIA GPU and its driver"):
        Cuda()


def test_a_computer_without_a_single_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda())
    monkeypatch.setattr(FakeCuda, "cudaGetDeviceCount", lambda self: (self.cudaError_t.cudaSuccess, 0))
    with pytest.raises(LlamaExportError, match="CUDA finds no GPU here"):
        Cuda()


def test_bindings_that_are_broken_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> None:
            if name.startswith("cuda"):
                raise RuntimeError("libcudart.so.12 is a picture")

    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(LlamaExportError, match=r"does not work \(RuntimeError: libcudart.so.12 is a picture\)"):
        import_runtime()


@pytest.mark.parametrize("ends", [KeyboardInterrupt, LlamaExportError])
def test_what_ends_a_recording_leaves_the_stream_as_it_was(
    ends: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    cuda = Cuda()

    def work() -> None:
        raise ends

    with pytest.raises(ends):
        cuda.capture(work)
    assert fake.recording is None
    cuda.launch(cuda.capture(lambda: None))
    cuda.wait()
    cuda.close()
    assert fake.live == 0
