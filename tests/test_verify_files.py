"""What `verify` says of a bundle's files: first of all, counted, and also where there is nothing to replay."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from llama_export import verifying
from llama_export.cli import main
from llama_export.errors import LlamaExportError
from llama_export.runtime.bundle import Bundle
from llama_export.runtime.proof.stored_numbers import bytes_at
from support.tiny_bundle import write_bundle

pytest.importorskip("onnxruntime", reason="a bundle needs ONNX Runtime")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Without a reference."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_bundle(tmp_path / "bundle")


def verify(bundle: Bundle, *options: object) -> Result:
    return CliRunner().invoke(main, ["verify", str(bundle.path), "--quiet", *map(str, options)])


def damage(bundle: Bundle) -> None:
    """Change one file, keeping its time, and remove another."""
    path = bundle.path / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    (bundle.path / "tokenizer_config.json").unlink()


def test_without_a_reference_sound_files_are_not_proof(bundle: Bundle) -> None:
    result = verify(bundle)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has no exact reference to compare with" in result.stderr


def test_files_that_differ_are_counted_without_a_reference_too(bundle: Bundle) -> None:
    damage(bundle)
    result = verify(bundle, "--json", "-")
    assert (result.exit_code, result.stderr) == (1, "")
    verdict = json.loads(result.stdout)
    files, rest = verdict["runs"][0]["checks"]
    assert [(gate["measured"], gate["passed"]) for gate in files["cases"][0]["gates"]] == [(2, False)]
    assert "model.onnx.data is damaged" in files["details"][0]
    assert "tokenizer_config.json is missing" in files["details"][1]
    assert "has no exact reference" in rest["error"]
    assert verify(bundle).stdout.splitlines()[-1].startswith("FAILED: Files: files that differ from the manifest; ")


def test_the_verdict_is_shown_even_where_it_cannot_be_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path) + ".part")

    monkeypatch.setattr(verifying, "written_whole", full)
    damage(bundle)
    result = verify(bundle, "--json", tmp_path / "verdict.json")
    assert result.exit_code == 1
    assert "FAILED: Files" in result.stdout
    assert "verdict.json" in result.stderr
    assert ".part" not in result.stderr


def test_another_dialect_is_told_before_anything_is_read(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    damage(bundle)
    manifest = bundle.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"dialect": "ort"', '"dialect": "trt"'))
    assert "backend 'onnxruntime' must be one that takes the dialect 'trt'" in verify(bundle).stderr


class Hesitant(FileIO):
    """Gives three bytes at most, as a read may."""

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return super().readinto(buffer[:3])


@pytest.mark.parametrize("kind", [FileIO, Hesitant])
def test_reading_goes_on_until_all_is_there(tmp_path: Path, kind: Callable[[Path], FileIO]) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(200)))
    with kind(path) as file:
        assert bytes_at(190, 10, file) == bytes(range(190, 200))
        assert bytes_at(5, 100, file) == bytes(range(5, 105))
        with pytest.raises(LlamaExportError, match="became shorter while it was read"):
            bytes_at(190, 11, file)


def test_reports_that_could_not_be_written_are_refused_before_anything_runs(bundle: Bundle, tmp_path: Path) -> None:
    for options, said in (
        (("--json", tmp_path), "is a folder"),
        (("--html", tmp_path / "absent/x.html"), "is not there"),
        (("--json", "x", "--junit", tmp_path / "x"), "name one file"),
    ):
        result = verify(bundle, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert said in result.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_report_takes_the_place_of_no_device_or_link(bundle: Bundle, tmp_path: Path) -> None:
    pipe, link, file = (tmp_path / name for name in ("pipe", "link", "file"))
    os.mkfifo(pipe)
    file.write_text("old")
    link.symlink_to(file)
    damage(bundle)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        verify(bundle, "--json", pipe, "--html", link)
        assert pipe.is_fifo()
        assert json.loads(os.read(reader, 1 << 16))["passed"] is False
    finally:
        os.close(reader)
    assert link.is_symlink()
    assert "<html" in file.read_text()
