"""`--precision auto`: bundles that meet a size or a cost, what is told of them, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from llama_export import allocating, limits, pipeline
from llama_export.build_options import BuildOptions
from llama_export.build_report import BuildReport
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.sensitivity import Sensitivity
from llama_export.limits import AboveLimitError, limits_of, parsed_size, told_size
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime.bundle import DATA_FILE, GRAPH_FILE, open_bundle
from llama_export.runtime.proof.reference import EXACT
from llama_export.runtime.proof.reference_file import load_index_of_bundle
from llama_export.runtime.proof.verify import verify
from support.hf_models import random_weights, write_llama_folder, write_weights


class Warned(Silent):
    """What a build warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose predictions differ enough from one another to tell what a format costs."""
    path = write_llama_folder(tmp_path_factory.mktemp("auto") / "llama", hidden=64, ffn=160, tied=True)
    weights = random_weights(json.loads((path / "config.json").read_text()))
    for name, weight in weights.items():
        if weight.ndim == 2:
            weights[name] = weight * ((3 if "embed" in name else 1.5) / weight.std() / weight.shape[1] ** 0.5)
    write_weights(path, weights)
    return path


def options(model: Path, tmp_path: Path, **changes: Any) -> BuildOptions:
    given = {"target": "cpu", "output": tmp_path / "out", "precision": "auto", "reference": False, "method": "rtn"}
    return BuildOptions(**{"model": str(model), **given, **changes})


def least(model: Path, tmp_path: Path, **changes: Any) -> str:
    """The smallest --budget that can be met, as the refusal of a smaller one says."""
    with pytest.raises(LlamaExportError, match=r"No formats for .* the least is") as caught:
        build(options(model, tmp_path, budget="1kB", quality=False, **changes))
    assert not (tmp_path / "out").exists()
    return str(re.findall(r"--budget (\S+)\.$", str(caught.value))[0])


def model_bytes(report: BuildReport) -> int:
    return sum(report.manifest.files[name].size for name in (GRAPH_FILE, DATA_FILE))


def test_budgets_are_met_the_larger_the_better(model: Path, tmp_path: Path) -> None:
    smallest = parsed_size(least(model, tmp_path))
    costs = []
    for part in (1.0, 1.2, 1.6):
        budget = int(smallest * part)
        report = build(options(model, tmp_path, budget=str(budget), force=True, reference=part == 1.2))
        assert model_bytes(report) <= budget
        allocation, quality = report.allocation, report.quality
        assert allocation is not None and quality is not None and quality.prediction is not None
        assert model_bytes(report) <= allocation.bytes <= budget
        assert quality.prediction.kl == allocation.kl == pytest.approx(sum(part.kl for part in allocation.parts))
        assert 0.3 < quality.end.weights.kl.value / allocation.kl < 3
        costs.append(quality.end.weights.kl.value)
        assert report.manifest.precision == "auto"
        assert any(note.startswith("Formats were chosen for at most") for note in report.manifest.notes)
        assert any(line.startswith("Predicted KL divergence") for line in report.lines())
        told = report.to_json()["allocation"]
        assert told["limits"]["budget"] == budget and len(told["parts"]) == len(allocation.parts)
        assert not list(tmp_path.glob(".out*"))
        if part == 1.2:
            verdict = verify(open_bundle(tmp_path / "out"), check_hashes=True, threads=1, progress=Silent())
            assert verdict.passed, verdict.failed
            stored = {one.name: one.format for one in load_index_of_bundle(tmp_path / "out", EXACT).weights}
            for one in allocation.parts:
                assert {stored[name] for name in one.names} == {one.format}
    assert costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize("jetpack", ["6.2", "7.2"])
def test_tensorrt_gets_what_it_holds(model: Path, tmp_path: Path, jetpack: str) -> None:
    changes = {"target": "jetson-orin", "jetpack": jetpack, "quality": False}
    with pytest.raises(LlamaExportError, match="No formats") as caught:
        build(options(model, tmp_path, budget="1kB", **changes))
    budget = int(parsed_size(str(re.findall(r"--budget (\S+)\.$", str(caught.value))[0])) * 1.1)
    report = build(options(model, tmp_path, budget=str(budget), **changes))
    assert model_bytes(report) <= budget
    assert report.allocation is not None
    formats = {part.format for part in report.allocation.parts}
    assert len(formats) > 1 and all(re.fullmatch(r"int4(-b\d+)?|fp16", name) for name in formats), formats


def test_a_cost_is_met_by_choosing_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = build(options(model, tmp_path, budget=least(model, tmp_path)))
    assert small.quality is not None
    asked = small.quality.end.weights.kl.value / 2
    monkeypatch.setattr(allocating, "KEPT", {"rtn": {4: 0.3, 8: 0.3}})  # too much is promised
    progress = Warned()
    report = build(options(model, tmp_path, max_kl=asked, force=True), progress)
    assert report.quality is not None and report.allocation is not None
    assert report.quality.end.weights.kl.value <= asked
    assert report.allocation.round > 1
    assert any("chosen again" in warning for warning in progress.warnings)
    assert model_bytes(report) > model_bytes(small)


def test_a_cost_that_is_missed_each_time_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocating, "KEPT", {"rtn": {4: 1e-9, 8: 1e-9}})
    monkeypatch.setattr(allocating, "ROUNDS", 1)
    with pytest.raises(AboveLimitError, match="ask for --max-kl"):
        build(options(model, tmp_path, max_kl=1e-4))
    assert not (tmp_path / "out").exists()


def test_the_head_stays_as_asked(model: Path, tmp_path: Path) -> None:
    budget = int(parsed_size(least(model, tmp_path, head_precision="int8")) * 1.1)
    report = build(options(model, tmp_path, budget=str(budget), head_precision="int8", quality=False))
    assert report.allocation is not None
    head = next(part for part in report.allocation.parts if part.names == ("model.embed_tokens.weight",))
    assert head.format == "int8-f16"


def test_an_interrupted_build_measures_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = least(model, tmp_path)
    assert (tmp_path / ".out.sensitivity").is_dir()  # for the budget that is asked for next
    monkeypatch.setattr(Sensitivity, "measure", lambda *_: pytest.fail("measured again"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_write_model", lambda *_: (_ for _ in ()).throw(OSError("unplugged")))
        progress = Warned()
        with pytest.raises(OSError, match="unplugged"):
            build(options(model, tmp_path, budget=budget, quality=False), progress)
        assert any(".out.sensitivity" in warning for warning in progress.warnings)
    build(options(model, tmp_path, budget=budget, quality=False))
    assert not list(tmp_path.glob(".out*"))


def test_a_file_above_the_budget_is_no_bundle(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocating, "_fixed_bytes", lambda _: 0)
    budget = least(model, tmp_path)
    with pytest.raises(LlamaExportError, match=r"above the .* of --budget"):
        build(options(model, tmp_path, budget=budget, quality=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "needs to know what for"),
        ({"budget": "1GB", "max_kl": 0.1}, "not both"),
        ({"budget": "1GB", "precision": "int4"}, "--budget is what --precision auto"),
        ({"max_kl": 0.1, "precision": None}, "--max-kl is what --precision auto"),
        ({"budget": "much"}, "--budget is a size above 0, such as 900MB"),
        ({"budget": "0"}, "--budget is a size above 0"),
        ({"budget": "-5MB"}, "--budget is a size above 0"),
        ({"budget": "1e99GB"}, "--budget is a size above 0"),
        ({"max_kl": 0.0}, "--max-kl is a KL divergence"),
        ({"max_kl": float("nan")}, "--max-kl is a KL divergence"),
        ({"max_kl": 0.1, "quality": False}, "--no-quality"),
        ({"budget": "1GB", "head_precision": "auto"}, "--head-precision auto"),
    ],
)
def test_what_does_not_go_together_is_refused(model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LlamaExportError, match=said):
        build(options(model, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_without_a_smallest_format_there_is_nothing_to_choose(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--precision auto chooses among integers in blocks"):
        build(options(model, tmp_path, budget="1GB", target="jetson-orin", jetpack="6.0"))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("900MB", 900_000_000),
        ("1.2 GB", 1_200_000_000),
        ("850MiB", 850 * 2**20),
        ("12kb", 12_000),
        ("4096", 4096),
        (" 7 B", 7),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parsed_size(text) == count
    assert limits_of(BuildOptions("m", "cpu", Path("o"), precision="auto", budget=text)) == limits.Limits(budget=count)


@pytest.mark.parametrize("count", [1, 999, 1000, 12_345, 81_234_567, 81_300_000, 999_999_999, 1_234_567_890_123])
def test_told_sizes_are_never_less(count: int) -> None:
    read = parsed_size(told_size(count))
    assert count <= read <= count * 1.011
