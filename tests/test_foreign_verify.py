"""`verify` of what another tool exported: what is asked of which, and that it can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_export import cli
from llama_export.errors import LlamaExportError, UsageError
from llama_export.progress import Silent
from llama_export.runtime.proof import verify_foreign as module
from llama_export.runtime.proof.reference import ORIGINAL, Reference
from llama_export.runtime.proof.reference_file import save
from llama_export.runtime.proof.verdict import Verdict
from llama_export.runtime.proof.verify import planned, verify
from llama_export.runtime.proof.ways import BATCH, GREEDY, ONE_PIECE, WAYS
from support.foreign_models import write_concatenated, write_grouped
from support.tiny_bundle import TinyLlama, random_llama
from support.tiny_reference import tiny_reference

LLAMA = random_llama(7)
FOLDERS: dict[str, Callable[[Path, TinyLlama], Path]] = {
    "optimum": write_concatenated,
    "genai": write_grouped,
    "last": lambda path, llama: write_grouped(path, llama, last_only=True),
    "alone": lambda path, llama: write_concatenated(path, llama, positions=False),
    "eights": lambda path, llama: write_grouped(path, llama, eights=True),
}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    save(original(), tmp_path / "reference.npz")
    return tmp_path / "reference.npz"


def original() -> Reference:
    exact = tiny_reference(LLAMA, LLAMA.weights)
    return replace(exact, index=replace(exact.index, kind=ORIGINAL, precision=None, weights=()))


def verified(folder: Path, *references: Path, max_kl: float | None = None) -> Verdict:
    return verify(folder, check_hashes=True, threads=1, progress=Silent(), references=references, max_kl=max_kl)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_same_model_passes_and_every_gate_was_planned(name: str, reference: Path, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path / "folder", LLAMA)
    verdict = verified(folder, reference)
    assert verdict.passed
    assert verdict.engine is None
    gates = [
        (check.id, case.way, case.prompt, gate.figure)
        for check in verdict.checks
        for case in check.cases
        for gate in case.gates
    ]
    assert gates == [(one.check, one.way, one.prompt, one.figure) for one in planned(folder, references=[reference])]
    ways = {case.way for case in verdict.checks[0].cases}
    assert ways == set(WAYS) - {"alone": {BATCH}, "eights": {ONE_PIECE}}.get(name, set())
    assert [check.id for check in verdict.checks] == (["full", "shipped", "cost"] if name == "eights" else ["full"])


def test_what_a_verdict_says_of_its_folder(reference: Path, tmp_path: Path) -> None:
    alone = verified(FOLDERS["alone"](tmp_path / "alone", LLAMA), reference)
    assert alone.notes[0].endswith("exported by optimum, fp32 weights.")
    assert "did not run together" in alone.notes[1]
    eights = verified(FOLDERS["eights"](tmp_path / "eights", LLAMA), reference)
    assert eights.notes[0].endswith("exported by onnxruntime-genai, 8-bit weights.")
    assert GREEDY not in {case.way for case in eights.checks[2].cases}


@pytest.mark.parametrize("name", ["optimum", "genai", "last"])
@pytest.mark.parametrize("value", [9.0, np.nan, np.inf])
def test_one_wrong_weight_fails(name: str, value: float, reference: Path, tmp_path: Path) -> None:
    gate = LLAMA.weights["1.gate"].copy()
    gate[3, 5] = value
    wrong = replace(LLAMA, weights={**LLAMA.weights, "1.gate": gate})
    verdict = verified(FOLDERS[name](tmp_path / "folder", wrong), reference)
    assert not any(case.passed for case in verdict.checks[0].cases if case.way == ONE_PIECE)


def test_a_cache_that_forgets_fails_where_nothing_else_can(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = module.ForeignReplayer._call

    def forgetful(self: module.ForeignReplayer, ids: np.ndarray, firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        self._past = [one * (np.arange(one.shape[2]) != 2)[:, None].astype(one.dtype) for one in self._past]
        return run(self, ids, firsts, counts)

    monkeypatch.setattr(module.ForeignReplayer, "_call", forgetful)
    verdict = verified(FOLDERS["eights"](tmp_path / "folder", LLAMA), reference)
    failed = {case.way for case in verdict.checks[0].cases if not case.passed}
    assert {"chunks", "decode", "batch", "rewind"} <= failed


def test_the_price_of_8_bits_can_be_limited(reference: Path, tmp_path: Path) -> None:
    folder = FOLDERS["eights"](tmp_path / "folder", LLAMA)
    (cost,) = [check for check in verified(folder, reference, max_kl=0.5).checks if check.id == "cost"]
    gate = cost.cases[-1].gates[0]
    assert (gate.figure, gate.passed) == ("max_kl", True)
    assert 0 < gate.measured < 0.05
    assert not verified(folder, reference, max_kl=0.0).passed
    assert planned(folder, references=[reference], max_kl=0.5)[-1].figure == "max_kl"


def test_what_a_reference_has_to_be(reference: Path, tmp_path: Path) -> None:
    folder, eights = (FOLDERS[name](tmp_path / name, LLAMA) for name in ("genai", "eights"))
    for references in ((), (reference, reference)):
        with pytest.raises(UsageError, match="pass just one with --reference"):
            verified(folder, *references)
    exact = tmp_path / "exact.npz"
    save(tiny_reference(LLAMA, LLAMA.weights), exact)
    with pytest.raises(UsageError, match="take an original one"):
        verified(eights, exact)
    assert verified(folder, exact).passed
    with pytest.raises(UsageError, match="is not quantised"):
        verified(folder, reference, max_kl=1.0)


def test_another_model_is_told_before_anything_runs(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ForeignReplayer", None)
    folder = write_concatenated(tmp_path / "folder", random_llama(7, layers=3))
    with pytest.raises(LlamaExportError, match="has 2 layers where it has 3"):
        verified(folder, reference)
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(reference.read_bytes()[:-2000])
    with pytest.raises(LlamaExportError):
        verified(write_grouped(tmp_path / "other", LLAMA), damaged)


def command(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_the_command(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_grouped(tmp_path / "folder", LLAMA)
    other = write_concatenated(tmp_path / "other", random_llama(8))
    told = tmp_path / "verdict.json"
    junit, html = tmp_path / "junit.xml", tmp_path / "page.html"
    options = ("--reference", reference, "--json", told, "--junit", junit, "--html", html, "-q")
    assert command("verify", folder, *options) == 0
    assert "passed" in capsys.readouterr().out
    assert json.loads(told.read_text())["passed"] is True
    assert "Full-precision kernels" in junit.read_text() + html.read_text()
    assert command("verify", folder / "model.onnx", "--reference", reference, "-q") == 0
    assert command("verify", other, "--reference", reference, "-q") == 1
    assert command("verify", folder, "-q") == 2
    assert command("verify", folder, "--reference", reference, "--any-model", "-q") == 2
    assert "is for bundles" in capsys.readouterr().err
