"""What the other tests do on a fake, on a GPU where there is one: CUDA, and engines of the library that is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.progress import Silent
from llama_export.runtime.bundle import Bundle, EngineRecord, Limits
from llama_export.runtime.executor import StepBackend
from llama_export.runtime.ort_executors import onnxruntime_executor
from llama_export.runtime.recipe import read_recipe
from llama_export.runtime.tensorrt import EngineFile, TensorRTExecutor
from llama_export.runtime.tensorrt.api import import_module
from llama_export.runtime.tensorrt.cuda import Block, Cuda
from llama_export.runtime.tensorrt.engine_label import engine_label
from support.tiny_bundle import random_llama
from support.tiny_tensorrt import recipe_for, write_tensorrt_bundle

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    try:
        one = Cuda()
    except LlamaExportError as error:
        pytest.skip(str(error))
    yield one
    one.close()


def module_or_skip(name: str) -> Any:
    try:
        return import_module(name)
    except LlamaExportError as error:
        pytest.skip(str(error))


def test_memory_copies_and_recordings(cuda: Cuda) -> None:
    gpu = cuda.gpu()
    assert gpu.name
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    source, target = cuda.pinned((6, 5), np.float16), cuda.pinned((6, 5), np.float16)
    packed, spread = cuda.allocate(source.nbytes, "a test"), cuda.allocate(6 * 64, "a test")
    assert packed % 256 == spread % 256 == 0

    def work() -> None:
        cuda.upload(packed, source)
        cuda.copy(Block(spread, 64, packed, 10, 10, 6))
        cuda.copy(Block(packed, 10, spread, 64, 10, 6))
        cuda.download(target, packed)

    source[...] = np.arange(30).reshape(6, 5)
    work()
    cuda.wait()
    assert np.array_equal(target, source)
    recorded = cuda.capture(work)
    source[...] += 1
    cuda.launch(recorded)
    cuda.wait()
    assert np.array_equal(target, source)
    cuda.release(recorded)


@pytest.mark.parametrize(
    ("module", "dialect"), [("tensorrt_rtx", "trt"), ("tensorrt", "trt"), ("tensorrt", "trt-primitive")]
)
def test_texts_are_those_of_onnxruntime(module: str, dialect: str, cuda: Cuda, tmp_path: Path) -> None:
    trt = module_or_skip(module)
    if dialect == "trt" and module == "tensorrt" and not hasattr(trt, "KVCacheMode"):
        pytest.skip("this TensorRT has no TensorScatter")
    bundle, plan = built(tmp_path, module, dialect, trt.__version__, cuda.gpu().compute_capability)
    executor = TensorRTExecutor(bundle, EngineFile(plan, module, trt.__version__, tmp_path / "kernels", True))
    ours, theirs = StepBackend(bundle, executor), StepBackend(bundle, onnxruntime_executor(bundle))
    prompt = [256, *(index * 7 % 256 for index in range(250))]
    for ids in (prompt, prompt[:9]):
        ours.rewind(0)
        theirs.rewind(0)
        pairs = [(ours.extend(ids, 3), theirs.extend(ids, 3))]
        for token in range(20):
            pairs.append((ours.step(token).copy(), theirs.step(token).copy()))  # noqa: PERF401 (in turns)
        assert max(np.abs(found - expected).max() for found, expected in pairs) < 0.2
    executor.close()


def built(folder: Path, module: str, dialect: str, version: str, capability: str) -> tuple[Bundle, Path]:
    """A tiny bundle, and its engine made by the builder."""
    from llama_export.targets.engine_process import Job, run_builder

    if importlib.util.find_spec("polygraphy") is None:
        pytest.skip("building engines takes polygraphy")
    release = ".".join(version.split(".")[:3])
    bundle = write_tensorrt_bundle(
        folder / "bundle",
        dialect,
        random_llama(positions=600, head_dim=64),
        dtype="float16",
        context=600,
        backend=module.replace("_", "-"),
        engine=EngineRecord(module, release),
        limits=Limits(600, 1, 128),
    )
    recipe = read_recipe(bundle)
    assert recipe.profiles == recipe_for(bundle.manifest).profiles
    files = bundle.manifest.files
    label = engine_label(files["model.onnx"].sha256, files["model.onnx.data"].sha256)
    changed = type(recipe)(**{**vars(recipe), "compute_capability": (capability,)})
    job = Job(bundle.path / "model.onnx", label, changed, folder / "plan", folder / "log")
    run_builder(job, Silent())
    return bundle, job.plan
