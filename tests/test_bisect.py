"""A bisection of sound bundles finds nothing, whatever their shape; what it cannot answer, it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.build_options import BuildOptions
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.bisect import Bisection, bisect
from llama_export.export.bisect.finding import CUMULATIVE, LOCAL, Row
from llama_export.export.bisect.run import cut
from llama_export.export.source import open_source
from llama_export.pipeline import build
from llama_export.runtime.bundle import open_bundle
from support.graphs import VARIANTS, llama
from support.hf_models import write_llama_folder, write_tokenizer
from test_prequantised_build import made as build_quantised

ORT, TRT, PRIMITIVE = ({"target": "cpu"}, {"target": "jetson-orin", "jetpack": "7.2"}, {"target": "jetson-orin"})
TEXT = "The old lighthouse keeper climbed the stairs every evening at dusk. " * 60


def built(folder: Path, variant: str, **options: Any) -> Path:
    changes = {**VARIANTS[variant], "vocab_size": 271}
    llama(**changes).save_pretrained(folder / "model")
    write_tokenizer(folder / "model", vocab=271)
    (folder / "prompt.txt").write_text(TEXT[:40])  # one is enough: the bisection looks at the longest
    given = {"context": 64, "prompts": folder / "prompt.txt", **options}
    build(BuildOptions(model=str(folder / "model"), output=folder / "bundle", **given))
    return folder / "bundle"


def assert_sound(path: Path) -> Bisection:
    found = bisect(open_bundle(path), threads=1)
    assert found.passed, "\n".join(found.lines())
    whole = [row for row in found.rows if row.kind == CUMULATIVE]
    assert whole and all(row.passed for row in whole)
    return found


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("one-kv-head", {**ORT, "precision": "int4"}),
        ("head-dim-20", {**ORT, "precision": "int8"}),
        ("head-dim-20", TRT),
        ("biased", {**ORT, "precision": "int4"}),
        ("biased", PRIMITIVE),
        ("odd-rows", {**ORT, "precision": "int4"}),
        ("yarn", {**ORT, "precision": "fp16"}),
        ("llama3-rope", PRIMITIVE),
        ("dynamic-rope", {**ORT, "precision": "fp32"}),
        ("mistral-window", {**ORT, "precision": "int4"}),
        ("mistral-window", TRT),
        ("mistral-window", PRIMITIVE),
        ("qwen2", {**ORT, "precision": "int4"}),
        ("qwen2-window", TRT),
    ],
)
def test_a_sound_bundle_has_no_place(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = assert_sound(built(tmp_path, variant, **options))
    places = {row.place for row in found.rows if row.layer == 2 and row.kind == LOCAL}
    assert {"q", "k", "v", "keys", "values", "attention", "o", "gate", "up", "activation", "down"} <= places
    assert {row.pass_ for row in found.rows} == {"prefill", "chunk", "decode"}


def test_columns_in_another_order(tmp_path: Path) -> None:
    build_quantised("gptq sorted", tmp_path)
    assert_sound(tmp_path / "bundle")


def test_rounded_activations_are_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    calibrated = {"precision": "int8", "calibrate": tmp_path / "text.txt"}
    found = assert_sound(built(tmp_path, "grouped", **PRIMITIVE, **calibrated))
    assert any("rounds activations to 8 bits" in note for note in found.notes)
    assert any("for TensorRT, asked in ONNX Runtime" in note for note in found.notes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and its bundle without a reference."""
    folder = tmp_path_factory.mktemp("plain")
    write_llama_folder(folder / "model")
    options = BuildOptions(str(folder / "model"), "cpu", folder / "bundle", precision="fp32", reference=False)
    build(options)
    return folder


def test_a_bundle_without_a_reference_needs_the_checkpoint(plain: Path) -> None:
    bundle = open_bundle(plain / "bundle")
    with pytest.raises(LlamaExportError, match=r"no exact reference .* -m"):
        bisect(bundle)
    found = bisect(bundle, source=open_source(str(plain / "model")), threads=1)
    assert found.passed and found.tensors == 0
    assert any("were not compared" in note for note in found.notes)


def test_formats_without_a_reference_are_unknown(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "bundle", tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy/manifest.json").read_text())
    (tmp_path / "copy/manifest.json").write_text(json.dumps({**manifest, "precision": "int4"}))
    with pytest.raises(LlamaExportError, match=r"formats of its weights \(int4\) cannot be told"):
        bisect(open_bundle(tmp_path / "copy"), source=open_source(str(plain / "model")))


def test_another_checkpoint_is_refused(plain: Path, tmp_path: Path) -> None:
    write_llama_folder(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="is not the checkpoint"):
        bisect(open_bundle(plain / "bundle"), source=open_source(str(tmp_path / "other")))


@pytest.mark.parametrize(("length", "counts"), [(24, [14, 6, 1, 1, 1, 1]), (3, [2, 1]), (4, [2, 1, 1]), (1, [1])])
def test_a_text_is_cut_into_three_passes(length: int, counts: list[int]) -> None:
    pieces = cut(length)
    assert [piece.count for piece in pieces] == counts
    assert [piece.first for piece in pieces] == [0, *np.cumsum(counts)[:-1]]
    assert pieces[0].name == "prefill"


def row(kind: str = LOCAL, measured: float = 2.0, **changes: Any) -> Row:
    values = {"pass_": "prefill", "layer": 1, "place": "q", "op": "node"}
    return Row(**{**values, **changes}, kind=kind, measured=measured, limit=1.0)


def bisection(*rows: Row) -> Bisection:
    return Bisection("here", "engine", "weights", "float32", 3, (2, 1), 0, rows)


def test_the_first_place_is_the_first_that_is_computed() -> None:
    rows = [row(layer=2), row(layer=None, place="logits"), row(place="keys"), row(place="k"), row(measured=0.5)]
    assert bisection(*rows).first == rows[3]
    weights = row("weights", pass_="weights", layer=2, place="mlp.up_proj.weight")
    assert bisection(*rows, weights).first == weights
    assert bisection(row(CUMULATIVE)).first is None
    assert bisection(row(layer=None, place="embedding"), row(layer=0)).first == row(layer=None, place="embedding")


def test_nan_is_a_difference() -> None:
    found = bisection(row(measured=float("nan")), row(measured=float("inf"), layer=2))
    assert not found.passed and found.first is not None and found.first.layer == 1
    value = found.to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["first"]["measured"] is None  # type: ignore[index]


def test_an_epsilon_is_fitted() -> None:
    from llama_export.export.bisect import explain

    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    mean = x.double().pow(2).mean(-1)
    gains = ((mean + 1e-5) / (mean + 1e-6)).sqrt()
    assert explain.epsilon(x, 1e-5, gains) == "an epsilon of 1e-06 instead of 1e-05"
    assert explain.epsilon(x, 1e-5, 1 + 0.1 * torch.randn(5)) == ""
