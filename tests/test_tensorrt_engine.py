"""Which engine a machine gets, and what is refused before it computes."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_export.errors import LlamaExportError
from llama_export.runtime.bundle import Bundle, EngineRecord, PlanRecord, open_bundle, seal
from llama_export.runtime.tensorrt import EngineFile, device_label, engine_folder, engine_label, find_engine
from llama_export.runtime.tensorrt.cuda import Cuda, Gpu
from llama_export.runtime.tensorrt.engine import load_engine
from llama_export.runtime.tensorrt.places import PLAN_FILE
from support.fake_tensorrt import RELEASES, fake_module, write_plan
from support.fake_tensorrt_cuda import FakeCuda, cudaError_t
from support.tiny_bundle import write_bundle
from support.tiny_tensorrt import write_tensorrt_bundle

JETPACK = RELEASES["10.3"]


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A Jetson Orin with TensorRT 10.3 and TensorRT-RTX, and nothing else of NVIDIA's."""
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    for release in (JETPACK, RELEASES["rtx"]):
        monkeypatch.setitem(sys.modules, release.module, fake_module(release, cuda))
    return cuda


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tensorrt_bundle(tmp_path / "bundle", "trt-primitive", dtype="float16")


def load(bundle: Bundle, path: Path, release: Any = JETPACK) -> Any:
    cuda = Cuda()
    file = EngineFile(path, release.module, release.version, path.with_name("kernels"), built_here=True)
    try:
        return load_engine(bundle, file, cuda.gpu())
    finally:
        cuda.close()


def refusal(bundle: Bundle, path: Path, release: Any = JETPACK) -> str:
    with pytest.raises(LlamaExportError) as caught:
        load(bundle, path, release)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_fitting_engine_loads_and_tells_its_types(bundle: Bundle, orin: FakeCuda, tmp_path: Path) -> None:
    files = bundle.manifest.files
    label = engine_label(files["model.onnx"].sha256, files["model.onnx.data"].sha256)
    engine = load(bundle, write_plan(tmp_path / "plan", bundle, JETPACK, name=label))
    assert str(engine.types["input_ids"]) == "int64"
    assert str(engine.types["past_key_values.1.value"]) == "float16"


@pytest.mark.parametrize("release", ["10.3", "rtx"])
@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"version": "10.0.1"}, "it was built by another version"),
        ({"capability": [8, 9]}, "it was built for another GPU"),
    ],
)
def test_a_plan_for_something_else_is_told_apart(
    facts: dict[str, Any], told: str, release: str, bundle: Bundle, orin: FakeCuda, tmp_path: Path
) -> None:
    one = RELEASES[release]
    message = refusal(bundle, write_plan(tmp_path / "plan", bundle, one, **facts), one)
    assert told in message
    assert f"cannot load {tmp_path / 'plan'} on Orin" in message
    assert f"`llama-export engine {bundle.path} --force`" in message


def test_a_plan_that_the_gpu_has_no_memory_for(bundle: Bundle, orin: FakeCuda, tmp_path: Path) -> None:
    orin.total = 4000
    message = refusal(bundle, write_plan(tmp_path / "plan", bundle, JETPACK))
    assert "too little free memory for it (4.00 kB of 4.00 kB)" in message
    assert "smaller --precision" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "has 0 bytes"), (b"x" * 99, "damaged, or no engine of TensorRT"), (b"x" * 5000, "less than its memory")],
)
def test_a_damaged_plan(content: bytes, told: str, bundle: Bundle, orin: FakeCuda, tmp_path: Path) -> None:
    orin.total = 4500
    (tmp_path / "plan").write_bytes(content)
    assert told in refusal(bundle, tmp_path / "plan")


def test_a_plan_that_is_gone(bundle: Bundle, orin: FakeCuda, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(bundle, tmp_path / "plan")


OTHER = hashlib.sha256(b"other").hexdigest()


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"name": engine_label(OTHER, OTHER)}, "it was built from another model"),
        ({"name": engine_label(OTHER, OTHER).replace(" 1 ", " 2 ")}, "a newer llama-export built it"),
        ({"types": {"logits": "HALF"}}, "logits is float16 where float32 is expected"),
        ({"types": {"input_ids": "BF16"}}, "input_ids is another type where int64 or int32"),
        ({"types": {"past_key_values.0.key": "FLOAT"}}, "past_key_values.0.key is float32 where float16"),
    ],
)
def test_an_engine_of_something_else(
    facts: dict[str, Any], told: str, bundle: Bundle, orin: FakeCuda, tmp_path: Path
) -> None:
    message = refusal(bundle, write_plan(tmp_path / "plan", bundle, JETPACK, **facts))
    assert f"is no engine of {bundle.path}: {told}" in message


def test_an_engine_of_a_bundle_with_other_sizes(bundle: Bundle, orin: FakeCuda, tmp_path: Path) -> None:
    from support.tiny_bundle import random_llama

    deeper = write_tensorrt_bundle(tmp_path / "deeper", "trt-primitive", random_llama(layers=3), dtype="float16")
    assert "it has a tensor past_key_values.2.key" in refusal(bundle, write_plan(tmp_path / "plan", deeper, JETPACK))
    shorter = write_tensorrt_bundle(tmp_path / "shorter", "trt-primitive", dtype="float16", context=32)
    told = refusal(bundle, write_plan(tmp_path / "plan", shorter, JETPACK))
    assert "in the profile prefill past_key_values.0.key is from (1, 2, 1, 16) to (1, 2, 32, 16), not from" in told


def test_without_a_gpu_there_is_a_reason(bundle: Bundle, orin: FakeCuda) -> None:
    orin.missing = cudaError_t.cudaErrorInsufficientDriver
    found = find_engine(bundle)
    assert isinstance(found, str)
    assert found.startswith("CUDA cannot find a GPU: InsufficientDriver; an engine needs an NVIDIA GPU")


def test_without_tensorrt_there_is_a_reason(
    bundle: Bundle, orin: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT is not installed" in str(find_engine(bundle))
    assert "JetPack" in str(find_engine(bundle))
    assert "made for ONNX Runtime" in str(find_engine(write_bundle(tmp_path / "ort")))


def test_without_cuda_for_python_there_is_a_reason(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_module(JETPACK, FakeCuda()))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", None)
    assert str(find_engine(bundle)).startswith("CUDA for Python is not installed; `pip install cuda-bindings`")


def test_an_old_cuda_python_will_do(bundle: Bundle, orin: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", orin)
    assert "No engine was built on this device yet for TensorRT 10.3.0" in str(find_engine(bundle))


def test_an_engine_built_here_is_found_by_what_it_is_tied_to(bundle: Bundle, orin: FakeCuda, tmp_path: Path) -> None:
    folder = engine_folder(bundle.manifest_sha256, "tensorrt", "10.3.0", "orin-sm8.7", tmp_path / "engines")
    write_plan(folder / PLAN_FILE, bundle, JETPACK)
    found = find_engine(bundle, tmp_path / "engines")
    assert isinstance(found, EngineFile)
    assert (found.path, found.built_here, found.version) == (folder / PLAN_FILE, True, "10.3.0")
    orin.capability = (8, 9)
    assert isinstance(find_engine(bundle, tmp_path / "engines"), str)
    assert orin.live == 0


def with_plans(tmp_path: Path, *plans: PlanRecord) -> Bundle:
    record = EngineRecord("tensorrt_rtx", "1.7.1")
    bundle = write_tensorrt_bundle(tmp_path / "rtx", "trt", backend="tensorrt-rtx", engine=record, dtype="float16")
    for plan in plans:
        (bundle.path / plan.file).write_bytes(b"plan")
    seal(bundle.path, dataclasses.replace(bundle.manifest, engine=dataclasses.replace(record, plans=plans)))
    return open_bundle(bundle.path)


def test_an_engine_of_the_bundle_fits_by_compute_capability_and_version(orin: FakeCuda, tmp_path: Path) -> None:
    plans = [
        PlanRecord("engine/sm89.plan", ("8.9",), "1.7.1", "linux-x86_64"),
        PlanRecord("engine/portable.plan", ("8.0", "8.7"), "1.7.1", "linux-x86_64"),
    ]
    bundle = with_plans(tmp_path, *plans)
    found = find_engine(bundle, tmp_path / "none")
    assert isinstance(found, EngineFile)
    assert (found.path.name, found.built_here) == ("portable.plan", False)
    orin.capability, orin.name = (12, 0), "NVIDIA GeForce RTX 5090"
    assert "for compute capability 8.0, 8.7, 8.9, but NVIDIA GeForce RTX 5090 has 12.0" in str(find_engine(bundle))
    orin.capability = (8, 9)
    older = with_plans(tmp_path, dataclasses.replace(plans[0], version="1.7.0"))
    assert "built by TensorRT-RTX 1.7.0, not 1.7.1.116 as is here" in str(find_engine(older))


def test_places_hold_what_engines_are_tied_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    label = device_label("NVIDIA GeForce RTX 4090", "8.9")
    assert label == "nvidia-geforce-rtx-4090-sm8.9"
    found = engine_folder("ab" * 32, "tensorrt_rtx", "1.7.1.116", label)
    assert found == tmp_path / "llama-export/engines" / ("ab" * 32) / f"tensorrt_rtx-1.7.1.116-{label}"
    assert device_label("../..\\x", "8.7") == "x-sm8.7"
    assert device_label("", "8.7") == "gpu-sm8.7"
    assert engine_folder("ab", "tensorrt", "10.3/../..", "d", tmp_path).name == "tensorrt-10.3-..-..-d"


def test_engines_without_a_home_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_export.runtime.tensorrt.places.cache_folder", lambda: None)
    with pytest.raises(LlamaExportError, match="--engine-dir"):
        engine_folder("ab", "tensorrt", "10.3.0", "orin-sm8.7")


@pytest.mark.filterwarnings("ignore")
def test_a_real_plan_without_a_gpu_is_refused_by_tensorrt_rtx(bundle: Bundle, tmp_path: Path) -> None:
    """What TensorRT-RTX really says, for the one machine that builds engines but cannot load them."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if not isinstance(find_engine(with_plans(tmp_path)), str):
        pytest.skip("this machine has a GPU")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    tensor = network.add_input("x", trt.float32, (1, 4))
    network.mark_output(network.add_identity(tensor).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = tmp_path / "real.plan"
    plan.write_bytes(builder.build_serialized_network(network, config))
    file = EngineFile(plan, "tensorrt_rtx", trt.__version__, tmp_path / "kernels", built_here=False)
    with pytest.raises(LlamaExportError, match=r"driver is missing or too old .*update the driver"):
        load_engine(bundle, file, Gpu("nothing", "8.9", 1 << 30, 1 << 30, "12.0"))
    plan.write_bytes(b"x" * 5000)
    with pytest.raises(LlamaExportError, match="it is damaged, or no engine of TensorRT-RTX"):
        load_engine(bundle, file, Gpu("nothing", "8.9", 1 << 30, 1 << 30, "12.0"))
