"""What `doctor` says of TensorRT, TensorRT-RTX and CUDA."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from llama_export.doctor_engines import Engines, engine_rows, engine_verdicts, examine_engines
from llama_export.runtime.tensorrt.cuda import Gpu
from support.fake_tensorrt import RELEASES, fake_module
from support.fake_tensorrt_cuda import FakeCuda, cudaError_t

ORIN = Gpu("Orin", "8.7", 8_000_000_000, 3_100_000_000, "12.6")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_module(RELEASES["10.3"], fake))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    return fake


def test_a_jetson_with_everything(cuda: FakeCuda) -> None:
    found = examine_engines()
    assert found.versions == {"tensorrt": "10.3.0"}
    assert found.gpu is not None
    assert ("TensorRT", "10.3.0") in engine_rows(found)
    assert any(
        name == "CUDA" and "driver for CUDA 12.6, 1.07 GB of 1.07 GB free" in row for name, row in engine_rows(found)
    )
    said = {one.what: one.able for one in engine_verdicts(found, has_gpu=False, is_jetson=True)}
    assert said["build and run engines with TensorRT 10.3.0 on Orin"]
    assert cuda.live == 0


def test_a_jetson_whose_cuda_does_not_start(cuda: FakeCuda) -> None:
    cuda.missing = cudaError_t.cudaErrorInsufficientDriver
    verdict = next(
        one for one in engine_verdicts(examine_engines(), has_gpu=False, is_jetson=True) if "10.3.0" in one.what
    )
    assert not verdict.able
    assert "InsufficientDriver" in verdict.remedy


def test_a_jetson_without_tensorrt() -> None:
    found = Engines({}, {"tensorrt": "TensorRT is not installed; do this.", "tensorrt_rtx": "x"}, None, ORIN, "")
    verdict = engine_verdicts(found, has_gpu=False, is_jetson=True)[0]
    assert (verdict.able, verdict.what, verdict.remedy) == (
        False,
        "engines with TensorRT",
        "TensorRT is not installed; do this.",
    )


def test_a_computer_that_only_builds() -> None:
    found = Engines({"tensorrt_rtx": "1.7.1.116"}, {}, "cuda-bindings 13.5.0", None, "CUDA finds no GPU here.")
    assert engine_rows(found) == [
        ("TensorRT-RTX", "1.7.1.116"),
        ("CUDA", "cuda-bindings 13.5.0, no GPU that it can use"),
    ]
    (verdict,) = engine_verdicts(found, has_gpu=False, is_jetson=False)
    assert (verdict.able, verdict.what) == (
        True,
        "build engines with TensorRT-RTX 1.7.1.116 for other machines; there is no GPU here",
    )
    (verdict,) = engine_verdicts(found, has_gpu=True, is_jetson=False)
    assert (verdict.able, verdict.remedy) == (False, "CUDA finds no GPU here.")


def test_a_computer_without_any_of_it_hears_nothing() -> None:
    found = Engines({}, {}, None, None, "CUDA for Python is not installed.")
    assert engine_rows(found) == engine_verdicts(found, has_gpu=True, is_jetson=False) == []


def test_stubs_are_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    assert "stubs for type checkers" in examine_engines().absent["tensorrt"]
