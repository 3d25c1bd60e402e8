"""The whole way from a checkpoint to a bundle for TensorRT: every kind of target, release and precision, proven on the
CPU with the very file that TensorRT gets.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export import inspection
from llama_export.build_options import BuildOptions
from llama_export.build_report import BuildReport
from llama_export.errors import LlamaExportError, UsageError
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime import load
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.proof.reports.table import lines
from llama_export.runtime.proof.verify import verify
from llama_export.runtime.recipe import read_recipe
from safetensors.numpy import load_file
from support.command import call
from support.hf_models import write_llama_folder

TEXT = "The old lighthouse keeper climbed the stairs every evening at dusk. " * 60


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(tmp_path: Path, target: str, precision: str | None = None, **options: Any) -> BuildReport:
    model = tmp_path / "llama"
    if not model.exists():
        write_llama_folder(model)
    if options.pop("calibrated", False):
        options["calibrate"] = tmp_path / "text.txt"
        options["calibrate"].write_text(TEXT)
    return build(
        BuildOptions(model=str(model), target=target, output=tmp_path / "bundle", precision=precision, **options)
    )


def proven(path: Path) -> Any:
    """The bundle, after `verify` has passed on the CPU."""
    bundle = open_bundle(path)
    verdict = verify(bundle, check_hashes=True, threads=1, progress=Silent())
    assert verdict.passed, verdict.failed
    assert verdict.engine is (None if bundle.manifest.engine is None else False)
    assert lines([verdict])[-1] == ("passed" if verdict.engine is None else "passed on the CPU; no engine was checked")
    return bundle


@pytest.mark.parametrize(
    ("target", "jetpack", "precision", "calibrated", "expected"),
    [
        ("jetson-orin", None, None, False, ("trt-primitive", "10.3.0", "int4")),
        ("jetson-orin", "6.1", "fp16", False, ("trt-primitive", "10.3.0", "fp16")),
        ("jetson-orin", "6.2", "int8", True, ("trt-primitive", "10.3.0", "int8")),
        ("jetson-orin-nano-8gb", "6.0", None, False, ("trt-primitive", "8.6.2", "fp16")),
        ("jetson-agx-orin-64gb", "6.0", "int8", True, ("trt-primitive", "8.6.2", "int8")),
        ("jetson-orin", "7.2", "int4", False, ("trt", "10.16.2", "int4")),
        ("jetson-thor-t5000", None, "fp8", True, ("trt-primitive", "10.13.3", "fp8")),
        ("jetson-thor-t4000", "7.0", "fp8", False, ("trt-primitive", "10.13.3", "fp8")),
        ("jetson-thor-t5000", "7.2", "nvfp4", False, ("trt", "10.16.2", "nvfp4")),
    ],
)
def test_a_jetson_gets_a_graph_and_a_recipe_for_its_release(
    tmp_path: Path,
    target: str,
    jetpack: str | None,
    precision: str | None,
    calibrated: bool,
    expected: tuple[str, str, str],
) -> None:
    made = make(tmp_path, target, precision, jetpack=jetpack, calibrated=calibrated)
    bundle = proven(tmp_path / "bundle")
    manifest, recipe = bundle.manifest, read_recipe(bundle)
    assert (manifest.dialect, manifest.engine.version, manifest.precision) == expected
    assert (manifest.engine.plans, made.engine, recipe.module) == ((), None, "tensorrt")
    assert [name for name in manifest.files if name.startswith("engine/")] == ["engine/recipe.json"]
    assert "genai_config.json" not in manifest.files
    weak = manifest.engine.version.startswith("8.")
    assert (recipe.strongly_typed, bool(recipe.flags), bool(recipe.float32_layers)) == (not weak, weak, weak)
    assert ("INT8" in recipe.flags) == (weak and calibrated)
    assert any("built or run on a Jetson by us" in note for note in manifest.notes)


@pytest.mark.parametrize(
    ("target", "precision", "calibrated", "capabilities"),
    [
        ("rtx-4090", "int4", False, ("8.9",)),
        ("rtx-4090", "w8a8", True, ("8.9",)),
        ("rtx-4090", "int8-b32", False, ("8.9",)),
        ("rtx", None, False, ("8.0", "8.6", "8.9", "12.0")),
        ("rtx-5090", "nvfp4", False, ("12.0",)),
        ("dgx-spark", "fp8", False, ("12.1",)),
        ("l4", "int8", False, ("8.9",)),
    ],
)
def test_an_rtx_card_gets_an_engine_without_a_gpu(
    tmp_path: Path, target: str, precision: str | None, calibrated: bool, capabilities: tuple[str, ...]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'llama-export[rtx]'")
    made = make(tmp_path, target, precision, calibrated=calibrated)
    bundle = proven(tmp_path / "bundle")
    (plan,) = bundle.manifest.engine.plans
    assert (bundle.manifest.dialect, plan.compute_capability) == ("trt", capabilities)
    assert bundle.file(plan.file).stat().st_size == made.engine.size > 10_000
    assert "engine/build.log" in bundle.manifest.files
    assert asdict(made.engine) == made.to_json()["engine"]
    assert any(line.startswith("Engine of TensorRT-RTX 1.7") for line in made.lines())
    if target == "dgx-spark":
        assert any("unproven" in note for note in bundle.manifest.notes)


def test_a_missing_builder_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "polygraphy" else found(name, *a))
    with pytest.raises(LlamaExportError, match=r'\(polygraphy\): run `pip install "llama-export\[rtx\]"`'):
        make(tmp_path, "rtx-4090")
    assert not (tmp_path / "bundle").exists()


def test_a_model_of_too_few_heads_for_rtx_is_told_before_anything_is_made(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'llama-export[rtx]'")
    write_llama_folder(tmp_path / "llama", heads=3, kv_heads=1, head_dim=16, hidden=48)
    with pytest.raises(LlamaExportError, match="no attention kernel for a model of 3 heads"):
        make(tmp_path, "rtx-4090")
    assert not (tmp_path / "bundle").exists()


def test_a_text_is_the_same_in_every_dialect(tmp_path: Path) -> None:
    texts = {}
    for options in ({"jetpack": "6.2"}, {"jetpack": "7.2"}, {"backend": "onnxruntime"}):
        make(tmp_path, "jetson-orin", "fp16", force=True, **options)
        bundle = open_bundle(tmp_path / "bundle")
        texts[bundle.manifest.dialect] = load(tmp_path / "bundle").generate("The old keeper").token_ids[:12]
    assert texts.keys() == {"trt-primitive", "trt", "ort"}
    assert len({tuple(ids) for ids in texts.values()}) == 1


def test_a_backend_may_be_chosen(tmp_path: Path) -> None:
    make(tmp_path, "jetson-orin", backend="onnxruntime")
    manifest = proven(tmp_path / "bundle").manifest
    assert (manifest.dialect, manifest.backend, manifest.engine) == ("ort", "onnxruntime", None)
    assert "genai_config.json" in manifest.files


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("jetson-orin", {"precision": "fp8"}, ["fp16, int8, int4 and w8a8", "not fp8"]),
        ("jetson-orin", {"precision": "int8"}, ["--calibrate FILE"]),
        ("jetson-orin", {"head_precision": "fp8"}, ["fp16, int8, int4 and w8a8", "not fp8"]),
        ("jetson-orin", {"head_precision": "int8"}, ["--calibrate FILE"]),
        ("jetson-orin", {"batch": 5000}, ["--batch must be from 1 to 4096"]),
        ("jetson-orin", {"precision": "int4", "jetpack": "6.0"}, ["TensorRT 8.6.2", "--jetpack 6.1"]),
        ("jetson-orin", {"jetpack": "7.1"}, ["6.0"]),
        ("jetson-orin", {"backend": "rtx"}, ["--backend"]),
        ("rtx-4090", {"jetpack": "6.2"}, ["no", "Jetson"]),
        ("jetson-orin", {"context": 100_000}, ["--context 100000"]),
        ("jetson-orin", {"precision": "fp16", "calibrated": True}, ["--calibrate", "fp16 quantises nothing"]),
        ("cpu", {"precision": "fp32", "calibrated": True}, ["--calibrate", "fp32 quantises nothing"]),
        ("cpu", {"precision": "int8", "calibrated": True, "method": "rtn"}, ["--method rtn uses no text", "gptq"]),
        ("cpu", {"precision": "int8", "method": "gptq"}, ["--method gptq learns from a text", "--calibrate built-in"]),
        ("jetson-orin", {"precision": "fp16", "method": "search"}, ["--method search is for weights", "--precision"]),
        ("jetson-orin", {"precision": "int4-b256"}, ["numbers; choose int4-b16, int4-b32 or int4"]),
    ],
)
def test_what_a_target_lacks_is_refused_before_anything_is_made(
    tmp_path: Path, target: str, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises((UsageError, LlamaExportError)) as raised:
        make(tmp_path, target, **options)
    assert all(word in str(raised.value) for word in words), raised.value
    assert not (tmp_path / "bundle").exists()


def test_adapters_of_an_engine_are_merged(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--adapter-mode merge"):
        make(tmp_path, "jetson-orin", adapters=("nowhere",), adapter_mode="runtime")


def test_a_run_says_why_the_cpu_computes(tmp_path: Path) -> None:
    make(tmp_path, "jetson-orin")
    result = call("run", str(tmp_path / "bundle"), "The old", "--max-new-tokens", "3")
    assert result.exit_code == 0
    assert "ONNX Runtime computes on the CPU: " in result.stderr
    refused = call("run", str(tmp_path / "bundle"), "The old", "--backend", "tensorrt")
    assert refused.exit_code == 1
    other = call("run", str(tmp_path / "bundle"), "The old", "--backend", "rtx")
    assert other.exit_code == 2
    assert "made for tensorrt" in other.stderr


def test_a_tied_embedding_is_told_once(tmp_path: Path) -> None:
    write_llama_folder(tmp_path / "llama", tied=True)
    make(tmp_path, "jetson-orin")
    bundle = proven(tmp_path / "bundle")
    counted = inspection.to_json(bundle)["derived"]["parameters"]
    assert sum(counted.values()) == sum(map(np.size, load_file(tmp_path / "llama" / "model.safetensors").values()))
