"""Folders of other tools, made here without them: replayed as the model in NumPy computes, and refused where unfit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime.proof.foreign import (
    GENAI,
    ONNX,
    OPTIMUM,
    ForeignFolder,
    ForeignReplayer,
    check_reference,
    is_foreign,
    open_foreign,
)
from llama_export.runtime.proof.foreign import graph as graph_module
from llama_export.runtime.proof.reference import ORIGINAL, Identity, Index, Prompt
from support import onnx_bytes as onnx
from support.foreign_models import CONTEXT, write_concatenated, write_grouped
from support.tiny_bundle import BOS, byte_tokenizer, random_llama, write_bundle

LLAMA = random_llama(7)
CLOSE = 2e-4
"""float32 over two layers against float64."""
TEXTS = ([3, 250, 17, 99, 4, 4, 128, 77, 12, 200, 31], [60, 61, 7], [9])


def our_bundle(path: Path) -> Path:
    """A bundle of the `ort` dialect whose manifest is lost."""
    write_bundle(path, LLAMA)
    (path / "manifest.json").unlink()
    return path


Make = Callable[[Path], Path]
FOLDERS: dict[str, Make] = {
    "optimum": lambda path: write_concatenated(path, LLAMA),
    "int32": lambda path: write_concatenated(path, LLAMA, numbers="int32"),
    "without-positions": lambda path: write_concatenated(path, LLAMA, positions=False),
    "optimum-last": lambda path: write_concatenated(path, LLAMA, last_only=True),
    "merged": lambda path: write_concatenated(path, LLAMA, merged=True),
    "genai": lambda path: write_grouped(path, LLAMA),
    "genai-last": lambda path: write_grouped(path, LLAMA, last_only=True),
    "ours": our_bundle,
}


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FOLDERS[request.param](tmp_path / request.param)


def opened(path: Path) -> ForeignReplayer:
    return ForeignReplayer(open_foreign(path), threads=1)


def pieces(replayer: ForeignReplayer, ids: list[int], *cuts: int) -> np.ndarray:
    """The logits of a text that is read in pieces which end at `cuts`."""
    found = []
    for start, stop in zip((0, *cuts[:-1]), cuts, strict=True):
        found.append(replayer.run(np.array([ids[start:stop]]), [start], [stop - start])[0])
    return np.concatenate(found)


def check(found: np.ndarray, ids: list[int], start: int = 0) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, LLAMA.logits(ids)[start:], atol=CLOSE)


def test_one_piece_pieces_and_single_tokens(folder: Path) -> None:
    replayer, ids = opened(folder), TEXTS[0]
    for cuts in ((11,), (4, 9, 11), range(1, 12), (3, 4, 5, 11)):
        replayer.begin(1)
        check(pieces(replayer, ids, *cuts), ids)


def test_a_rewind_forgets(folder: Path) -> None:
    replayer, ids = opened(folder), TEXTS[0]
    pieces(replayer, [*ids[:3], *TEXTS[1], 5, 6, 8], 2, 9)
    check(replayer.run(np.array([ids[3:]]), [3], [8])[0], ids, 3)
    check(replayer.run(np.array([ids[1:2]]), [1], [1])[0], ids[:2], 1)
    check(replayer.run(np.array([ids]), [0], [11])[0], ids)


def test_rows_of_different_lengths(folder: Path) -> None:
    replayer, ids = opened(folder), TEXTS
    if replayer.most_rows == 1:
        assert "did not run together" in " ".join(replayer.notes)
        return
    replayer.begin(3)
    padded = np.full((3, 11), 255)
    for row, text in enumerate(ids):
        padded[row, : len(text)] = text
    logits = replayer.run(padded, [0, 0, 0], [len(text) for text in ids])
    for row, text in enumerate(ids):
        check(logits[row, : len(text)], text)
    texts = [list(text) for text in ids]
    for step in range(4):
        new = [13 + step, 40 - step, 100 + step]
        firsts = [len(text) for text in texts]
        logits = replayer.run(np.array(new)[:, None], firsts, [1, 1, 1])
        for text, token, row in zip(texts, new, logits, strict=True):
            text.append(token)
            check(row, text, len(text) - 1)
    # one of them goes back into its prompt, and another one by a single token
    texts = [texts[0][:5], texts[1], texts[2][:-1]]
    logits = replayer.run(np.array([[50], [51], [52]]), [len(text) for text in texts], [1, 1, 1])
    for text, token, row in zip(texts, (50, 51, 52), logits, strict=True):
        check(row, [*text, token], len(text))


def test_the_cache_in_order_of_positions(tmp_path: Path) -> None:
    views = []
    for name in ("optimum", "genai"):
        replayer = opened(FOLDERS[name](tmp_path / name))
        replayer.begin(2)
        replayer.run(np.array([TEXTS[0][:4], [*TEXTS[1], 255]]), [0, 0], [4, 3])
        replayer.run(np.array([[5], [6]]), [4, 3], [1, 1])
        views.append(replayer.cache(1))
    one, other = views
    assert one.keys.shape == (2, LLAMA.kv_heads, 5, LLAMA.head_dim)
    assert np.abs(one.keys).max() > 0.5
    np.testing.assert_allclose(one.keys, other.keys, atol=1e-5)
    np.testing.assert_allclose(one.values, other.values, atol=1e-5)


def test_facts(tmp_path: Path) -> None:
    found = {name: open_foreign(make(tmp_path / name)) for name, make in FOLDERS.items()}
    assert [found[name].kind for name in ("optimum", "genai", "ours")] == [OPTIMUM, GENAI, ONNX]
    for one in found.values():
        sizes = (one.layers, one.kv_heads, one.head_dim, one.vocab, one.cache_dtype, one.weights)
        assert sizes == (LLAMA.layers, LLAMA.kv_heads, LLAMA.head_dim, LLAMA.vocab, "float32", "fp32")
        assert not one.quantised
        assert one.tokenizer is not None
    assert found["genai"].grouped and not found["optimum"].grouped
    assert found["optimum"].has_positions and not found["without-positions"].has_positions
    assert (found["optimum"].context, found["optimum"].hidden, found["optimum"].heads) == (CONTEXT, 36, 6)
    assert "2048 tokens were assumed" in found["ours"].notes[0]
    assert str(found["genai"]).endswith("exported by onnxruntime-genai, fp32 weights")


@pytest.mark.parametrize("name", ["optimum-last", "genai-last"])
def test_logits_of_the_last_token_alone_are_told(name: str, tmp_path: Path) -> None:
    assert "token by token" in opened(FOLDERS[name](tmp_path / name)).notes[0]


def test_is_foreign(tmp_path: Path) -> None:
    folder = write_concatenated(tmp_path / "folder", LLAMA)
    assert is_foreign(folder)
    assert is_foreign(folder / "model.onnx")
    assert not is_foreign(folder / "config.json")
    assert not is_foreign(tmp_path / "absent")
    write_bundle(tmp_path / "bundle", LLAMA)
    assert not is_foreign(tmp_path / "bundle")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert not is_foreign(tmp_path / "hf")


# What cannot be replayed


def refused(path: Path, error: type[LlamaExportError] = LlamaExportError) -> str:
    with pytest.raises(error) as caught:
        open_foreign(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def model(*inputs: bytes, outputs: tuple[bytes, ...] = (), nodes: tuple[bytes, ...] = ()) -> bytes:
    return onnx.model(nodes, [], inputs, outputs)


IDS = onnx.value_info("input_ids", "int64", ["batch", "tokens"])
LOGITS = onnx.value_info("logits", "float32", ["batch", "tokens", 261])


def past(dtype: str = "float32", length: int | str = "past", name: str = "past_key_values.0") -> tuple[bytes, ...]:
    return tuple(onnx.value_info(f"{name}.{part}", dtype, ["batch", 2, length, 16]) for part in ("key", "value"))


PRESENT = past(name="present.0", length="total")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (model(IDS, outputs=(LOGITS,)), "--task text-generation-with-past"),
        (model(IDS, *past()[:1], outputs=(LOGITS, *PRESENT)), "no input past_key_values.0.value"),
        (model(IDS, *past(), outputs=(LOGITS,)), "no output present.0.key"),
        (model(*past(), outputs=(LOGITS, *PRESENT)), "has no input_ids"),
        (model(IDS, *past(), outputs=PRESENT), "has no logits"),
        (model(IDS, *past("int8"), outputs=(LOGITS, *PRESENT)), "of int8"),
        (model(IDS, *past(length=64), outputs=(LOGITS, *PRESENT)), "a cache of 64 tokens"),
        (model(IDS, *past(), onnx.value_info("beam", "int64", [1]), outputs=(LOGITS, *PRESENT)), "the input beam"),
        (model(onnx.value_info("inputs_embeds", "float32", [1, 1, 8]), *past()), "embeddings in place of tokens"),
        (model(onnx.value_info("block_table", "int32", [1, 1]), *past()), "paged cache"),
        (model(IDS, onnx.value_info("encoder_hidden_states", "float32", [1, 1, 8])), "encoder-decoder"),
        (b"", "0 bytes"),
        (b"hello", "damaged"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged"),
        (b"\x38\x01", "it holds no graph"),
    ],
)
def test_graphs_that_are_no_decoders(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert words in refused(tmp_path)


def test_a_graph_that_onnx_runtime_cannot_load(tmp_path: Path) -> None:
    unknown = onnx.node("Nonsense", ["input_ids"], ["logits", "present.0.key", "present.0.value"])
    (tmp_path / "model.onnx").write_bytes(model(IDS, *past(), outputs=(LOGITS, *PRESENT), nodes=(unknown,)))
    with pytest.raises(LlamaExportError, match="cannot load") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_sizes_that_nothing_tells(tmp_path: Path) -> None:
    open_logits = onnx.value_info("logits", "float32", ["batch", "tokens", "vocab"])
    (tmp_path / "model.onnx").write_bytes(model(IDS, *past(), outputs=(open_logits, *PRESENT)))
    assert "tells the vocabulary" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": true}')
    assert "tells the vocabulary" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    assert open_foreign(tmp_path).vocab == 77


def test_no_graph_and_several(tmp_path: Path) -> None:
    assert "There is no" in refused(tmp_path / "absent", UsageError)
    assert "no ONNX file" in refused(tmp_path, UsageError)
    folder = write_concatenated(tmp_path / "folder", LLAMA)
    shutil.copy(folder / "model.onnx", folder / "model_q4.onnx")
    assert "(model.onnx, model_q4.onnx)" in refused(folder, UsageError)
    assert open_foreign(folder / "model_q4.onnx").graph.name == "model_q4.onnx"
    shutil.copy(folder / "model.onnx", folder / "encoder_model.onnx")
    assert "encoder-decoder" in refused(folder)


def test_an_inner_folder_of_graphs(tmp_path: Path) -> None:
    folder = write_concatenated(tmp_path / "folder", LLAMA)
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")
    for path in (folder, folder / "onnx" / "model.onnx"):
        found = open_foreign(path)
        assert (found.path, found.context) == (folder, CONTEXT)


def test_older_files_of_optimum(tmp_path: Path) -> None:
    folder = write_concatenated(tmp_path / "folder", LLAMA)
    (folder / "model.onnx").rename(folder / "decoder_with_past_model.onnx")
    (folder / "decoder_model.onnx").write_bytes(model(IDS, outputs=(LOGITS,)))
    assert "decoder_model.onnx, which others take for a prompt" in open_foreign(folder).notes[0]
    check(pieces(opened(folder), TEXTS[0], 3, 11), TEXTS[0])


@pytest.mark.parametrize(
    "location", ["../outside.data", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "a\\b", "", "sub/../../outside.data"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_weights_outside_of_the_folder(location: str, nested: bool, tmp_path: Path) -> None:
    (tmp_path / "outside.data").write_bytes(b"x" * 64)
    folder = write_concatenated(tmp_path / "folder", LLAMA)
    tensor = onnx.tensor("w", np.zeros(4, np.float32), (location, 0))
    value = onnx.block(1, "value") + onnx.block(5, tensor) + onnx.number(20, 4)
    constant = onnx.block(2, "w") + onnx.block(4, "Constant") + onnx.block(5, value)
    function = onnx.block(25, onnx.block(7, constant))  # the tensor of a node's attribute in a function
    content = (folder / "model.onnx").read_bytes()
    direct = onnx.model([], [tensor], [IDS, *past()], [LOGITS, *PRESENT])
    (folder / "model.onnx").write_bytes(content + function if nested else direct)
    assert "keeps weights in" in refused(folder)


def test_weights_that_are_missing_or_linked_away(tmp_path: Path) -> None:
    folder = write_grouped(tmp_path / "folder", LLAMA)
    data = folder / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    assert "is not there" in refused(folder)
    data.symlink_to(tmp_path / "elsewhere")
    assert "leads out of its folder" in refused(folder)


@pytest.mark.parametrize("name", ["model.onnx", "genai_config.json", "tokenizer.json"])
def test_links_that_lead_out(name: str, tmp_path: Path) -> None:
    folder = write_grouped(tmp_path / "folder", LLAMA)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "leads out of its folder" in refused(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "no valid JSON"),
        (json.dumps({"model": {"decoder": {"filename": "../model.onnx"}}}), "names no file of its own folder"),
        (json.dumps({"model": {"decoder": {"filename": 3}}}), "names no file of its own folder"),
        (json.dumps({"model": {"decoder": {"filename": "absent.onnx"}}}), "absent.onnx, which is not there"),
        (json.dumps({"model": {"encoder": {}, "decoder": {"filename": "model.onnx"}}}), "encoder-decoder"),
    ],
)
def test_a_bad_genai_config(content: str, words: str, tmp_path: Path) -> None:
    folder = write_grouped(tmp_path / "folder", LLAMA)
    (folder / "genai_config.json").write_text(content)
    assert words in refused(folder)


def test_files_beyond_any_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_concatenated(tmp_path / "folder", LLAMA)
    os.truncate(folder / "config.json", 5 << 20)
    assert "4 MiB" in refused(folder)
    (folder / "config.json").unlink()
    monkeypatch.setattr(graph_module, "_MOST_FIELDS", 100)
    assert "more parts than any decoder" in refused(folder)
    os.truncate(folder / "model.onnx", (2 << 30) + 1)
    assert "at most 2 GiB" in refused(folder)


def test_nesting_without_an_end(tmp_path: Path) -> None:
    graph = b""
    for _ in range(200):
        graph = onnx.block(1, onnx.block(5, onnx.block(6, graph)))
    (tmp_path / "model.onnx").write_bytes(onnx.block(7, graph))
    assert "nested too deep" in refused(tmp_path)


# Whose reference it is


def index_of(*prompts: Prompt, **changes: Any) -> Index:
    identity = Identity("m" * 64, "t" * 64, LLAMA.layers, LLAMA.hidden, LLAMA.heads, LLAMA.kv_heads, 16, LLAMA.vocab)
    sizes = {name: changes.pop(name) for name in list(changes) if hasattr(identity, name)}
    fields: dict[str, Any] = {"schema_version": 2, "kind": ORIGINAL, "model_id": "tests/tiny", "revision": None}
    fields |= {"dtype": "float32", "precision": None, "adapter": None, "identity": replace(identity, **sizes)}
    fields |= {"prompts": prompts or (prompt(),), "weights": (), "tables": (), "layers": (), "full": False, "tools": {}}
    return Index(**fields | changes)


def checked(folder: ForeignFolder, index: Index) -> tuple[str, ...]:
    return check_reference(folder, index.identity, index.prompts, index.model_id)


def prompt(text: str = "ab ", *, special: bool = True, count: int = 8) -> Prompt:
    ids = tuple(byte_tokenizer().encode(text, add_special_tokens=special).ids)
    return Prompt("prose", text, (*ids, *range(count - len(ids))), len(ids), 0)


def test_a_reference_of_this_model(tmp_path: Path) -> None:
    folder = open_foreign(write_grouped(tmp_path / "folder", LLAMA))
    with_bos, without = prompt(), prompt(special=False)
    assert with_bos.ids[0] == BOS != without.ids[0]
    assert checked(folder, index_of(with_bos, without)) == ()
    byte_tokenizer(bos=False).save(str(folder.path / "tokenizer.json"))
    assert checked(folder, index_of(with_bos, without)) == ()
    cut = replace(without, text="ab and more")
    assert checked(folder, index_of(cut)) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 3}, "has 3 layers where it has 2"),
        ({"kv_heads": 6}, "has 6 heads of the cache where it has 2"),
        ({"head_dim": 8}, "has 8 numbers in a head where it has 16"),
        ({"vocab": 262}, "has 262 vocabulary entries where it has 261"),
        ({"hidden": 64}, "has 64 numbers in a hidden state where it has 36"),
        ({"prompts": (prompt(count=CONTEXT + 1),)}, "--context 48"),
        ({"prompts": (replace(prompt(), text="xy "),)}, "another tokenizer"),
    ],
)
def test_a_reference_of_another_model(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = open_foreign(write_grouped(tmp_path / "folder", LLAMA))
    with pytest.raises(LlamaExportError) as caught:
        checked(folder, index_of(**changes))
    assert words in str(caught.value)


def test_without_a_tokenizer_that_is_told(tmp_path: Path) -> None:
    folder = write_grouped(tmp_path / "folder", LLAMA)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LlamaExportError, match="not a tokenizer"):
        checked(open_foreign(folder), index_of())
    (folder / "tokenizer.json").unlink()
    (told,) = checked(open_foreign(folder), index_of())
    assert "only the sizes" in told
