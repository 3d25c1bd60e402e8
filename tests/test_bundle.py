"""The manifest and the folder around it: what is written is read back, and nothing crooked is accepted."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime.bundle import (
    AdapterRecord,
    FileRecord,
    Limits,
    Manifest,
    Tokens,
    is_safe_name,
    open_bundle,
    seal,
)
from llama_export.runtime.hashes import check_files
from llama_export.runtime.hashing import sha256_of
from support.tiny_bundle import TinyLlama, manifest_for, write_bundle

MANIFEST = manifest_for(TinyLlama({}))


def changed(path: str, value: Any) -> str:
    """Return the manifest's JSON with the value at a dotted path replaced; a value of ... removes the key."""
    tree = json.loads(MANIFEST.to_json())
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return json.dumps(tree)


def test_json_round_trip() -> None:
    full = dataclasses.replace(
        MANIFEST, files={"b/c.txt": FileRecord("0" * 64, 7)}, tools={"torch": "2.13.0"}, notes=("Größe",)
    )
    assert Manifest.from_json(full.to_json()) == full
    assert next(iter(json.loads(full.to_json()))) == "schema_version"


def test_newer_schema_says_upgrade() -> None:
    with pytest.raises(LlamaExportError, match=r"schema version 2.*reads up to 1.*upgrade"):
        Manifest.from_json(changed("schema_version", 2))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", ..., "schema_version 1, not None"),
        ("schema_version", "1", "schema_version 1, not '1'"),
        ("shape.layers", "30", r"shape\.layers must be an integer, not '30'"),
        ("shape.layers", True, r"shape\.layers must be an integer, not True"),
        ("shape.layers", 0, r"shape\.layers must be from 1"),
        ("shape.kv_heads", 4, "multiple"),
        ("shape.kv_heads", 12, r"kv_heads must be from 1 to 6"),
        ("shape.cache_dtype", "int4", "cache_dtype must be one of float32, float16"),
        ("limits.context", 1 << 40, r"limits\.context must be from 1"),
        ("limits.contxt", 5, r"unknown key 'contxt'. Did you mean 'context'\?"),
        ("tokens.eos", 257, r"tokens\.eos must be a list"),
        ("tokens.eos", [257, 261], r"tokens\.eos must be from 0 to 260, not 261"),
        ("tokens.bos", -1, r"tokens\.bos must be"),
        ("dialect", "torch", "dialect must be one of ort, trt"),
        ("minimum", {"onnxruntime": "new"}, r"minimum\.onnxruntime must be a version"),
        ("minimum", {"onnxruntime": "9" * 5000}, r"minimum\.onnxruntime must be a version"),
        ("target", ..., "lacks the key 'target'"),
        ("files", {"a": {"sha256": "xyz", "size": 1}}, "64 hexadecimal"),
        ("files", {"a": {"sha256": "0" * 64, "size": -1}}, "size must be from 0"),
        ("files", {"../a": {"sha256": "0" * 64, "size": 1}}, r"'\.\./a', which does not name a file inside"),
        ("files", {"\ud800": {"sha256": "0" * 64, "size": 1}}, "does not name a file inside"),
        ("files", [], "files must be an object"),
        ("notes", ["a", 3], r"notes\[1\] must be a string"),
    ],
)
def test_wrong_values_are_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(LlamaExportError, match=message):
        Manifest.from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema_version": 1}', "[" * 100_000])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(LlamaExportError):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../x", "/etc/passwd", "a//b", "a/", "a\\b", "C:x", "a\0b", "./a", "manifest.json"],
)
def test_unsafe_names(name: str) -> None:
    assert not is_safe_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("CON", "nul", "Aux.txt", "sub/prn", "nul.tar.gz", "COM1", "lpt9.log", "com¹", "CONIN$", "NUL .txt"),
        *("a.", "a ", "sub./x", "sub /x", ". ", "...", "C:/x", "\\\\server\\share", "a:stream", "sub/..\\x"),
        *("Manifest.json", "MANIFEST.JSON", "a?", "a\n", "a|b"),
    ],
)
def test_names_that_are_something_else_on_windows(name: str) -> None:
    """Devices, names whose end Windows drops, drives, streams, wildcards, and the manifest in other letters."""
    assert not is_safe_name(name)


def test_safe_names() -> None:
    names = [
        "a",
        "model.onnx.data",
        "engine/sm_89.plan",
        "..a",
        "a b",
        "é",
        "console",
        "com",
        "com10",
        "null.txt",
        " a",
    ]
    assert all(map(is_safe_name, names))


def test_files_that_are_one_where_case_does_not_count() -> None:
    record = {"sha256": "0" * 64, "size": 1}
    with pytest.raises(LlamaExportError, match="'A/b' and 'a/B', which are one file where case does not count"):
        Manifest.from_json(changed("files", {"A/b": record, "c": record, "a/B": record}))


def test_adapters_that_are_one_where_case_does_not_count() -> None:
    adapters = tuple(AdapterRecord(name, None, 1.0, 4, "0" * 64) for name in ("Tone", "tone"))
    with pytest.raises(LlamaExportError, match="adapters must have names of their own"):
        dataclasses.replace(MANIFEST, adapters=adapters)


def test_seal_records_every_file_and_opens(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 3_000_001)
    (tmp_path / "engine" / "plan").write_bytes(b"")
    (tmp_path / "manifest.json.part").write_bytes(b"left over")
    sealed = seal(tmp_path, MANIFEST)
    assert sealed.files == {
        "a.bin": FileRecord(sha256_of(tmp_path / "a.bin"), 3_000_001),
        "engine/plan": FileRecord("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 0),
    }
    bundle = open_bundle(tmp_path)
    assert bundle.manifest == sealed
    assert bundle.file("engine/plan") == tmp_path.resolve() / "engine" / "plan"
    assert bundle.manifest_sha256 == sha256_of(tmp_path / "manifest.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "engine", "manifest.json"]


def test_opening_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no bundle .*absent; make one with `llama-export build"):
        open_bundle(tmp_path / "absent")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="is a file, but a bundle is a folder"):
        open_bundle(file)
    with pytest.raises(LlamaExportError, match=r"no manifest\.json"):
        open_bundle(tmp_path)


def test_a_file_the_manifest_lacks(tmp_path: Path) -> None:
    seal(tmp_path, MANIFEST)
    with pytest.raises(LlamaExportError, match=r"has no model\.onnx; build it again"):
        open_bundle(tmp_path).file("model.onnx")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "bundle", tmp_path / "secret"
    folder.mkdir()
    outside.write_text("s")
    (folder / "inside").write_text("s")
    (folder / "link").symlink_to("inside")
    seal(folder, MANIFEST)
    assert "link" in open_bundle(folder).manifest.files
    (folder / "link").unlink()
    (folder / "link").symlink_to(outside)
    with pytest.raises(LlamaExportError, match="link that leads out"):
        open_bundle(folder)
    with pytest.raises(LlamaExportError, match="link that leads out"):
        seal(folder, MANIFEST)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    seal(tmp_path, MANIFEST)
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(LlamaExportError, match=r"link that leads nowhere|is missing"):
        check_files(open_bundle(tmp_path))


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no bundle ~nobody-is-called-so/b"):
        open_bundle("~nobody-is-called-so/b")


def test_the_provider_that_a_bundle_needs() -> None:
    assert dataclasses.replace(MANIFEST, providers=()).provider == "CPUExecutionProvider"
    assert dataclasses.replace(MANIFEST, providers=("X", "CPUExecutionProvider")).provider == "X"


def test_a_bundle_behind_a_link_opens(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    seal(folder, MANIFEST)
    (tmp_path / "link").symlink_to(folder)
    assert open_bundle(tmp_path / "link").path == folder.resolve()


def test_an_enormous_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(LlamaExportError, match="more than any manifest needs"):
        open_bundle(tmp_path)


def test_a_manifest_in_python_is_checked_too() -> None:
    with pytest.raises(LlamaExportError, match=r"limits\.context"):
        dataclasses.replace(MANIFEST, limits=Limits(0))
    with pytest.raises(LlamaExportError, match=r"tokens\.pad"):
        dataclasses.replace(MANIFEST, tokens=Tokens(None, (), 9999, add_bos=False))


@pytest.mark.parametrize("name", ["model.onnx.data", "chat_template.jinja", "reference/exact.npz"])
def test_a_file_that_nothing_vouches_for_is_refused(name: str, tmp_path: Path) -> None:
    """Unlisted, it would escape the hashes and the look for links that lead out."""
    folder = write_bundle(tmp_path / "bundle").path
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"].pop(name, None)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(LlamaExportError, match=f"{name} is not in the bundle's manifest"):
        open_bundle(folder)


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle").path
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(LlamaExportError, match=r"model\.onnx is not a plain file"):
        open_bundle(folder)
