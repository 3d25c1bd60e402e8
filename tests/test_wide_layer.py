"""The benchmark of one very wide layer: it measures a build, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from llama_export.export.config import expected_tensors

pytest.importorskip("llama_export.benchmarks", reason="the benchmarks are not installed with the package")
from llama_export.benchmarks import checkpoints, export, wide_layer


def test_the_layer_is_as_wide_as_the_largest_model() -> None:
    shapes = expected_tensors(wide_layer.one_layer())
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (53248, 16384)
    assert {name for name in shapes if "layers" in name} == {name for name in shapes if "layers.0." in name}
    size = sum(tensor.nbytes for tensor in checkpoints.tensors(wide_layer.one_layer()))
    assert round(size / 1e9, 1) == 14.8


def test_a_build_is_measured_and_everything_removed(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="building needs PyTorch")
    config = {**checkpoints.SHAPES["llama-tiny"], "num_hidden_layers": 1}
    found = wide_layer.measured(config, tmp_path, context=64, seed=0, shard_bytes=500_000)
    assert found["status"] == 0
    assert found["files"] > 2
    assert found["peak_rss"] >= found["peak_anon"] > 50e6
    assert 0 < found["output_bytes"] < found["checkpoint_bytes"]
    assert "peak RSS" in wide_layer.table(found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def interrupted(*_: object) -> None:
        assert len(list(tmp_path.glob("wide-layer-*/checkpoint/*.safetensors"))) == 1
        os.kill(os.getpid(), number)

    monkeypatch.setattr(export, "run", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        wide_layer.measured(checkpoints.SHAPES["llama-tiny"], tmp_path, 64, 0, 10**9)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=24_000_000_000))
    monkeypatch.setattr(sys, "argv", ["wide_layer.py", "--work", str(tmp_path)])
    assert wide_layer.main() == 1
    assert "choose another --work" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("peak", "status"), [(1_999_000_000, 0), (2_001_000_000, 1)])
def test_a_peak_above_the_limit_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: int, status: int) -> None:
    found = {"checkpoint_bytes": 1, "files": 1, "seconds": 1.0, "read_bytes_per_second": 1, "peak_anon": 1}
    monkeypatch.setattr(wide_layer, "measured", lambda *_: {**found, "peak_rss": peak, "output_bytes": 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(sys, "argv", ["wide_layer.py", "--work", str(tmp_path)])
    assert wide_layer.main() == status
