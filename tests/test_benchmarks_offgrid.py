"""The benchmark's models off the grid: the function stays, the weights move; and random ones with large channels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from llama_export.benchmarks import importance, offgrid
from llama_export.benchmarks.checkpoints import SHAPES
from llama_export.export.gguf.source import gguf_name
from llama_export.export.source import open_source
from support.hf_models import write_llama_folder

ODD = {"layers": 2, "hidden": 48, "heads": 6, "kv_heads": 2, "head_dim": 10, "ffn": 56, "vocab": 270}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_llama_folder(tmp_path / "model", **ODD, tied=request.param, attention_bias=True, mlp_bias=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["offgrid.py", *map(str, arguments)])
    return offgrid.main()


def test_the_function_stays_and_the_weights_move(folder: Path, tmp_path: Path) -> None:
    difference = offgrid.write_off_grid(str(folder), tmp_path / "moved", offgrid.log_normal(0.5), seed=3)
    assert difference <= offgrid.TOLERANCE
    before, after = (offgrid.read_weights(open_source(str(path))) for path in (folder, tmp_path / "moved"))
    assert before.keys() == after.keys()
    tied = "lm_head.weight" not in before
    kept = {"model.embed_tokens.weight", *(["model.norm.weight"] if tied else [])}
    kept |= {name for name in before if name.endswith(("q_proj.bias", "k_proj.bias", "o_proj.bias", "gate_proj.bias"))}
    kept |= {name for name in before if name.endswith("down_proj.bias")}
    for name, values in before.items():
        assert np.array_equal(values, after[name]) == (name in kept), name
    norms = [name for name in after if name.endswith("norm.weight") and name not in kept]
    assert norms
    assert all((after[name] == 1).all() for name in norms)


def test_scales_depend_on_the_seed_and_are_as_wide_as_asked(folder: Path) -> None:
    source = open_source(str(folder))
    weights = offgrid.read_weights(source)
    name = "model.layers.1.mlp.down_proj.weight"

    def scales(seed: int, kind: offgrid.Scales) -> np.ndarray:
        return weights[name][0] / offgrid.off_grid(weights, source.shape, kind, seed)[name][0]

    assert np.array_equal(scales(1, offgrid.log_normal(0.5)), scales(1, offgrid.log_normal(0.5)))
    assert not np.array_equal(scales(1, offgrid.log_normal(0.5)), scales(2, offgrid.log_normal(0.5)))
    assert np.log(scales(1, offgrid.log_normal(0.5))).std() == pytest.approx(0.5, rel=0.3)
    spread = scales(1, offgrid.log_uniform(3))
    assert 1 / 3.001 < spread.min() < 0.5
    assert 2 < spread.max() < 3.001


def test_a_model_that_computes_something_else_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = offgrid.off_grid

    def wrong(*given: object) -> offgrid.Exact:
        result = right(*given)
        result["model.layers.1.mlp.up_proj.weight"] = result["model.layers.1.mlp.up_proj.weight"] * 1.01
        return result

    monkeypatch.setattr(offgrid, "off_grid", wrong)
    assert run(monkeypatch, folder, tmp_path / "moved") == 1
    assert "differ by" in capsys.readouterr().err
    assert not list(tmp_path.glob("moved*"))


def test_what_is_there_is_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, folder, folder, "--uniform", "2", "--seed", "1") == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--sigma", "-1"), ("--uniform", "0.5"), ("--sigma", "1", "--uniform", "2")])
def test_widths_that_make_no_sense_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, folder, tmp_path / "moved", *options)


def test_a_random_model_has_channels_as_large_as_its_outliers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "llama-tiny", tmp_path / "wide", "--outliers", "--seed", "5") == 0
    assert "times as large" in capsys.readouterr().out
    source = open_source(str(tmp_path / "wide"))
    weights = offgrid.read_weights(source)
    outliers = offgrid.choose_outliers(SHAPES["llama-tiny"]["hidden_size"], 5)
    others = np.delete(np.arange(source.shape.hidden), outliers.channels)
    table = weights["model.embed_tokens.weight"].std(0)
    assert table[outliers.channels] / np.median(table[others]) == pytest.approx(outliers.factors, rel=0.2)
    found = offgrid.logits(source.config, weights, np.arange(200).reshape(4, 50)).std(-1).mean()
    assert offgrid.LOGITS_DEVIATION / 2 < found < offgrid.LOGITS_DEVIATION * 2


def test_outliers_need_a_published_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "llama-9", tmp_path / "wide", "--outliers") == 1
    assert "llama-tiny" in capsys.readouterr().err


def test_importance_is_the_mean_square_of_what_each_projection_reads(folder: Path) -> None:
    source = open_source(str(folder))
    found = importance.mean_squares(folder, "The quick brown fox jumps over the lazy dog. " * 40, most=600)
    matrices = {gguf_name(name): tensor.shape for name, tensor in source.tensors.items() if "proj.weight" in name}
    assert {name: (len(values),) for name, values in found.items()} == {
        name: (shape[1],) for name, shape in matrices.items()
    }
    assert np.array_equal(found["blk.0.attn_q.weight"], found["blk.0.attn_k.weight"])
    norm = source.tensors["model.layers.0.input_layernorm.weight"].read(0, source.shape.hidden)
    # Of what a norm gives, divided by the norm's weights, the mean square is 1.
    assert np.mean(found["blk.0.attn_q.weight"] / norm**2) == pytest.approx(1, rel=1e-2)
