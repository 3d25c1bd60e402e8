"""Checking a bundle's files: every difference is found, and a stamp saves work only while nothing changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from llama_export.errors import LlamaExportError
from llama_export.runtime import hashes
from llama_export.runtime.bundle import Bundle, open_bundle, seal
from llama_export.runtime.hashes import cache_folder, check_files, differing_files, is_checked
from support.tiny_bundle import TinyLlama, manifest_for


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.onnx.data").write_bytes(bytes(range(251)) * 9)
    (folder / "sub" / "tokenizer.json").write_text("{}")
    seal(folder, manifest_for(TinyLlama({})))
    return open_bundle(folder)


def stamps(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "llama-export" / "verified").glob("*"))


def flip(path: Path, *, keep_time: bool = False) -> None:
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_first_use_hashes_and_the_next_trusts(bundle: Bundle, tmp_path: Path) -> None:
    assert not is_checked(bundle)
    assert check_files(bundle)
    assert is_checked(bundle)
    assert len(stamps(tmp_path)) == 1
    assert not check_files(bundle)
    assert check_files(bundle, force=True)


def test_one_flipped_bit_is_found(bundle: Bundle) -> None:
    check_files(bundle)
    flip(bundle.path / "model.onnx.data")
    with pytest.raises(LlamaExportError, match=r"model\.onnx\.data is damaged: its SHA-256"):
        check_files(bundle)


def test_force_finds_what_a_stamp_cannot_see(bundle: Bundle) -> None:
    check_files(bundle)
    flip(bundle.path / "model.onnx.data", keep_time=True)
    assert not check_files(bundle)
    with pytest.raises(LlamaExportError, match=r"model\.onnx\.data"):
        check_files(bundle, force=True)


def test_what_force_finds_the_next_use_finds_too(bundle: Bundle, tmp_path: Path) -> None:
    """Size, time and inode are those that the stamp vouched for."""
    check_files(bundle)
    flip(bundle.path / "model.onnx.data", keep_time=True)
    with pytest.raises(LlamaExportError):
        check_files(bundle, force=True)
    assert stamps(tmp_path) == []
    with pytest.raises(LlamaExportError, match=r"model\.onnx\.data is damaged: its SHA-256"):
        check_files(bundle)
    flip(bundle.path / "model.onnx.data", keep_time=True)
    assert check_files(bundle)
    assert not check_files(bundle)


def test_every_file_that_differs_is_named(bundle: Bundle) -> None:
    assert differing_files(bundle) == {}
    flip(bundle.path / "model.onnx.data")
    (bundle.path / "sub" / "tokenizer.json").unlink()
    found = differing_files(bundle)
    assert sorted(found) == ["model.onnx.data", "sub/tokenizer.json"]
    assert "its SHA-256 differs" in found["model.onnx.data"]
    assert "is missing (No such file or directory)" in found["sub/tokenizer.json"]


def test_a_replaced_file_of_equal_size_and_time_is_read_again(bundle: Bundle) -> None:
    check_files(bundle)
    path = bundle.path / "model.onnx.data"
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    with pytest.raises(LlamaExportError, match="SHA-256"):
        check_files(bundle)


def test_size_and_absence_are_found_without_reading(bundle: Bundle) -> None:
    check_files(bundle)
    with (bundle.path / "model.onnx.data").open("ab") as file:
        file.write(b"x")
    with pytest.raises(LlamaExportError, match="has 2260 bytes, the manifest says 2259"):
        check_files(bundle)
    (bundle.path / "sub" / "tokenizer.json").unlink()
    (bundle.path / "model.onnx.data").unlink()
    with pytest.raises(LlamaExportError, match="is missing"):
        check_files(bundle)
    (bundle.path / "model.onnx.data").mkdir()
    with pytest.raises(LlamaExportError, match="is not a file"):
        check_files(bundle)


def test_another_manifest_or_place_is_checked_anew(bundle: Bundle, tmp_path: Path) -> None:
    check_files(bundle)
    seal(bundle.path, manifest_for(TinyLlama({}), context=32))
    assert check_files(open_bundle(bundle.path))
    bundle.path.rename(tmp_path / "moved")
    assert check_files(open_bundle(tmp_path / "moved"))
    assert len(stamps(tmp_path)) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 50_000, b"null", b"\xff", b"{}", None])
def test_a_stamp_that_is_no_stamp_is_ignored(bundle: Bundle, tmp_path: Path, content: bytes | None) -> None:
    check_files(bundle)
    stamp = stamps(tmp_path)[0]
    if content is None:  # valid, but for another size
        facts = json.loads(stamp.read_text())
        facts["files"]["model.onnx.data"][0] += 1
        content = json.dumps(facts).encode()
    stamp.write_bytes(content)
    assert check_files(bundle)
    assert not check_files(bundle)


def test_a_cache_that_cannot_be_written_costs_only_time(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert check_files(bundle)
    assert check_files(bundle)


def test_a_file_that_changes_while_it_is_read_earns_no_stamp(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = hashes.sha256_of_all

    def slow(paths: object) -> object:
        result = honest(paths)  # type: ignore[arg-type]
        flip(bundle.path / "model.onnx.data")
        return result

    monkeypatch.setattr(hashes, "sha256_of_all", slow)
    assert check_files(bundle)
    assert stamps(tmp_path) == []


def test_cache_folder_ignores_a_relative_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hashes.sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "llama-export"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "llama-export"
