"""Opening a checkpoint by name, and what a folder must hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export import token_ids as token_ids_module
from llama_export.export.source import open_source
from llama_export.export.token_ids import TokenIds, token_ids
from safetensors.numpy import load_file, save_file
from support.hf_models import (
    CHAT_TEMPLATE,
    EOS,
    TURN,
    random_weights,
    write_json,
    write_llama_folder,
    write_weights,
)


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    content = json.loads(path.read_text()) | values
    write_json(path, {key: value for key, value in content.items() if value is not None})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama_folder(tmp_path / "Tiny-Llama", layers=3, hidden=40, heads=5, kv_heads=1, ffn=56)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_becomes_a_source(tmp_path: Path, dtype: str, shards: int) -> None:
    path = write_llama_folder(tmp_path / "m", dtype=dtype, shards=shards, attention_bias=True, seed=5)
    source = open_source(str(path))
    assert (source.model_id, source.revision, source.kind, source.native_precision) == ("m", None, "folder", None)
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    weights = random_weights(source.config, seed=5)
    assert list(source.tensors) == list(weights)
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(tensor.read(0, tensor.shape[0]), weights[name].astype(kinds[dtype]).astype("f4"))
    names = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
    assert sorted(source.files) == [*names, "tokenizer_config.json"]
    assert json.loads(source.content("config.json")) == source.config == source.json("config.json")
    assert source.json("special_tokens_map.json") == {}


def test_a_folder_is_known_by_its_name_from_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert open_source(".").model_id == "Tiny-Llama"


def test_a_folder_here_goes_before_a_repository_of_that_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert open_source(f"{folder.parent.name}/Tiny-Llama").kind == "folder"


def test_a_copy_of_the_tied_head_is_left_out(tmp_path: Path) -> None:
    path = write_llama_folder(tmp_path / "m", tied=True)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    save_file(weights, path / "model.safetensors")
    assert "lm_head.weight" not in open_source(str(path)).tensors
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, path / "model.safetensors")
    with pytest.raises(
        LlamaExportError, match=r"tie_word_embeddings: true, but lm_head\.weight differs from model\.embed"
    ):
        open_source(str(path))
    change(path / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in open_source(str(path)).tensors


def test_an_early_checkpoints_rotary_tables_are_left_out(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(weights, folder / "model.safetensors")
    assert not any("rotary" in name for name in open_source(str(folder)).tensors)


def test_a_chat_template_inside_of_the_tokenizers_settings(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "chat_template.jinja" not in open_source(str(folder)).files
    change(folder / "tokenizer_config.json", chat_template="one")
    assert open_source(str(folder)).content("chat_template.jinja") == b"one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert open_source(str(folder)).content("chat_template.jinja") == b"three"
    change(folder / "tokenizer_config.json", chat_template=[{"name": ["a"], "template": "no"}, "no", *named])
    assert open_source(str(folder)).content("chat_template.jinja") == b"three"
    change(folder / "tokenizer_config.json", chat_template=named[:1])
    write_json(folder / "chat_template.json", {"chat_template": "four"})
    assert open_source(str(folder)).content("chat_template.jinja") == b"four"
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert open_source(str(folder)).content("chat_template.jinja").decode() == CHAT_TEMPLATE


def test_the_licence_and_its_files(folder: Path) -> None:
    assert open_source(str(folder)).licence == "Random weights, free for any use."
    for name in ("NOTICE", "USE_POLICY.md", "license-extra.txt", "LICENSED_USERS.csv"):
        (folder / name).write_text("text")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: llama3.2\n---\nlicense: none\n")
    source = open_source(str(folder))
    assert source.licence == "llama3.2"
    assert {"NOTICE", "USE_POLICY.md", "LICENSE", "license-extra.txt"} < set(source.files)
    assert not {"LICENSED_USERS.csv", "README.md"} & set(source.files)
    (folder / "README.md").write_text('---\nlicense: other\nlicense_name: "my-licence" # mine\n---\n')
    assert open_source(str(folder)).licence == "my-licence"
    (folder / "README.md").write_text("No front matter.\nlicense: mit\n")
    (folder / "LICENSE").unlink()
    (folder / "license-extra.txt").unlink()
    assert open_source(str(folder)).licence is None


@pytest.mark.parametrize("name", ["LICENSE.a:b", "NOTICE-\udcff"])
def test_licence_files_that_no_bundle_can_hold_are_told_at_once(folder: Path, name: str) -> None:
    (folder / name).write_text("text")
    with pytest.raises(LlamaExportError, match="not every system can name a file so; rename it") as caught:
        open_source(str(folder))
    str(caught.value).encode()


def test_the_tokenizer_is_read_once_for_its_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(folder))
    monkeypatch.setattr(token_ids_module, "_tokenizer", None)
    assert source.tokens.eos == (1, 2)
    assert source.shape.layers == 3


def remove(*names: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return act


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **values)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wrong_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.gate_proj.weight"] = np.zeros((55, 40), np.float32)
    write_weights(folder, weights)


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for path in list(folder.iterdir()):
            if path.name != old:
                path.unlink()
        (folder / old).rename(folder / new)

    return act


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (
        remove("config.json"),
        "has no config.json; expected a checkpoint folder with config.json, tokenizer.json",
    ),
    "bundle": (renamed("config.json", "manifest.json"), "is a bundle, not a checkpoint"),
    "original": (renamed("config.json", "params.json"), "holds a checkpoint in Meta's own format"),
    "adapter": (renamed("config.json", "adapter_config.json"), "holds a LoRA adapter and no model"),
    "ggufs": (renamed("config.json", "x.gguf"), r"no config\.json but GGUF files; name the file, such as .*/x\.gguf"),
    "no weights": (remove("model.safetensors"), "holds no weights; expected model.safetensors"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer.json, which the bundle needs"),
    "config not JSON": (write("config.json", "{"), "config.json is no valid JSON"),
    "config a list": (write("config.json", "[]"), "config.json does not hold one JSON object"),
    "config too deep": (write("config.json", "[" * 10**5), "config.json is no valid JSON"),
    "tokenizer broken": (write("tokenizer.json", '{"model": 1}'), "The tokenizer.json of Tiny-Llama cannot be read"),
    "tokenizer settings": (write("tokenizer_config.json", "no"), "The tokenizer_config.json of Tiny-Llama is no valid"),
    "generation settings": (write("generation_config.json", "[]"), "generation_config.json .* does not hold one JSON"),
    "vision": (config(model_type="mllama"), "Llama 3.2 Vision"),
    "llama 4": (config(model_type="llama4"), "Llama 4"),
    "mistral": (config(model_type="mistral"), "mistral / LlamaForCausalLM, which is not supported"),
    "layers": (config(num_hidden_layers=2), "num_hidden_layers is 2, but the checkpoint holds a tensor of layer 2"),
    "wrong shape": (
        wrong_shape,
        r"mlp\.gate_proj\.weight has the shape \[55, 40\], but config.json expects \[56, 40\]",
    ),
    "truncated": (truncated, r"model\.safetensors is truncated: expected at least \d+ bytes, found \d+"),
    "eos": (config(eos_token_id=[1, 320]), r"config.json says eos_token_id is \[1, 320\], but ids below vocab_size"),
    "bos": (config(bos_token_id=-1), "config.json says bos_token_id is -1, but ids below vocab_size"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(folder: Path, case: str) -> None:
    act, message = FOLDERS[case]
    (folder / "generation_config.json").unlink()
    change(folder / "tokenizer_config.json", bos_token=None)
    act(folder)
    with pytest.raises(LlamaExportError, match=message) as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_model_alone_is_not_enough(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(LlamaExportError, match=r"only a sentencepiece tokenizer\.model; convert it with AutoToken"):
        open_source(str(folder))


def test_names_that_lead_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder.parent)
    (folder.parent / "other.gguf").touch()
    for name, message in {
        "./Tiny-Lama": r"There is no Tiny-Lama; .* Did you mean 'Tiny-Llama'\?",
        "../nowhere": r"There is no \.\./nowhere; name a folder, a GGUF file or a hub id\.$",
        "othr.gguf": r"There is no othr\.gguf; .* Did you mean 'other\.gguf'\?",
        "no/such/folder": r"There is no no/such/folder, since there is no folder no/such; name a folder",
        "~/surely/not/there": "There is no .*/surely/not/there, since",
        "C:\\models\\llama": "There is no ",
        "Tiny-Llama/config.json": r"is a file, but no GGUF file, .*; name a folder or a \.gguf file",
        "Tiny-Llama/model.safetensors": "is a file, but no GGUF file, .*; name its folder Tiny-Llama",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(name)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x", ""])
def test_names_that_no_system_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LlamaExportError, match=r"a folder, .* GGUF file") as caught:
        open_source(name)
    assert len(str(caught.value)) < 400


def test_a_revision_is_for_the_hub(folder: Path) -> None:
    with pytest.raises(UsageError, match=rf"--revision main is for models on the hub, but {re.escape(str(folder))} is"):
        open_source(str(folder), revision="main")


def test_token_ids_of_a_checkpoint(folder: Path) -> None:
    assert token_ids(open_source(str(folder))) == TokenIds(bos=0, eos=(1, 2), pad=None, add_bos=True)


@pytest.mark.parametrize(
    ("generation", "settings", "expected"),
    [
        ({}, {}, TokenIds(0, (1,), None, True)),
        ({"eos_token_id": 2}, {}, TokenIds(0, (2, 1), None, True)),
        ({"eos_token_id": [5, 1, 5]}, {"eos_token": TURN}, TokenIds(0, (5, 1, 2), None, True)),
        ({}, {"eos_token": {"content": TURN, "special": True}}, TokenIds(0, (1, 2), None, True)),
        ({}, {"eos_token": "<not a token>", "bos_token": None}, TokenIds(0, (1,), None, True)),
        ({"pad_token_id": 9}, {}, TokenIds(0, (1,), 9, True)),
        ({"pad_token_id": 9}, {"pad_token": EOS}, TokenIds(0, (1,), 1, True)),
        ({"pad_token_id": -1}, {}, TokenIds(0, (1,), None, True)),
        ({}, {"add_bos_token": False}, TokenIds(0, (1,), None, True)),
        ({"bos_token_id": 7}, {"bos_token": None}, TokenIds(7, (1,), None, False)),
    ],
)
def test_token_ids_of_several_files(
    folder: Path, generation: dict[str, Any], settings: dict[str, Any], expected: TokenIds
) -> None:
    write_json(folder / "generation_config.json", generation)
    change(folder / "tokenizer_config.json", **settings)
    assert token_ids(open_source(str(folder))) == expected


def test_a_checkpoint_that_names_no_tokens(folder: Path) -> None:
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    change(folder / "config.json", bos_token_id=None, eos_token_id=None)
    assert token_ids(open_source(str(folder))) == TokenIds(None, (), None, False)


@pytest.mark.parametrize("in_template", [True, False])
@pytest.mark.parametrize("explicit", [None, True, False])
def test_bos_is_added_where_transformers_adds_it(tmp_path: Path, in_template: bool, explicit: bool | None) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_llama_folder(tmp_path / "m", add_bos=in_template)
    change(path / "tokenizer_config.json", add_bos_token=explicit)
    first = transformers.AutoTokenizer.from_pretrained(path)("What is it?").input_ids[0]
    ids = token_ids(open_source(str(path)))
    assert ids.add_bos == (first == ids.bos)
    assert ids.bos == 0


def test_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="neither a folder nor a plain file"):
        open_source(str(tmp_path / "model.gguf"))
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(LlamaExportError, match="not a plain file"):
        open_source(str(folder))


def test_a_source_with_other_tensors_keeps_what_it_read(tmp_path: Path) -> None:
    source = open_source(str(write_llama_folder(tmp_path / "llama")))
    other = source.with_other(tensors={}, notes=("changed",))
    assert (other.tensors, other.notes) == ({}, ("changed",))
    assert other.tokens is source.tokens
    assert source.tensors
