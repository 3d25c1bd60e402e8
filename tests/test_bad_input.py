"""A user's mistakes, from the command to the sentence: one line on stderr, the exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from support import faults
from support.command import call
from support.gguf_models import write_llama_gguf
from support.hf_models import random_weights, write_json, write_llama_folder, write_weights

Built = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def told(result: Result, code: int, *words: str) -> None:
    """The command failed as it should: its code, nothing on stdout, one sentence with all of these words on stderr."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    *usage, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line[-1] in ".?)", line
    assert not usage or usage[0].startswith("Usage: "), usage  # click's own lines, of options that do not exist
    for word in words:
        assert word in line


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# A checkpoint that cannot be built


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    value = json.loads(path.read_text()) | changes
    write_json(path, {key: one for key, one in value.items() if one is not None})


def truncate(path: Path, by: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - by)


def reshaped(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    weights = random_weights(json.loads((folder / "config.json").read_text()))
    weights[name] = change(weights[name])
    write_weights(folder, weights)


Q = "model.layers.1.self_attn.q_proj.weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no weights": (lambda at: (at / "model.safetensors").unlink(), ("llama", "safetensors")),
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), ("has no tokenizer.json", "copy it")),
    "no config": (lambda at: (at / "config.json").unlink(), ("config.json",)),
    "Llama 3.2 Vision": (
        lambda at: config(at, model_type="mllama", architectures=["MllamaForConditionalGeneration"]),
        ("Llama 3.2 Vision",),
    ),
    "Llama 4": (
        lambda at: config(at, model_type="llama4", architectures=["Llama4ForConditionalGeneration"]),
        ("Llama 4",),
    ),
    "Gemma": (lambda at: config(at, model_type="gemma", architectures=["GemmaForCausalLM"]), ("gemma", "mistral")),
    "truncated weights": (lambda at: truncate(at / "model.safetensors", 1000), ("model.safetensors", "bytes")),
    "weights of one byte": (lambda at: (at / "model.safetensors").write_bytes(b"x"), ("model.safetensors",)),
    "weights with a huge header": (
        lambda at: (at / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60)),
        ("model.safetensors",),
    ),
    "a tensor of the wrong shape": (lambda at: reshaped(at, Q, lambda one: one[:-2]), (Q, "[62, 64]", "[64, 64]")),
    "a tensor turned over": (
        lambda at: reshaped(at, "model.layers.0.mlp.down_proj.weight", lambda one: one.T),
        ("down_proj", "[96, 64]"),
    ),
    "more layers than there are": (lambda at: config(at, num_hidden_layers=3), ("layers",)),
    "another vocabulary": (lambda at: config(at, vocab_size=500), ("embed_tokens", "[320, 64]")),
    "heads that do not divide": (lambda at: config(at, num_key_value_heads=3), ("num_key_value_heads",)),
    "a size that is no number": (lambda at: config(at, hidden_size="64"), ("hidden_size",)),
    "a size without bound": (lambda at: config(at, num_hidden_layers=10**12), ("num_hidden_layers",)),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case: str, tmp_path: Path) -> None:
    damage, words = FOLDERS[case]
    damage(write_llama_folder(tmp_path / "llama"))
    before = tree(tmp_path)
    told(call("build", "-m", "llama", "-t", "cpu", "-o", "out/tiny"), 1, *words)
    assert tree(tmp_path) == before


GGUFS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (lambda at: truncate(at, 500), ("llama.gguf",)),
    "its head only": (lambda at: truncate(at, at.stat().st_size - 40), ("llama.gguf",)),
    "empty": (lambda at: at.write_bytes(b""), ("llama.gguf",)),
    "something else": (lambda at: at.write_bytes(b"PK\x03\x04" * 100), ("llama.gguf",)),
    "another architecture": (
        lambda at: write_llama_gguf(at, metadata={"general.architecture": "qwen2"}),
        ("qwen2",),
    ),
    "another size": (lambda at: write_llama_gguf(at, metadata={"llama.feed_forward_length": 64}), ("[96, 64]",)),
}


@pytest.mark.parametrize("case", GGUFS)
def test_gguf_files(case: str, tmp_path: Path) -> None:
    damage, words = GGUFS[case]
    damage(write_llama_gguf(tmp_path / "llama.gguf", types="Q4_0"))
    told(call("build", "-m", "llama.gguf", "-t", "cpu", "-o", "out"), 1, *words)
    assert tree(tmp_path) == ["llama.gguf"]


# A command that cannot be meant

COMMANDS: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    "a missing folder": (["-m", "./absent"], 2, ("absent",)),
    "a name of nothing": (["-m", "absent.gguf"], 2, ("absent.gguf",)),
    "an unknown option": (["--presicion", "int4"], 2, ("--presicion", "Did you mean", "--precision")),
    "an unknown precision": (["--precision", "int5"], 2, ("int5", "int4")),
    "an unknown target": (["-t", "jetson-orn"], 2, ("jetson-orn", "Did you mean 'jetson-orin'?")),
    "no context": (["--context", "0"], 2, ("--context",)),
    "a context beyond the model's": (["--context", "1000"], 2, ("1000", "256")),
    "a revision of a folder": (["--revision", "main"], 2, ("--revision",)),
    "an output that is a file": (["-o", "file"], 2, ("is a file",)),
    "an output below a file": (["-o", "file/out"], 2, ("is a file",)),
    "an output that holds something": (["-o", "llama"], 2, ("with other content than a bundle",)),
    "no output": (["-o", ""], 2, ()),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(case: str, tmp_path: Path) -> None:
    arguments, code, words = COMMANDS[case]
    write_llama_folder(tmp_path / "llama")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    told(call("build", "-m", "llama", "-t", "cpu", "-o", "out", *arguments), code, *words)
    assert tree(tmp_path) == before


SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "an unknown key": ('modle = "x"', ("unknown key 'modle'", "Did you mean 'model'?")),
    "an unknown table": ("[biuld]", ("[biuld]", "Did you mean 'build'?")),
    "a wrong value": ('context = "many"', ("context", "a whole number")),
    "an unknown target": ('target = "cppu"', ("cppu", "Did you mean 'cpu'?")),
    "no TOML": ("model =", ("is not a TOML file",)),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, tmp_path: Path) -> None:
    text, words = SETTINGS[case]
    (tmp_path / "llama-export.toml").write_text(text)
    write_llama_folder(tmp_path / "llama")
    before = tree(tmp_path)
    told(call("build", "-m", "llama", "-o", "out", *(() if "target" in text else ("-t", "cpu"))), 2, *words)
    assert tree(tmp_path) == before


# A disk without room


def test_a_disk_that_is_known_to_be_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama_folder(tmp_path / "llama")
    honest = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: honest(path)._replace(free=1_000_000))
    told(call("build", "-m", "llama", "-t", "cpu", "-o", "new/out"), 1, "needs 66.7 MB", "only 1.00 MB are free")
    assert not (tmp_path / "new").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc refuses new folders to everybody, also to root, which tests often run as; and it has no room."""
    write_llama_folder(tmp_path / "llama")
    honest = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: honest(path)._replace(free=1 << 40))
    told(
        call("build", "-m", "llama", "-t", "cpu", "-o", "/proc/out"), 2, "/proc/out cannot be written", "name a folder"
    )


@pytest.mark.parametrize("moment", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_turns_out_to_be_full(
    moment: str, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_llama_folder(tmp_path / "llama")
    shutil.copytree(built("int4"), tmp_path / "out")
    before = tree(tmp_path)
    monkeypatch.setattr(os, moment, full)
    result = call("build", "-m", "llama", "-t", "cpu", "-o", "out", "--force", "--quiet")
    told(result, 1, "The disk of", "is full, and nothing of the bundle was kept")
    monkeypatch.undo()
    assert tree(tmp_path) == before


# A bundle that cannot be used


def manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((bundle / "manifest.json").read_text())
    change(value)
    write_json(bundle / "manifest.json", value)


def renamed(value: dict[str, Any], name: str) -> None:
    value["files"][name] = value["files"].pop("tokenizer.json")


BUNDLES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a path out of it": (
        lambda at: manifest(at, lambda value: renamed(value, "../tokenizer.json")),
        ("'../tokenizer.json'", "does not name a file inside the bundle"),
    ),
    "an absolute path": (
        lambda at: manifest(at, lambda value: renamed(value, "/etc/passwd")),
        ("'/etc/passwd'", "does not name a file inside the bundle"),
    ),
    "a link out of it": (
        lambda at: ((at / "tokenizer.json").unlink(), (at / "tokenizer.json").symlink_to("/etc/passwd")),
        ("is a link that leads out of the bundle",),
    ),
    "a newer schema": (
        lambda at: manifest(at, lambda value: value.update(schema_version=2)),
        ("schema version 2", "reads up to 1", "upgrade"),
    ),
    "an older runtime": (
        lambda at: manifest(at, lambda value: value["minimum"].update(onnxruntime="99.1")),
        ("needs onnxruntime 99.1 or newer",),
    ),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), ("has no manifest.json", "llama-export build")),
    "half a manifest": (lambda at: truncate(at / "manifest.json", 100), ("is not valid JSON",)),
}


@pytest.mark.parametrize("command", ["run", "verify", "inspect"])
@pytest.mark.parametrize("case", BUNDLES)
def test_bundles(case: str, command: str, built: Built, tmp_path: Path) -> None:
    if (case, command) == ("an older runtime", "inspect"):
        pytest.skip("inspect runs nothing")
    damage, words = BUNDLES[case]
    copy = tmp_path / "copy"
    shutil.copytree(built("fp16"), copy)
    damage(copy)
    extra = {"run": ["hello", "--quiet"], "verify": ["--no-hash", "--quiet"], "inspect": []}[command]
    if (case, command) == ("no manifest", "verify"):  # it could be what another tool exported
        told(call(command, copy, *extra), 2, "has no manifest", "--reference")
    else:
        told(call(command, copy, *extra), 1, *words)


def test_a_prompt_longer_than_the_context(built: Built) -> None:
    told(
        call("run", built("int4"), "word " * 300, "--quiet"),
        2,
        "tokens, but the context of this bundle is 256",
    )


def test_no_prompt_and_none_that_says_something(built: Built) -> None:
    told(call("run", built("int4"), "--quiet"), 2, "There is nothing to continue")


def test_sentences_name_things_as_the_user_did(tmp_path: Path) -> None:
    """Neither our modules nor Python's types are a user's concern."""
    for case, (damage, _) in FOLDERS.items():
        folder = tmp_path / re.sub(r"\W", "-", case)
        damage(write_llama_folder(folder))
        line = call("build", "-m", folder, "-t", "cpu", "-o", "out").stderr
        assert not re.search(r"Error\(|NoneType|<class|\.py\b|KeyError|Exception", line), line


def test_faults_module_is_told_of_graphs_that_do_not_change(built: Built, tmp_path: Path) -> None:
    """A planted fault that changes nothing would prove nothing."""
    copy = faults.copy_of(built("fp16"), tmp_path / "copy", changed="model.onnx")
    with pytest.raises(AssertionError, match="nothing changed"):
        faults.graph(lambda model: None)(copy)
