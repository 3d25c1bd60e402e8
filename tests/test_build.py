"""Builds whose target, place or tools are not those of a plain build for the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_export import pipeline
from llama_export.build_options import BuildOptions
from llama_export.pipeline import build, tool_versions
from llama_export.progress import Silent
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.proof.reference import EXACT
from llama_export.runtime.proof.reference_file import load_index_of_bundle
from llama_export.runtime.proof.verify import verify
from support.hf_models import write_llama_folder


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_a_bundle_for_cuda_computes_what_pytorch_does(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16, on the CPU's kernels: the graph is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = write_llama_folder(tmp_path / "llama", attention_bias=True)
    build(BuildOptions(model=str(checkpoint), target="cuda", output=tmp_path / "bundle", precision=precision))
    file = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["shape"]["cache_dtype"] == "float16"
    assert manifest["providers"][0] == "CUDAExecutionProvider"
    file.write_text(json.dumps(manifest | {"providers": ["CPUExecutionProvider"]}))
    verdict = verify(open_bundle(tmp_path / "bundle"), check_hashes=True, threads=1, progress=Silent())
    assert verdict.passed, verdict.failed


def test_the_disk_that_is_asked_is_that_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedError(Exception):
        pass

    def require_space(path: Path, size: int) -> None:
        raise AskedError(path)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(pipeline, "require_space", require_space)
    checkpoint = write_llama_folder(tmp_path / "llama")
    with pytest.raises(AskedError) as caught:
        build(BuildOptions(model=str(checkpoint), target="cpu", output=Path("~/out/bundle")))
    assert caught.value.args == (tmp_path / "out",)


def test_the_tools_are_those_that_are_here() -> None:
    versions = tool_versions()
    assert {"llama-export", "python", "torch", "gguf"} <= versions.keys()
    assert {"onnxruntime", "onnxruntime-gpu"} & versions.keys()


def test_a_head_of_its_own_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_llama_folder(tmp_path / "llama")
    build(BuildOptions(str(model), "cpu", tmp_path / "out", "int4", head_precision="int8"))
    index = load_index_of_bundle(tmp_path / "out", EXACT)
    formats = {record.name: record.format for record in index.weights}
    assert formats["lm_head.weight"] == "int8-f16"
    assert formats["model.layers.1.mlp.up_proj.weight"] == "int4-zeros-f16"
    assert verify(open_bundle(tmp_path / "out"), check_hashes=True, threads=1, progress=Silent()).passed
