"""What an interrupted quantisation leaves: the next one goes on there, and trusts nothing that is damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.quantising import Method, Run, calibrated, opened_work, work_path
from llama_export.export.quantising import work as work_module
from llama_export.export.quantising.statistics import Statistics
from llama_export.optimize.formats import Format
from llama_export.optimize.tensors import Blocks
from llama_export.progress import Silent
from support.graphs import llama
from test_quantising import Asked, in_memory, run_of

KEY = {"model": "a", "formats": "b"}


class Heard(Silent):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.counts: list[tuple[float, int, int]] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def count(self, done: float, total: int, before: int = 0) -> None:
        self.counts.append((done, total, before))


class Stops(Asked):
    """Ends with an error before it answers for the nth time."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after

    def solve(self, weight: torch.Tensor, statistics: Statistics, format: Format) -> Blocks:
        if len(self.weights) == self._after:
            raise KeyboardInterrupt
        return super().solve(weight, statistics, format)


def values(run: Run, work: Path, progress: Silent | None = None) -> dict[str, bytes]:
    """The bits of every tensor."""
    with opened_work(work, run.key) as folder:
        found = calibrated(run, folder, progress or Silent())
        tensors = {name: in_memory(one) for name, one in found.tensors.items()}
    return {name: tensor.read(0, tensor.shape[0]).tobytes() for name, tensor in tensors.items()}


def stopped(run: Run, work: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        values(run, work)
    assert work.is_dir()


def names(work: Path) -> list[str]:
    """The files that hold anything, without their hashes."""
    return sorted(path.name.rpartition("-")[0] for path in work.glob("*.safetensors"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Without an interruption."""
    return values(run_of(llama(), Asked().method(scaling=True, cross=True)), tmp_path_factory.mktemp("whole") / "work")


def going_on(asked: Asked) -> Run:
    return run_of(llama(), asked.method(scaling=True, cross=True))


@pytest.mark.parametrize("after", [5, 7, 17, 21])
def test_a_build_goes_on_after_the_last_finished_layer(after: int, whole: dict[str, bytes], tmp_path: Path) -> None:
    work, layers = tmp_path / "work", after // 7
    with pytest.raises(KeyboardInterrupt):
        values(going_on(Stops(after)), work)
    assert work.exists() == (layers > 0)  # nothing that would help is not kept
    if layers:
        assert names(work) == [*(f"layer-{index:04}" for index in range(layers)), f"states-{layers - 1:04}"]
    asked, heard = Asked(), Heard()
    assert values(going_on(asked), work, heard) == whole
    assert len(asked.weights) == 22 - 7 * layers
    assert any(f"Going on after {layers} layers" in title for title in heard.stages) == (layers > 0)
    assert not work.exists()
    assert heard.counts[-1][:2] == (4, 4)
    assert [done for done, _, _ in heard.counts] == sorted(done for done, _, _ in heard.counts)
    assert heard.counts[0][2] == layers  # so that the time that is left is told right


def test_a_finished_quantisation_is_taken_over_whole(whole: dict[str, bytes], tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(ZeroDivisionError), opened_work(work, going_on(Asked()).key) as folder:
        calibrated(going_on(Asked()), folder, Silent())
        raise ZeroDivisionError  # a later stage fails
    asked = Asked()
    assert values(going_on(asked), work) == whole
    assert not asked.weights


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, flipped, emptied, made_a_folder, Path.unlink])
@pytest.mark.parametrize(("stem", "again"), [("layer-0001", 7 + 8), ("layer-0000", 7 + 8), ("states-0001", 8)])
def test_a_damaged_file_is_made_again(
    damage: Callable[[Path], Any], stem: str, again: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    stopped(going_on(Stops(17)), work)
    damage(next(work.glob(f"{stem}-*")))
    asked = Asked()
    assert values(going_on(asked), work) == whole
    assert len(asked.weights) == again


def test_a_layer_without_its_states_is_taken_over(whole: dict[str, bytes], tmp_path: Path) -> None:
    """As where the process ends between the two."""
    work, kept = tmp_path / "work", tmp_path / "kept"
    stopped(going_on(Stops(10)), work)
    shutil.copytree(work, kept)
    stopped(going_on(Stops(7)), work)  # one layer more
    for path in kept.glob("states-*"):
        shutil.copy(path, work)
    for path in work.glob("states-0001-*"):
        path.unlink()
    asked = Asked()
    assert values(going_on(asked), work) == whole
    assert len(asked.weights) == 8


def test_other_settings_begin_anew(tmp_path: Path) -> None:
    work, asked = tmp_path / "work", Asked()
    first, run = going_on(Stops(10)), run_of(llama(), asked.method(), scale_dtype="float16")
    stopped(first, work)
    (work / "layer-0009.part").write_bytes(b"cut short")
    assert run.key != first.key
    found = values(run, work)
    assert len(asked.weights) == 22
    assert found == values(run, tmp_path / "fresh")


@pytest.mark.parametrize(
    "change",
    [
        {"scale_dtype": "float16"},
        {"scaling": False},
        {"text": run_of(llama(), Asked().method()).text.first(20)},
    ],
    ids=["scales", "scaling", "text"],
)
def test_what_changes_codes_changes_the_key(change: dict[str, Any]) -> None:
    model, method = llama(), Asked().method(scaling=True)
    assert run_of(model, method, **change).key != run_of(model, method).key
    assert run_of(model, method).key == run_of(model, Asked().method(scaling=True)).key


def test_the_key_knows_formats_method_and_model() -> None:
    model, method = llama(), Asked().method()
    run = run_of(model, method)
    formats = dict(run.formats)
    formats["model.layers.0.mlp.up_proj.weight"] = formats["model.norm.weight"]
    others = [
        run_of(model, method, formats),
        run_of(model, Method("nearest", 2, "", method.solve)),
        run_of(model, Method("nearest", 1, "", method.solve, settings={"damping": 0.1})),
        Run(run.source, "1" * 64, run.formats, run.scale_dtype, run.text, run.context, method),
    ]
    assert len({json.dumps(one.key, sort_keys=True) for one in (run, *others)}) == 5


def test_two_builds_at_once(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with opened_work(work, KEY) as folder:
        folder.save("layer-0000", {"x": np.ones(3, np.float32)})
        with pytest.raises(UsageError, match=r"Another build is quantising in .*work now"), opened_work(work, KEY):
            pass
        assert names(work) == ["layer-0000"]
    assert not work.exists()
    with opened_work(work, KEY):
        assert work.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name another place"), opened_work(tmp_path / "file" / "work", KEY):
        pass
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link"), opened_work(tmp_path / "link", KEY):
        pass
    assert not any((tmp_path / "elsewhere").iterdir())


def test_what_is_found_is_what_was_saved(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.arange(10, dtype=np.uint8).reshape(2, 5)}
    with opened_work(tmp_path / "work", KEY) as work:
        for found in (work.save("x-1", arrays), work.find("x-1")):
            assert found is not None
            assert {name: one.array(0, len(arrays[name])).tolist() for name, one in found.items()} == {
                name: array.tolist() for name, array in arrays.items()
            }
        assert work.find("x") is None
        work.save("x-1", {"a": arrays["a"] + 1})
        assert len(list((tmp_path / "work").glob("x-1-*"))) == 1
        work.remove("x-1")
        assert work.find("x-1") is None


def test_a_full_disk_is_told_and_keeps_what_was_finished(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, write = tmp_path / "work", work_module._write

    def full(path: Path, arrays: Any) -> str:
        if path.name.startswith("layer-0002"):
            path.write_bytes(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, arrays)

    monkeypatch.setattr(work_module, "_write", full)
    with pytest.raises(LlamaExportError, match=r"disk of .*work is full; free space and build again"):
        values(going_on(Asked()), work)
    assert names(work) == ["layer-0000", "layer-0001", "states-0001"]
    assert not list(work.glob("*.part"))
    monkeypatch.undo()
    asked = Asked()
    assert values(going_on(asked), work) == whole
    assert len(asked.weights) == 8


def test_the_folder_is_hidden_and_beside_the_bundle() -> None:
    assert work_path(Path("/a/b/bundle")) == Path("/a/b/.bundle.quantising")


CHILD = """
import json, resource
from pathlib import Path
import numpy as np
from llama_export.export.calibration_text import CalibrationText
from llama_export.export.quantising import Method, Run, calibrated, opened_work
from llama_export.export.source import Source
from llama_export.optimize.formats import FP32
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.quantise import quantise
from llama_export.optimize.tensors import SourceTensor
from llama_export.export.config import expected_tensors
from llama_export.progress import Silent

def tensor(name, shape):
    def read(start, stop):  # made as it is read, so that nothing but the driver can hold it
        rows = np.random.default_rng(start).standard_normal((stop - start, *shape[1:]), np.float32)
        return rows * np.float32(0.05) + (1 if len(shape) == 1 else 0)
    return SourceTensor(name, shape, "F32", FP32, read)

def model(folder, layers, hidden, ffn, vocab):
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=hidden, intermediate_size=ffn,
        num_hidden_layers=layers, vocab_size=vocab, num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-5,
        tie_word_embeddings=False, max_position_embeddings=64)
    shapes = expected_tensors(config)
    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    source = Source("m", None, "folder", config, tensors, {}, None, None)
    text = CalibrationText(Path("x"), tuple(tuple(range(start, start + 60)) for start in range(0, 240, 60)), "", 0)
    method = Method("nearest", 1, "Nearest", lambda weight, _, format: quantise(weight.numpy(), format))
    run = Run(source, "0" * 64, plan_formats(tensors, "int4"), "float32", text, 64, method)
    with opened_work(folder, run.key) as work:
        found = calibrated(run, work, Silent())
        for one in found.tensors.values():
            for start in range(0, one.shape[0], 256):
                one.read(start, min(one.shape[0], start + 256))
    size = lambda names: sum(int(np.prod(shapes[name])) * 4 for name in names)
    return size(shapes), size(name for name in shapes if ".layers.0." in name)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model(Path("small"), 2, 64, 96, 300)
before = peak()
whole, layer = model(Path("large"), 16, 640, 1536, 9000)
print(json.dumps({"grown": peak() - before, "model": whole, "layer": layer}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_the_memory_is_that_of_a_layer_and_not_of_the_model(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] > 12 * found["layer"]
    assert found["grown"] < found["model"] / 3, found
