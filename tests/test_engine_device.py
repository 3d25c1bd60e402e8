"""`llama-export engine`: building on the device, into the cache, verified before the runtime can find it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from llama_export.cli import main
from llama_export.errors import LlamaExportError
from llama_export.progress import Silent
from llama_export.runtime import files
from llama_export.runtime.bundle import RECIPE_FILE, Bundle, open_bundle, seal
from llama_export.runtime.recipe import read_recipe
from llama_export.runtime.tensorrt import EngineFile, engine_label, find_engine
from llama_export.targets import engine_device, engine_memory
from llama_export.targets.engine_device import DeviceEngine, build_engine, release_notes
from llama_export.targets.engine_process import Built, Job
from support.fake_tensorrt import RELEASES, fake_module, write_plan
from support.fake_tensorrt_cuda import FakeCuda
from support.tiny_bundle import write_bundle
from support.tiny_tensorrt import write_tensorrt_bundle

ORIN = RELEASES["10.3"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tensorrt_bundle(tmp_path / "bundle", "trt-primitive", dtype="float16")


@pytest.fixture
def jobs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Job]:
    """An Orin with TensorRT 10.3 whose builder works at once; what it was asked for."""
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_module(ORIN, cuda))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[Job] = []

    def run(job: Job, _: Any) -> Built:
        asked.append(job)
        job.log.write_text("log")
        write_plan(job.plan, bundle, ORIN)
        return Built(ORIN.version, job.plan.stat().st_size, 1.5, 1 << 20)

    monkeypatch.setattr(engine_device, "run_builder", run)
    return asked


def make(bundle: Bundle, check: Callable[[EngineFile], None] = lambda _: None, **options: Any) -> DeviceEngine:
    return build_engine(bundle, check, Silent(), **options)


def files_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_an_engine_is_found_only_after_it_was_verified(bundle: Bundle, jobs: list[Job], tmp_path: Path) -> None:
    seen: list[EngineFile] = []

    def check(file: EngineFile) -> None:
        assert file.path.is_file()
        assert isinstance(find_engine(bundle), str)
        seen.append(file)

    made = make(bundle, check)
    found = find_engine(bundle)
    assert made.file == found
    assert len(seen) == 1
    assert made.built is not None
    assert files_below(tmp_path / "cache") == {"engine.plan", "build.log"}
    assert jobs[0].recipe.compute_capability == ("8.7",)
    assert jobs[0].label.startswith("llama-export ")


def test_a_second_call_finds_it_and_force_builds_again(bundle: Bundle, jobs: list[Job]) -> None:
    first = make(bundle)
    assert make(bundle).built is None
    assert make(bundle, force=True).file == first.file
    assert len(jobs) == 2
    assert jobs[0].timing_cache == jobs[1].timing_cache


def test_what_verification_refuses_is_not_kept(bundle: Bundle, jobs: list[Job], tmp_path: Path) -> None:
    def refuse(_: EngineFile) -> None:
        raise LlamaExportError("It computes something else.")

    with pytest.raises(LlamaExportError, match="something else"):
        make(bundle, refuse)
    assert files_below(tmp_path / "cache") == {"build.log"}
    assert isinstance(find_engine(bundle), str)


def test_a_rebuild_that_fails_leaves_the_engine_that_was_there(bundle: Bundle, jobs: list[Job]) -> None:
    def refuse(_: EngineFile) -> None:
        raise LlamaExportError("It computes something else.")

    made = make(bundle)
    with pytest.raises(LlamaExportError):
        make(bundle, refuse, force=True)
    assert find_engine(bundle) == made.file


def test_an_engine_that_is_open_on_windows_is_kept(
    bundle: Bundle, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(bundle)
    before = made.file.path.read_bytes()

    def denied(part: Path, path: Path) -> Path:
        raise PermissionError(13, "Access is denied", str(part), 5, str(path))

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(Path, "replace", denied)
    with pytest.raises(LlamaExportError, match=r"engine\.plan cannot be replaced, as a program has it"):
        make(bundle, force=True)
    assert made.file.path.read_bytes() == before
    assert not list(made.file.path.parent.glob("*.part"))


def test_an_interrupted_build_leaves_nothing(
    bundle: Bundle, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job: Job, _: Any) -> Built:
        job.log.write_text("log")
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_device, "run_builder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(bundle)
    assert files_below(tmp_path / "cache") == set()


def test_memory_that_will_not_do(bundle: Bundle, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_memory, "memory_bytes", lambda: (4 << 30, 300 << 20))
    with pytest.raises(LlamaExportError, match=r"takes about 1\.07 GB of memory, but 315 MB is free: .*--force\.$"):
        make(bundle)
    assert not jobs
    assert make(bundle, force=True).built is not None


def test_nobody_tells_how_much_memory_there_is(
    bundle: Bundle, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_memory, "memory_bytes", lambda: (0, 0))
    assert make(bundle).built is not None


def test_engines_elsewhere(bundle: Bundle, jobs: list[Job], tmp_path: Path) -> None:
    made = make(bundle, engine_dir=tmp_path / "engines")
    assert made.file.path.is_relative_to(tmp_path / "engines")
    assert find_engine(bundle, tmp_path / "engines") == made.file


def test_a_bundle_for_onnxruntime(tmp_path: Path) -> None:
    with pytest.raises(LlamaExportError, match="takes no engine"):
        make(write_bundle(tmp_path / "ort"))


RECIPES = [
    ("tensorrt", "10.3.0", True, "trt-primitive", "10.3.0", None),
    ("tensorrt", "10.3.0", True, "trt-primitive", "10.13.3", "10.13.3 is here, which takes"),
    ("tensorrt", "10.3.0", True, "trt-primitive", "11.4.1", "11.4.1 is here, which takes"),
    ("tensorrt", "10.3.0", True, "trt-primitive", "8.6.2", "for TensorRT 10 or newer, but 8.6.2 is here"),
    ("tensorrt", "8.6.2", False, "trt-primitive", "10.3.0", "10.3.0 is here, which takes"),
    ("tensorrt", "8.6.2", False, "trt-primitive", "11.4.1", "for TensorRT 8.6 to below 11, but 11.4.1 is here"),
    ("tensorrt", "10.16.2", True, "trt", "10.13.3", "for TensorRT 10.15 or newer, but 10.13.3 is here"),
    ("tensorrt_rtx", "1.7.1", True, "trt", "1.7.1.116", None),
    ("tensorrt_rtx", "1.7.1", True, "trt", "1.6.0", "for TensorRT-RTX 1.7 or newer, but 1.6.0 is here"),
]


@pytest.mark.parametrize(("module", "made_for", "strong", "dialect", "here", "told"), RECIPES)
def test_another_release_than_the_bundle_is_made_for(
    bundle: Bundle, module: str, made_for: str, strong: bool, dialect: str, here: str, told: str | None
) -> None:
    recipe = dataclasses.replace(read_recipe(bundle), module=module, version=made_for, strongly_typed=strong)
    try:
        notes = release_notes(recipe, dialect, here)
        assert told is None or told.endswith("which takes")
        assert len(notes) == (told is not None)
    except LlamaExportError as error:
        notes = (str(error),)
        assert "build it again with the --jetpack" in notes[0]
    assert told is None or told in notes[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optimization_level": 9}, "optimization_level must be from 0 to 5, not 9"),
        ({"module": "numpy"}, "module and version are not those of the manifest"),
        ({"workspace_bytes": "much"}, "workspace_bytes must be an integer"),
        ({"workspace_bytes": 10**30}, "workspace_bytes must be from 0 to"),
        ({"build_memory_bytes": -1}, "build_memory_bytes must be from 0 to"),
        ({"build_memory_bytes": 10**400}, "build_memory_bytes must be from 0 to"),
        ({"profiles": []}, "the profiles are not those that follow"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"flags": ["FP16"]}, "flags has 'FP16', but only what is not strongly typed has any"),
        ({"flags": ["FP17"], "strongly_typed": False}, "flags has 'FP17'"),
        ({"compute_capability": ["newest"]}, "compute_capability has 'newest' where one such as 8.7"),
    ],
)
def test_a_recipe_edited_into_nonsense(bundle: Bundle, jobs: list[Job], change: dict[str, Any], told: str) -> None:
    path = bundle.path / RECIPE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    seal(bundle.path, bundle.manifest)
    with pytest.raises(LlamaExportError, match=told):
        make(open_bundle(bundle.path))
    assert not jobs


def test_the_command_says_what_it_did(bundle: Bundle, jobs: list[Job]) -> None:
    done = CliRunner().invoke(main, ["engine", str(bundle.path)])
    assert done.exit_code == 0, done.output
    assert "The engine is ready: " in done.output
    assert "cannot be verified" in done.output  # this bundle has no reference
    again = CliRunner().invoke(main, ["engine", str(bundle.path), "--json", "-q"])
    facts = json.loads(again.output)
    assert facts["built"] is None
    assert Path(facts["path"]).name == "engine.plan"
    assert "is there already" in CliRunner().invoke(main, ["engine", str(bundle.path)]).output


@pytest.mark.parametrize("same", [True, False])
def test_the_command_verifies_what_was_built(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """For real, on the fake that computes with ONNX Runtime."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    bundle = write_tensorrt_bundle(tmp_path / "verified", "trt-primitive", dtype="float16", reference=True)

    def run(job: Job, _: Any) -> Built:
        write_plan(job.plan, bundle, ORIN, **({} if same else {"name": engine_label("0" * 64, "0" * 64)}))
        return Built(ORIN.version, 1, 1.0, None)

    monkeypatch.setattr(engine_device, "run_builder", run)
    done = CliRunner().invoke(main, ["engine", str(bundle.path)])
    assert done.exit_code == (0 if same else 1), done.output
    assert "cannot be verified" not in done.output
    assert isinstance(find_engine(bundle), EngineFile if same else str)
    assert same or "built from another model" in done.output
