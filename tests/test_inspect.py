"""`inspect` tells from the manifest alone what a bundle is and what it asks of a device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from llama_export import inspection
from llama_export.cli import main
from llama_export.runtime.bundle import Limits, Manifest, ModelRecord, Shape, Tokens, open_bundle, reference_file, seal
from llama_export.runtime.hashes import check_files
from llama_export.runtime.proof.reference import EXACT, WeightRecord
from llama_export.runtime.proof.reference_file import save
from support.tiny_bundle import random_llama
from support.tiny_reference import tiny_reference

MANIFEST = Manifest(
    model=ModelRecord("someone/Some-135M", "gguf", revision="abc123", licence="apache-2.0"),
    target="cpu",
    dialect="ort",
    precision="q4_1",
    shape=Shape(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, cache_dtype="float32"),
    limits=Limits(context=8192, batch=2),
    tokens=Tokens(bos=1, eos=(2,), pad=None, add_bos=False),
    minimum={"python": "3.10", "onnxruntime": "1.23.2"},
    providers=("CPUExecutionProvider",),
    tools={"torch": "2.13.0"},
    notes=("No TensorRT engine.",),
)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is a bundle as far as its manifest goes; the caches of this test are its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(bytes(12_345))
    (folder / "tokenizer.json").write_text("{}")
    seal(folder, MANIFEST)
    return folder


def shown(bundle: Path) -> str:
    result = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert result.exit_code == 0
    return result.output


def test_people_see_what_it_is_and_what_it_takes(bundle: Path) -> None:
    text = shown(bundle)
    for part in (
        "someone/Some-135M (gguf, revision abc123)",
        "apache-2.0",
        "cpu, ort graph for CPUExecutionProvider",
        "q4_1",
        "30 layers, hidden 576, FFN 1536, 9 heads and 3 KV heads of 64, vocabulary 49,152",
        "context 8,192 tokens, 2 texts at once, prompts in chunks of 512",
        "float32, 46.1 MB for 1,000 tokens, 755 MB in full",  # 2 * 30 * 3 * 64 * 4 bytes a token
        "12.4 kB in 3 files",
        "python 3.10 or newer, onnxruntime 1.23.2 or newer",
        "torch 2.13.0",
        "No TensorRT engine.",
    ):
        assert part in text
    files = [line.split()[-1] for line in text.splitlines() if line.endswith((".onnx", ".data", ".json"))]
    assert files == ["model.onnx.data", "model.onnx", "tokenizer.json"], "largest first"


def test_hashes_are_said_to_be_checked_only_when_they_were(bundle: Path) -> None:
    assert "not checked on this machine yet" in shown(bundle)
    check_files(open_bundle(bundle))
    assert "checked on this machine, and no file has changed since" in shown(bundle)
    (bundle / "model.onnx").write_bytes(b"gRaph")
    assert "not checked on this machine yet" in shown(bundle)
    (bundle / "model.onnx").unlink()
    assert "model.onnx is missing" in shown(bundle)


def test_json_holds_the_manifest_and_what_follows(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(bundle), "--json"])
    found = json.loads(result.output)
    assert found["manifest"]["model"]["id"] == "someone/Some-135M"
    assert found["derived"]["bytes"] == 5 + 12_345 + 2
    assert found["derived"]["cache_bytes_per_1000_tokens"] == 46_080_000
    assert found["derived"]["memory_bytes_at_full_context"] > 2 * 8192 * 46_080


def test_parameters_are_counted_by_format_where_there_is_a_reference(bundle: Path) -> None:
    assert inspection.to_json(open_bundle(bundle))["derived"]["parameters"] is None
    assert "parameters  unknown" in shown(bundle)
    stored = {"layer.0": ("int4", (700, 1000)), "layer.1": ("int4", (500, 1000)), "norm": ("fp32", (300,))}
    weights = tuple(
        WeightRecord(name, format, shape, 0, {"codes": name}, "0" * 64, 1.0) for name, (format, shape) in stored.items()
    )
    made = tiny_reference(random_llama(), {})
    save(replace(made, index=replace(made.index, weights=weights)), bundle / reference_file(EXACT))
    seal(bundle, MANIFEST)
    assert inspection.to_json(open_bundle(bundle))["derived"]["parameters"] == {"int4": 1_200_000, "fp32": 300}
    assert "parameters  1.2 M in int4, 300 in fp32" in shown(bundle)


def test_a_damaged_reference_is_no_failure(bundle: Path) -> None:
    (bundle / "reference").mkdir()
    (bundle / "reference" / "exact.npz").write_text("{")
    seal(bundle, MANIFEST)
    assert "parameters  unknown" in shown(bundle)


def test_nothing_of_a_checkpoint_is_obeyed_by_a_terminal(bundle: Path) -> None:
    model = ModelRecord("a\x1b[2J\ud800b", "hub", licence="\x1b]0;c\x07")
    seal(bundle, replace(MANIFEST, model=model, notes=("\x9bd",)))
    text = shown(bundle)
    assert "a[2Jb (hub)" in text
    assert not any(char in text for char in "\x1b\x07\x9b")


def test_a_bundle_for_cuda_needs_no_scores(bundle: Path) -> None:
    on_cpu = inspection.to_json(open_bundle(bundle))["derived"]["memory_bytes_at_full_context"]
    seal(bundle, replace(MANIFEST, providers=("CUDAExecutionProvider", "CPUExecutionProvider")))
    on_cuda = inspection.to_json(open_bundle(bundle))["derived"]["memory_bytes_at_full_context"]
    assert on_cpu - on_cuda == 2 * 9 * 512 * 8192 * 4 + int(0.6 * (5 + 12_345))


def test_a_checkpoint_without_a_licence_is_told(bundle: Path) -> None:
    seal(bundle, replace(MANIFEST, model=ModelRecord("local", "folder")))
    assert "not told by the checkpoint" in shown(bundle)


def test_what_the_licence_asks_is_shown_and_printed(bundle: Path) -> None:
    model = ModelRecord("someone/Llama", "hub", "abc123", "llama3.2", ("Show it.", "Hand it on."))
    seal(bundle, replace(MANIFEST, model=model))
    lines = [line.split(maxsplit=1) for line in shown(bundle).splitlines()]
    at = lines.index(["licence", "llama3.2"])
    assert lines[at + 1] == ["duties", "Show it."]
    assert " ".join(lines[at + 2]) == "Hand it on."
    found = inspection.to_json(open_bundle(bundle))["manifest"]["model"]
    assert (found["id"], found["revision"], found["licence"]) == ("someone/Llama", "abc123", "llama3.2")
    assert found["duties"] == ["Show it.", "Hand it on."]
