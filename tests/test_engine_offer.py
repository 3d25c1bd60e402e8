"""At the first run a device is offered its engine: asked on a terminal, never built unasked."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from llama_export import cli_support, engine_report
from llama_export.errors import LlamaExportError
from llama_export.runtime.bundle import EngineRecord
from support.tiny_bundle import manifest_for, random_llama


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions; each is answered with yes."""
    questions: list[str] = []
    monkeypatch.setattr(cli_support, "on_terminal", lambda: True)
    monkeypatch.setattr(click, "confirm", lambda text, **_: questions.append(text) or True)
    return questions


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Where engines were built."""
    folders: list[Path | None] = []
    monkeypatch.setattr(engine_report, "build_and_verify", lambda *_, engine_dir: folders.append(engine_dir))
    monkeypatch.setattr(engine_report, "lines", lambda _: ["The engine is ready."])
    return folders


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for TensorRT, whose engine this device can build."""
    engine = EngineRecord("tensorrt", "10.3.0")
    manifest = manifest_for(random_llama(), backend="tensorrt", dialect="trt-primitive", engine=engine)
    opened = type("Opened", (), {"manifest": manifest})
    monkeypatch.setattr("llama_export.runtime.bundle.open_bundle", lambda _: opened)
    monkeypatch.setattr(engine_report, "can_be_built", lambda *_: True)
    return Path("bundle")


def test_a_yes_builds_and_verifies(bundle: Path, asked: list[str], built: list[Path | None], tmp_path: Path) -> None:
    cli_support.offer_engine(bundle, tmp_path)
    assert len(asked) == 1
    assert built == [tmp_path]


def test_nothing_is_asked_where_nobody_answers(
    bundle: Path, asked: list[str], built: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_support, "on_terminal", lambda: False)
    cli_support.offer_engine(bundle, None)
    assert (asked, built) == ([], [])


def test_nothing_is_asked_where_no_engine_can_be_built(
    bundle: Path, asked: list[str], built: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_report, "can_be_built", lambda *_: False)
    cli_support.offer_engine(bundle, None)
    assert (asked, built) == ([], [])


def test_an_engine_can_be_built_where_module_and_gpu_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineRecord("tensorrt", "10.3.0")
    manifest = manifest_for(random_llama(), backend="tensorrt", dialect="trt-primitive", engine=engine)
    opened = type("Opened", (), {"manifest": manifest})

    def missing(*_: object) -> None:
        raise LlamaExportError("There is none.")

    monkeypatch.setattr(engine_report, "find_engine", lambda *_: "No engine was built on this device yet.")
    monkeypatch.setattr(engine_report, "import_module", lambda _: object())
    monkeypatch.setattr(engine_report, "this_gpu", object)
    assert engine_report.can_be_built(opened)
    monkeypatch.setattr(engine_report, "this_gpu", missing)
    assert not engine_report.can_be_built(opened)
    monkeypatch.setattr(engine_report, "import_module", missing)
    assert not engine_report.can_be_built(opened)


def test_a_bundle_for_onnx_runtime_has_no_engine_to_build() -> None:
    opened = type("Opened", (), {"manifest": manifest_for(random_llama())})
    assert not engine_report.can_be_built(opened)
