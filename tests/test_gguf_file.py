"""Reading GGUF headers: what a good file gives, and that a bad one never gives anything but LlamaExportError."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.export.gguf.file import GgufTensor, read_gguf, read_rows
from support.gguf_models import write_gguf, write_llama_gguf


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _header(tensors: int = 0, entries: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries)


def _tensor_entry(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _written(path: Path, content: bytes, size: int | None = None) -> Path:
    path.write_bytes(content)
    if size is not None:
        with path.open("r+b") as file:
            file.truncate(size)  # sparse: takes no room
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_llama_gguf(tmp_path / "small.gguf", types="Q4_1", layers=1, vocab=97, hidden=32, heads=2, kv_heads=1)


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "kinds.gguf", "llama")
    for kind, value in {
        "uint8": 200, "int8": -100, "uint16": 60000, "int16": -30000, "uint32": 4_000_000_000, "int32": -2_000_000_000,
        "uint64": 2**63, "int64": -(2**62), "float32": 0.5, "float64": 0.1, "bool": True, "string": "grüße 東京",
    }.items():  # fmt: skip
        getattr(writer, f"add_{kind}")(f"one.{kind}", value)
    writer.add_array("many.int", [1, -2, 3])
    writer.add_array("many.float", [0.25, -4.0])
    writer.add_array("many.string", ["", "a", "é" * 40])
    writer.add_array("many.bool", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    metadata = read_gguf(tmp_path / "kinds.gguf").metadata

    one = {key.removeprefix("one."): value for key, value in metadata.items() if key.startswith("one.")}
    assert one == {
        "uint8": 200, "int8": -100, "uint16": 60000, "int16": -30000, "uint32": 4_000_000_000, "int32": -2_000_000_000,
        "uint64": 2**63, "int64": -(2**62), "float32": 0.5, "float64": 0.1, "bool": True, "string": "grüße 東京",
    }  # fmt: skip
    assert {type(value) for value in one.values()} == {int, float, bool, str}
    assert metadata["many.int"] == (1, -2, 3)
    assert metadata["many.float"] == (0.25, -4.0)
    assert metadata["many.string"] == ("", "a", "é" * 40)
    assert metadata["many.bool"] == (True, False)


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_tensors_are_where_the_gguf_package_finds_them(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "aligned.gguf"
    generator = np.random.default_rng(0)
    tensors = {
        "a": (generator.standard_normal((3, 64)), "Q4_0"),
        "b": (generator.standard_normal(5), "F32"),
        "c": (generator.standard_normal((7, 33)), "F16"),
        "d": (generator.standard_normal((2, 32)), "Q8_0"),
        "e": (generator.standard_normal((1, 3)), "BF16"),
    }
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, (values, kind) in tensors.items():
        qtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(path)

    content = path.read_bytes()
    for theirs in gguf.GGUFReader(path).tensors:
        ours = file.tensors[theirs.name]
        assert ours == GgufTensor(
            theirs.name,
            tuple(int(size) for size in reversed(theirs.shape)),
            theirs.tensor_type.name,
            int(theirs.data_offset),
            int(theirs.n_bytes),
        )
        rows = ours.shape[0]
        assert read_rows(path, ours, 0, rows).tobytes() == content[ours.offset : ours.offset + ours.size]
        assert (
            read_rows(path, ours, rows - 1, rows).tobytes()
            == content[ours.offset : ours.offset + ours.size][-ours.row_bytes :]
        )
        assert read_rows(path, ours, rows, rows).shape == (0, ours.row_bytes)


def test_version_2_is_read(small: Path) -> None:
    content = bytearray(small.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    small.write_bytes(content)
    assert "token_embd.weight" in read_gguf(small).tensors


def test_header_larger_than_the_first_read(tmp_path: Path) -> None:
    words = [f"word {index} " * 20 for index in range(20_000)]
    path = write_gguf(tmp_path / "long.gguf", {"words": words, "after": 7}, {"t": (np.ones((2, 2)), "F32")})
    file = read_gguf(path)
    assert file.metadata["words"] == tuple(words)
    assert file.metadata["after"] == 7
    assert read_rows(path, file.tensors["t"], 1, 2).view("<f4").tolist() == [[1.0, 1.0]]


def test_every_cut_is_reported(small: Path) -> None:
    content = small.read_bytes()
    file = read_gguf(small)
    start = min(tensor.offset for tensor in file.tensors.values())
    end = max(tensor.offset + tensor.size for tensor in file.tensors.values())
    generator = random.Random(0)
    lengths = {*range(0, 400), *generator.sample(range(start), 300), *generator.sample(range(start, end), 100)}
    for length in sorted(lengths, reverse=True):
        small.write_bytes(content[:length])
        with pytest.raises(LlamaExportError, match=r"Cannot read the GGUF file .*\.$"):
            read_gguf(small)


def test_cut_in_the_data_names_the_tensor(small: Path) -> None:
    file = read_gguf(small)
    last = max(file.tensors.values(), key=lambda tensor: tensor.offset)
    small.write_bytes(small.read_bytes()[: last.offset + last.size - 1])
    with pytest.raises(LlamaExportError, match=f"'{last.name}'.*truncated"):
        read_gguf(small)


def test_file_that_shrinks_after_it_was_opened(small: Path) -> None:
    tensor = read_gguf(small).tensors["token_embd.weight"]
    small.write_bytes(small.read_bytes()[: tensor.offset + tensor.row_bytes + 1])
    assert read_rows(small, tensor, 0, 1).shape == (1, tensor.row_bytes)
    with pytest.raises(LlamaExportError, match=r"token_embd\.weight"):
        read_rows(small, tensor, 0, 2)
    small.unlink()
    with pytest.raises(LlamaExportError, match=r"token_embd\.weight"):
        read_rows(small, tensor, 0, 1)


def test_damaged_bytes_never_raise_anything_else(small: Path) -> None:
    content = small.read_bytes()
    start = min(tensor.offset for tensor in read_gguf(small).tensors.values())
    generator = random.Random(1)
    refused = 0
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 1, 4])):
            damaged[generator.randrange(start)] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        small.write_bytes(damaged)
        try:
            read_gguf(small)
        except LlamaExportError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (_header(version=1), "version is 1"),
        (_header(version=4), "version is 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (_header(entries=1) + _string("k") + struct.pack("<I", 13), "unknown value type 13"),
        (_header(entries=1) + _string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(40), "array of arrays"),
        (_header(entries=1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 0), "not UTF-8"),
        (_header(entries=2) + 2 * (_string("key") + struct.pack("<II", 4, 0)), "'key' appears twice"),
        (_header(tensors=2) + 2 * _tensor_entry("t", (1,)) + bytes(100), "'t' appears twice"),
        (_header(tensors=1) + _tensor_entry("t", ()) + bytes(100), "0 dimensions"),
        (_header(tensors=1) + _tensor_entry("t", (1,) * 5) + bytes(100), "5 dimensions"),
        (_header(tensors=1) + _tensor_entry("t", (0, 4)) + bytes(100), "'t' has 0 columns"),
        (_header(tensors=1) + _tensor_entry("t", (33, 2), kind=2) + bytes(999), "'t' has 33 columns"),
        (_header(tensors=1) + _tensor_entry("t", (288, 2), kind=12) + bytes(999), "'t' has 288 columns"),
        (_header(tensors=1) + _tensor_entry("t", (32,), kind=2) + bytes(999), "'t' is a vector of type Q4_0"),
        (_header(tensors=1) + _tensor_entry("t", (256,), kind=14) + bytes(999), "'t' is a vector of type Q6_K"),
        (_header(tensors=1) + _tensor_entry("t", (256, 1), kind=9) + bytes(999), "'t' has the type Q8_1"),
        (_header(tensors=1) + _tensor_entry("t", (4,), kind=9999) + bytes(999), "'t' has the type number 9999"),
        (_header(tensors=1) + _tensor_entry("t", (4,), offset=2**63) + bytes(99), "'t' ends at byte"),
        (_header(tensors=1) + _tensor_entry("t", (2**62, 2**62)) + bytes(99), "'t' ends at byte"),
        (_header(entries=1) + _string("general.alignment") + struct.pack("<II", 4, 24), "alignment must be a power"),
        (_header(entries=1) + _string("general.alignment") + struct.pack("<II", 4, 0), "alignment must be a power"),
        (_header(entries=1) + _string("general.alignment") + struct.pack("<I", 8) + _string("x"), "alignment must be"),
        (_header(entries=1) + _string("split.count") + struct.pack("<IH", 2, 3), "one of 3 parts"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, why: str) -> None:
    path = _written(tmp_path / "bad.gguf", content)
    with pytest.raises(LlamaExportError) as caught:
        read_gguf(path)
    assert why in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unsupported_type_names_the_supported_ones(tmp_path: Path) -> None:
    content = _header(tensors=1) + _tensor_entry("output.weight", (256, 1), kind=15) + bytes(999)
    with pytest.raises(
        LlamaExportError, match=r"'output.weight'.*Q8_K.*F32, F16, BF16, Q4_0.*Q6_K.*IQ3_S are supported"
    ):
        read_gguf(_written(tmp_path / "q8.gguf", content))


@pytest.mark.parametrize(
    "content",
    [
        _header(tensors=2**60),
        _header(entries=2**60),
        _header(tensors=2**30, entries=2**30),
        _header(entries=1) + struct.pack("<Q", 2**40),
        _header(entries=1) + _string("k") + struct.pack("<IQ", 8, 2**62),
        _header(entries=1) + _string("k") + struct.pack("<IQ", 8, 2**36),
        _header(entries=1) + _string("k") + struct.pack("<IIQ", 9, 8, 2**35),
        _header(entries=1) + _string("k") + struct.pack("<IIQ", 9, 10, 2**61),
        _header(entries=1) + _string("k") + struct.pack("<IIQ", 9, 0, 2**36),
        _header(tensors=1) + struct.pack("<Q", 2**38),
    ],
)
@pytest.mark.parametrize("size", [None, 1 << 40])
def test_absurd_counts_cost_nothing(tmp_path: Path, content: bytes, size: int | None) -> None:
    path = _written(tmp_path / "absurd.gguf", content, size)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(LlamaExportError):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        assert time.perf_counter() - begin < 1.0
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["missing.gguf", "folder"])
def test_path_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(LlamaExportError, match="cannot be opened"):
        read_gguf(tmp_path / name)


def test_rows_outside_of_the_tensor(small: Path) -> None:
    tensor = read_gguf(small).tensors["token_embd.weight"]
    for start, stop in ((-1, 2), (0, 98), (3, 2)):
        with pytest.raises(IndexError):
            read_rows(small, tensor, start, stop)


@pytest.mark.smollm2
def test_smollm2_header_is_read_at_once(smollm2_gguf: Path) -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        file = read_gguf(smollm2_gguf)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.3
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(file.metadata["tokenizer.ggml.merges"]) == 48900
    assert len(file.tensors) == 272
    assert file.tensors["token_embd.weight"] == GgufTensor(
        "token_embd.weight", (49152, 576), "Q8_0", 1785664, 49152 * 18 * 34
    )
