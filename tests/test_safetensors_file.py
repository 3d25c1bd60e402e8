"""Safetensors files read by rows, against the safetensors library, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.export import safetensors_file
from llama_export.export.safetensors_file import INDEX, open_file, open_safetensors, plain_tensor, to_floats
from llama_export.optimize.quantise import DENSE
from safetensors.numpy import save_file
from support.hf_models import write_json

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def raw(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with this header, written without the library."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_rows_equal_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, chunk: int) -> None:
    monkeypatch.setattr(safetensors_file, "_CHUNK", chunk)
    generator = np.random.default_rng(3)
    matrix = generator.standard_normal((13, 11), dtype=np.float32).astype(dtype)
    vector = np.array([0.0, -0.0, np.inf, -np.inf, 65504, 1e-7, -1.5], dtype=np.float32).astype(dtype)
    save_file({"a": matrix, "b": vector, "scalar": matrix[:1, :1].reshape(())}, tmp_path / "x.safetensors")
    tensors = open_file(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (13, 11), "b": (7,), "scalar": ()}
    for start, stop in ((0, 13), (0, 1), (5, 9), (12, 13), (4, 4)):
        rows = tensors["a"].floats(start, stop)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        np.testing.assert_array_equal(rows, matrix[start:stop].astype(np.float32))
    read = tensors["b"].floats(0, 7)
    np.testing.assert_array_equal(read.view(np.uint32), vector.astype(np.float32).view(np.uint32))
    plain = plain_tensor(tensors["a"])
    assert (plain.name, plain.shape, plain.blocks, plain.order) == ("a", (13, 11), None, None)
    assert DENSE[plain.format] == dtype
    np.testing.assert_array_equal(plain.read(2, 13), matrix[2:13].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_columns_equal_the_library(tmp_path: Path, dtype: Any) -> None:
    matrix = np.random.default_rng(3).standard_normal((13, 11), dtype=np.float32).astype(dtype)
    save_file({"before": matrix[:1], "a": matrix}, tmp_path / "x.safetensors")
    tensor = open_file(tmp_path / "x.safetensors")["a"]
    for start, stop in ((0, 11), (0, 1), (3, 8), (10, 11), (4, 4)):
        part = to_floats(tensor.columns(start, stop), tensor.dtype)
        np.testing.assert_array_equal(part, matrix[:, start:stop].astype(np.float32))


def test_packed_numbers_come_as_they_are(tmp_path: Path) -> None:
    packed = np.arange(-30, 30, dtype=np.int32).reshape(10, 6) << 24
    save_file({"a": packed, "b": packed.astype(np.int8)}, tmp_path / "x.safetensors")
    tensors = open_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensors["a"].array(3, 7), packed[3:7])
    np.testing.assert_array_equal(tensors["a"].columns(2, 5), packed[:, 2:5])
    assert tensors["b"].array(0, 10).dtype == np.int8


def test_every_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    save_file({"all": bits.view(ml_dtypes.bfloat16)}, tmp_path / "x.safetensors")
    rows = open_file(tmp_path / "x.safetensors")["all"].floats(0, 1 << 16)
    np.testing.assert_array_equal(rows.view(np.uint32), bits.astype(np.uint32) << 16)


def test_many_threads_read_one_file(tmp_path: Path) -> None:
    matrix = np.arange(400 * 33, dtype=np.float32).reshape(400, 33)
    save_file({"a": matrix.astype(ml_dtypes.bfloat16)}, tmp_path / "x.safetensors")
    tensor = open_file(tmp_path / "x.safetensors")["a"]
    expected = matrix.astype(ml_dtypes.bfloat16).astype(np.float32)

    def check(start: int) -> bool:
        return np.array_equal(tensor.floats(start, start + 40), expected[start : start + 40])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, [start % 360 for start in range(0, 4000, 7)]))


def test_files_are_closed_with_their_last_tensor(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    before = len(list(descriptors.iterdir()))
    tensors = open_file(tmp_path / "x.safetensors")
    kept = tensors.pop("a")
    del tensors
    assert len(list(descriptors.iterdir())) == before + 1
    kept.floats(0, 1)
    del kept
    assert len(list(descriptors.iterdir())) == before


def test_reading_holds_the_rows_and_little_more(tmp_path: Path) -> None:
    """A process that reads 256 MB by rows grows by the rows it holds at a time; a mapped file would count whole."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(raw({"a": entry("BF16", [65536, 2048], 0, 1 << 28)}))
        file.truncate(file.tell() + (1 << 28))
    code = """
import resource, sys
from pathlib import Path
from llama_export.export.safetensors_file import open_file
tensor = open_file(Path(sys.argv[1]))["a"]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, 65536, 1024):
    tensor.floats(start, start + 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 3 * 1024 * 2048 * 4


def write_shards(folder: Path) -> dict[str, np.ndarray]:
    tensors = {name: np.full((3, 2), value, np.float32) for value, name in enumerate("abcd")}
    save_file({name: tensors[name] for name in "ac"}, folder / SHARDS[0])
    save_file({name: tensors[name] for name in "bd"}, folder / SHARDS[1])
    return tensors


def write_index(folder: Path, **changes: str) -> None:
    files = {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0], "d": SHARDS[1]} | changes
    write_json(folder / INDEX, {"metadata": {}, "weight_map": files})


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_with_and_without_an_index(tmp_path: Path, with_index: bool) -> None:
    expected = write_shards(tmp_path)
    if with_index:
        write_index(tmp_path)
    tensors = open_safetensors(tmp_path)
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.floats(0, 3), expected[name])


def test_only_what_the_index_names_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_json(tmp_path / INDEX, {"weight_map": {"a": SHARDS[0]}})
    assert set(open_safetensors(tmp_path)) == {"a"}


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_index(tmp_path)
    save_file({"single": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert set(open_safetensors(tmp_path)) == {"single"}


def test_a_file_of_another_name_and_an_adapter(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "weights.safetensors")
    save_file({"b": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    assert set(open_safetensors(tmp_path)) == {"a"}


def test_links_out_of_the_folder_are_followed_since_the_hubs_cache_is_made_of_them(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "blobs" / "1234")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(Path("..") / "blobs" / "1234")
    assert open_safetensors(tmp_path / "snapshot")["a"].floats(0, 1) == [1.0]


def lacking_shard(folder: Path) -> None:
    write_shards(folder)
    write_index(folder)
    (folder / SHARDS[1]).unlink()


def lacking_shard_without_index(folder: Path) -> None:
    write_shards(folder)
    (folder / SHARDS[0]).unlink()


def index_of_another_checkpoint(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, e=SHARDS[0])


def doubled(folder: Path) -> None:
    write_shards(folder)
    save_file({"a": np.zeros(1, np.float32)}, folder / SHARDS[1])


def several(folder: Path) -> None:
    for name in ("x", "y", "z"):
        save_file({"a": np.zeros(1, np.float32)}, folder / f"{name}.safetensors")


def text(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_shards(folder)
        (folder / name).write_text(content)

    return write


def only(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"x")

    return write


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "lacking shard": (lacking_shard, f"lacks {SHARDS[1]}, which {INDEX} names; copy or download all files"),
    "lacking shard, no index": (lacking_shard_without_index, f"lacks {SHARDS[0]}; copy or download all files"),
    "index of another": (index_of_another_checkpoint, f"says that e is in {SHARDS[0]}, but it is not"),
    "doubled": (doubled, "The tensor a is in .* and in another safetensors file of that folder"),
    "several": (several, r"several safetensors files \(x.safetensors and 2 more\) but no"),
    "pickle": (only("pytorch_model.bin"), r"as pickle \(pytorch_model.bin\), which can run code and is not read"),
    "adapter": (only("adapter_model.safetensors"), "holds a LoRA adapter and no model"),
    "gguf": (only("tiny.gguf"), r"name the file, such as .*/tiny\.gguf"),
    "nothing": (only("config.json"), "holds no weights; expected model.safetensors"),
    "index not JSON": (text(INDEX, "{"), "is no valid JSON"),
    "index not an object": (text(INDEX, "[1]"), "does not hold one JSON object"),
    "index too deep": (text(INDEX, "[" * 100_000), "is no valid JSON"),
    "no weight_map": (text(INDEX, '{"weight_map": ["a"]}'), "has no weight_map from tensors to files"),
    "weight_map of numbers": (text(INDEX, '{"weight_map": {"a": 1}}'), "has no weight_map from tensors to files"),
    "name twice": (text(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'), "a name stands there twice"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(tmp_path: Path, case: str) -> None:
    make, message = FOLDERS[case]
    make(tmp_path)
    with pytest.raises(LlamaExportError, match=message):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "a\0b"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    write_json(folder / INDEX, {"weight_map": {"a": name}})
    with pytest.raises(LlamaExportError, match="but only files of its own folder are read"):
        open_safetensors(folder)


def test_a_truncated_file_is_told_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((5, 3), np.float32)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(LlamaExportError, match=rf"model\.safetensors is truncated: .* found {size};") as caught:
            open_safetensors(tmp_path)
        found = re.search(r"expected at least (\d+) bytes", str(caught.value))
        assert found
        assert size < int(found[1]) <= len(whole)


FILES: dict[str, tuple[bytes, str]] = {
    "longer": (
        raw({"a": entry("F32", [1], 0, 4)}, bytes(5)),
        "has 66 bytes where its header describes 65|has .* where",
    ),
    "huge header": (raw({}, length=1 << 62), "its header would have 4,611,686,018 GB"),
    "not JSON": (raw(b"{]"), "is no valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "is no valid JSON"),
    "not an object": (raw([1]), "does not hold one JSON object"),
    "entry no object": (raw({"a": 1}), "its header describes a wrongly"),
    "no dtype": (raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "describes a wrongly"),
    "negative shape": (raw({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4)), "describes a wrongly"),
    "shape of booleans": (raw({"a": entry("F32", [True], 0, 4)}, bytes(4)), "describes a wrongly"),
    "shape without end": (raw({"a": entry("F32", [1] * 9, 0, 4)}, bytes(4)), "describes a wrongly"),
    "shape too large": (
        raw({"a": entry("F32", [2**62] * 2, 0, 4)}, bytes(4)),
        "a has 4 bytes, which is not F32 of shape",
    ),
    "huge number": (
        raw(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'),
        "is no valid JSON",
    ),
    "offsets backwards": (raw({"a": entry("F32", [0], 4, 0)}, bytes(4)), "a has -4 bytes"),
    "offsets of one": (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, bytes(4)), "a wrongly"),
    "wrong size": (raw({"a": entry("F32", [2], 0, 4)}, bytes(4)), r"a has 4 bytes, which is not F32 of shape \[2\]"),
    "overlap": (
        raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, bytes(8)),
        "the data of b does not follow the tensor before it",
    ),
    "hole": (
        raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)),
        "the data of b does not follow the tensor before it",
    ),
    "unknown type": (
        raw({"a": entry("F4", [4], 0, 2)}, bytes(2)),
        "The tensor a in .* is stored as 'F4', which is no type of safetensors that this version knows",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_refused(tmp_path: Path, case: str) -> None:
    content, message = FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(LlamaExportError, match=message) as caught:
        open_safetensors(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "I32", "F64"])
def test_only_floating_point_is_a_weight(tmp_path: Path, dtype: str) -> None:
    size = {"I32": 16, "F64": 32}.get(dtype, 4)
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry(dtype, [4], 0, size)}, bytes(size)))
    tensor = open_safetensors(tmp_path)["a"]
    with pytest.raises(LlamaExportError, match=rf"a in .* is stored as {dtype}, but F32, F16, BF16 are read"):
        plain_tensor(tensor)


def test_empty_tensors_and_metadata_are_fine(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": entry("F32", [0, 3], 0, 0), "b": entry("BF16", [2, 0], 0, 0)}
    (tmp_path / "model.safetensors").write_bytes(raw(header))
    tensors = open_safetensors(tmp_path)
    assert tensors["a"].floats(0, 0).shape == (0, 3)
    assert tensors["b"].floats(0, 2).shape == (2, 0)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": np.zeros((100, 100), np.float32)}, tmp_path / "model.safetensors")
    tensor = open_safetensors(tmp_path)["a"]
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(LlamaExportError, match="ended at byte 1000 while it was being read"):
        tensor.floats(0, 100)


def test_a_file_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(LlamaExportError, match=r"is not a plain file"):
        open_file(tmp_path / "model.safetensors")
