"""The benchmark that proves a model in every dialect and precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the benchmark compares with PyTorch")

from llama_export.benchmarks import parity  # noqa: E402 (needs PyTorch)
from llama_export.errors import LlamaExportError  # noqa: E402
from llama_export.runtime.proof.ways import GREEDY, WAYS  # noqa: E402
from support.hf_models import write_llama_folder  # noqa: E402


def test_every_way_of_two_dialects_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, found = write_llama_folder(tmp_path / "tiny", head_dim=24, tied=True), tmp_path / "found.json"
    parity.main([str(model), "--dialects", "ort,canonical", "--precisions", "int4", "--json", str(found)])
    rows = json.loads(found.read_text())["rows"]
    assert [(row["dialect"], row["precision"]) for row in rows] == [("ort", "int4"), ("canonical", "fp32")]
    for row in rows:
        assert set(row["cells"]) == set(WAYS), row["problem"]
        for way, cell in row["cells"].items():
            assert cell["passed"], (row["dialect"], way)
            assert way == GREEDY or 0 < cell["figures"]["difference"] < 1e-4
    assert "| tiny | canonical | fp32 |" in capsys.readouterr().out


def test_what_cannot_be_built_is_told_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise LlamaExportError("It does not fit.")

    monkeypatch.setattr(parity, "build", refuse)
    model = write_llama_folder(tmp_path / "tiny")
    (row,) = parity.rows_of(model, parity.Asked(("ort",), ("int4",), context=64, calibrate=None))
    assert not row.cells
    assert "It does not fit." in parity.lines([row])


def test_precisions_that_need_a_calibration_are_left_out_without_one() -> None:
    asked = parity.Asked(("trt", parity.CANONICAL), ("fp32", "int8", "int4"), context=64, calibrate=None)
    assert list(asked.combinations()) == [("trt", "int4"), (parity.CANONICAL, "fp32")]
