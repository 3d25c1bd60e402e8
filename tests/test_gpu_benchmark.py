"""The benchmark for a GPU, as far as it goes without one: everything but the speeds is what it will be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the benchmark compares with PyTorch")

from llama_export.benchmarks import gpu, gpu_card  # noqa: E402 (need PyTorch)
from llama_export.benchmarks.checkpoints import SHAPES  # noqa: E402

TINY = {
    **SHAPES["llama-3.2-1b"],
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"intermediate_size": 96, "vocab_size": 320, "bos_token_id": 318, "eos_token_id": 319},
}
UNTIED = {**TINY, "tie_word_embeddings": False}
SIZES = ("--contexts", "16,40", "--prompt", "33", "--new", "4", "--rounds", "2")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)  # type: ignore[arg-type]
    monkeypatch.setitem(SHAPES, "untied", UNTIED)  # type: ignore[arg-type]
    monkeypatch.setitem(gpu_card.COPIED_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(gpu_card, "try_tensorrt_rtx", lambda: {"outcome": "not tried"})


def run(folder: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    files = ("--json", str(folder / "out.json"), "--markdown", str(folder / "out.md"))
    status = gpu.main(["--device", "cpu", "--work", str(folder / "work"), *files, *SIZES, *more])
    return status, json.loads((folder / "out.json").read_text()), (folder / "out.md").read_text()


def test_a_dry_run_measures_every_engine_and_keeps_what_it_made(tmp_path: Path) -> None:
    status, found, table = run(tmp_path, "--models", "tiny", "--verify", "tiny", "--precisions", "fp16,int4")
    assert status == 0
    (model,) = found["models"]
    names = [row["engine"] for row in model["engines"]]
    assert names == [gpu.EAGER, "transformers, torch.compile", "llama-export fp16", "llama-export int4"]
    for row in model["engines"]:
        assert "error" not in row
        assert set(row["tokens_per_second"]) == {"prefill", "decode at 16", "decode at 40"}
        assert all(speed > 0 for speed in row["tokens_per_second"].values())
        assert len(row["rounds"]) == 2
    compiled, half = (model["engines"][index] for index in (1, 2))
    assert compiled["agreement"]["same_token"] == half["agreement"]["same_token"] == 1
    assert half["agreement"]["largest_difference"] < 0.05 * half["agreement"]["standard_deviation"]
    assert {precision: found["passed"] for precision, found in model["verify"].items()} == {"fp16": True, "int4": True}
    assert found["facts"]["date"].startswith("20")
    assert "torch" in found["facts"]["versions"]
    assert "| llama-export int4 |" in table
    assert len(list((tmp_path / "work" / "bundles" / "tiny").iterdir())) == 2


def test_bytes_of_a_token_leave_out_an_embedding_that_is_looked_up(tmp_path: Path) -> None:
    _, found, _ = run(tmp_path, "--models", "tiny,untied", "--precisions", "fp16", "--verify", "")
    tied, untied = ({row["engine"]: row["bytes_per_token"] for row in model["engines"]} for model in found["models"])
    assert tied[gpu.EAGER] == untied[gpu.EAGER]  # the head is as large as the embedding
    assert tied["llama-export fp16"] == pytest.approx(untied["llama-export fp16"], rel=0.01)


def test_one_engine_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", compiled)
    status, found, table = run(tmp_path, "--models", "tiny", "--precisions", "fp16,fp4", "--verify", "")
    assert status == 0
    (model,) = found["models"]
    assert "fp4" in model["failures"]["fp4"]
    errors = {row["engine"]: row.get("error") for row in model["engines"]}
    assert errors == {
        gpu.EAGER: None,
        "transformers, torch.compile": "RuntimeError: CUDA out of memory",
        "llama-export fp16": None,
    }
    assert "- transformers, torch.compile: RuntimeError: CUDA out of memory" in table


@pytest.mark.parametrize(("model", "message"), [("smollm2", "needs --gguf"), ("llama-9", "no model 'llama-9'")])
def test_a_model_that_cannot_be_had_is_told(
    tmp_path: Path, model: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, _ = run(tmp_path, "--models", model)
    assert status == 1
    assert message in found["models"][0]["failures"][model]
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu.main(["--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]) == 1
    assert "sees no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_trying_tensorrt_rtx_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = gpu_card.try_tensorrt_rtx()
    assert found["outcome"]


@pytest.mark.smollm2
def test_smollm2_comes_from_its_gguf(smollm2_gguf: Path, tmp_path: Path) -> None:
    folder = gpu.checkpoint(gpu.SMOLLM2, tmp_path, smollm2_gguf)
    assert (folder / "model.safetensors").is_file()
    assert gpu.checkpoint(gpu.SMOLLM2, tmp_path, None) == folder
