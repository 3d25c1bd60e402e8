"""Builds whose weights a method quantised: killed and gone on with, proven, referenced and bisected."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from llama_export.build_options import RUNTIME, BuildOptions
from llama_export.export.quantising import solvers
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime.bundle import Quantisation, open_bundle
from llama_export.runtime.proof.reference import EXACT
from llama_export.runtime.proof.reference_file import load_index_of_bundle
from support.adapters import write_adapter
from support.command import call, spawn, start
from support.hf_models import write_llama_folder

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not mind in the least. "
LAYERS = 8


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("".join(f"{number}: {SENTENCE}" for number in range(60)))
    return write_llama_folder(folder / "llama", layers=LAYERS, hidden=72, head_dim=16, ffn=131, attention_bias=True)


def made(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """The manifest."""
    text = model.parent / "text.txt"
    settings = {"precision": "int4", "calibrate": text, "quality": False, **options}
    build(BuildOptions(model=str(model), target="cpu", output=output, **settings))
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return manifest


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    made(model, folder / "bundle")
    assert [path.name for path in folder.iterdir()] == ["bundle"]  # the work folder is gone
    return folder / "bundle"


def test_the_manifest_says_what_chose_the_codes(calibrated: Path) -> None:
    found = open_bundle(calibrated).manifest.quantisation
    assert found is not None
    assert (found.method, found.version) == ("gptq", solvers.GPTQ.version)
    assert found.text_sha256 is not None
    assert found.tokens > 500
    assert not found.retold


def test_a_calibrated_bundle_is_proven(calibrated: Path) -> None:
    result = call("verify", calibrated)
    assert result.exit_code == 0, result.output


def test_its_exact_reference_can_be_made_apart(calibrated: Path, model: Path, tmp_path: Path) -> None:
    result = call("reference", "-m", model, "--bundle", calibrated, "--exact", "-o", tmp_path / "exact.npz")
    assert result.exit_code == 0, result.output
    result = call("verify", calibrated, "--reference", tmp_path / "exact.npz")
    assert result.exit_code == 0, result.output


def test_a_bisection_computes_with_the_stored_weights_even_with_the_checkpoint(calibrated: Path, model: Path) -> None:
    result = call("verify", calibrated, "--bisect", "-m", model)
    assert result.exit_code == 0, result.output
    assert "what gptq chose is not in a checkpoint" in result.output
    assert "on the weights as the bundle stores them" in result.output


@pytest.mark.parametrize("method", ["rtn", "search", None])
def test_methods_without_a_text(method: str | None, model: Path, tmp_path: Path) -> None:
    manifest = made(model, tmp_path / "bundle", method=method, calibrate=None)
    assert manifest["quantisation"]["method"] == (method or "search")
    assert manifest["quantisation"]["text_sha256"] is None
    result = call("verify", tmp_path / "bundle", "--bisect", "-m", model)
    assert result.exit_code == 0, result.output
    assert ("is not in a checkpoint" in result.output) == (method != "rtn")


def test_nothing_is_said_of_weights_that_nothing_rounds(model: Path, tmp_path: Path) -> None:
    assert made(model, tmp_path / "bundle", precision="fp16", calibrate=None)["quantisation"] is None


def test_only_rounding_of_a_checkpoints_own_numbers_is_told_by_it() -> None:
    assert Quantisation("rtn", 1).retold
    assert not Quantisation("rtn", 1, "0" * 64, 512).retold  # channel scales may have moved
    assert not Quantisation("search", 1).retold
    assert not Quantisation("a newer one", 3).retold


def test_with_an_adapter_beside_the_weights(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(model, tmp_path / "adapter")
    made(model, tmp_path / "bundle", adapters=(str(adapter),), adapter_mode=RUNTIME)
    result = call("verify", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    norms = [
        one for one in load_index_of_bundle(tmp_path / "bundle", EXACT).weights if one.name.endswith("norm.weight")
    ]
    plain = tmp_path / "plain"
    made(model, plain, calibrate=None, precision="fp32")
    before = {one.name: one.sha256 for one in load_index_of_bundle(plain, EXACT).weights}
    assert norms
    assert all(one.sha256 == before[one.name] for one in norms)  # no scales were moved


# Interrupted


OPTIONS = ("-t", "cpu", "--precision", "int4", "--no-quality", "--no-reference")


def wait_for(work: Path, layers: int) -> None:
    until = time.monotonic() + 300
    while len(list(work.glob("layer-*.safetensors"))) < layers:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_sigkill_and_going_on(model: Path, tmp_path: Path) -> None:
    options = ("build", "-m", model, *OPTIONS, "--calibrate", model.parent / "text.txt")
    out, work = tmp_path / "out", tmp_path / ".out.quantising"
    with start(*options, "-o", out, cwd=tmp_path) as child:
        wait_for(work, 2)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    assert not out.exists()
    kept = len(list(work.glob("layer-*.safetensors")))
    assert 2 <= kept <= LAYERS
    done = spawn(*options, "-o", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Going on after" in done.stderr
    assert not work.exists()
    whole = spawn(*options, "-o", tmp_path / "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "Going on after" not in whole.stderr
    for name in ("model.onnx", "model.onnx.data"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_done_and_says_so(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.quantising"
    options = ("build", "-m", model, *OPTIONS, "--calibrate", model.parent / "text.txt", "-o", tmp_path / "out")
    with start(*options, cwd=tmp_path) as child:
        wait_for(work, 1)
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    assert f"The layers that are quantised stay in {work}" in errors
    assert list(work.glob("layer-*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_later_failure_keeps_what_was_done_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Silent):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    told, text = Told(), model.parent / "text.txt"
    monkeypatch.setattr("llama_export.pipeline._write_companions", lambda *_: 1 / 0)
    options = BuildOptions(str(model), "cpu", tmp_path / "out", "int4", calibrate=text, quality=False, reference=False)
    with pytest.raises(ZeroDivisionError):
        build(options, told)
    work = tmp_path / ".out.quantising"
    assert len(list(work.glob("layer-*.safetensors"))) == LAYERS
    assert any(str(work) in warning for warning in told.warnings)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".cache"] == [work.name]
