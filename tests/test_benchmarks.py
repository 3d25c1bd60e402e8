"""The benchmark scripts: what they make is what they say, and what they measure is there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import onnx
import pytest
from llama_export.benchmarks import adapters, depth, export, gguf_export, report, run
from llama_export.benchmarks.checkpoints import SHAPES, Config, byte_tokenizer, tensors, write_checkpoint
from llama_export.benchmarks.measure import measure
from llama_export.benchmarks.workers import protocol
from llama_export.export.config import expected_tensors
from llama_export.export.source import open_source
from support.hf_models import write_llama_folder
from tokenizers import Tokenizer

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
MORE = ("intermediate_size", "vocab_size", "bos_token_id", "eos_token_id")


def sized(name: str, *sizes: int) -> Config:
    """A published shape with other sizes, in the order of the keys above."""
    return {**SHAPES[name], **dict(zip((*SIZES, *MORE), sizes, strict=True))}


SHAPE = sized("llama-3.1-8b", 96, 2, 6, 2, 16, 160, 700, 698, 699)
TIED = sized("llama-3.2-1b", 64, 1, 2, 1, 32, 96, 300, 0, 1)


def write(folder: Path, shape: Config = SHAPE, seed: int = 3, shard_bytes: int = 10**9) -> Path:
    write_checkpoint(shape, folder, seed, None, shard_bytes)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_the_tensors_that_their_config_asks_for(name: str) -> None:
    shape = SHAPES[name]
    assert {tensor.name: tensor.shape for tensor in tensors(shape)} == expected_tensors(shape)


def test_llama_1b_has_its_published_size() -> None:
    assert sum(tensor.nbytes for tensor in tensors(SHAPES["llama-3.2-1b"])) == 2 * 1_235_814_400


def test_checkpoint_is_read_back_and_spread_as_announced(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "random")))
    for tensor in tensors(SHAPE):
        values = source.tensors[tensor.name].read(0, tensor.shape[0])
        assert source.tensors[tensor.name].dtype == "BF16"
        assert abs(values.mean() - tensor.mean) < 5 * tensor.std / values.size**0.5
        assert values.std() == pytest.approx(tensor.std, rel=0.3)


def test_checkpoint_depends_on_the_seed_alone(tmp_path: Path) -> None:
    files = [write(tmp_path / name, TIED, seed) / "model.safetensors" for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    first, second, other = (file.read_bytes() for file in files)
    assert first == second
    assert first != other


def test_shards_hold_the_same_weights(tmp_path: Path) -> None:
    one = open_source(str(write(tmp_path / "one")))
    several = write(tmp_path / "several", shard_bytes=100_000)
    assert len(list(several.glob("*.safetensors"))) > 2
    for name, tensor in open_source(str(several)).tensors.items():
        np.testing.assert_array_equal(tensor.read(0, tensor.shape[0]), one.tensors[name].read(0, tensor.shape[0]))


def test_byte_tokenizer_has_a_string_for_every_id() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(byte_tokenizer(SHAPE)))
    text = "Größe 東京!"
    encoded = tokenizer.encode(text).ids
    assert tokenizer.decode(encoded) == text
    assert max(encoded) < 256
    assert all(tokenizer.id_to_token(token) for token in range(SHAPE["vocab_size"]))
    assert tokenizer.decode([SHAPE["eos_token_id"]], skip_special_tokens=False) == "<|end_of_text|>"


def test_a_tokenizer_with_ids_past_the_vocabulary_is_refused(tmp_path: Path) -> None:
    large = tmp_path / "tokenizer.json"
    large.write_text(json.dumps(byte_tokenizer(SHAPE)), encoding="utf-8")
    with pytest.raises(ValueError, match="largest id is 699, but the shape has 300"):
        write_checkpoint(TIED, tmp_path / "small", 0, large, 10**9)
    assert not (tmp_path / "small").exists()


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="0 MiB free"):
        write(tmp_path / "random")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_outputs_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "not" / "there"
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), "--work", str(work), "--rounds", "0"])
    monkeypatch.setattr(export, "row", lambda tool, runs: {})
    monkeypatch.setattr(export, "markdown", lambda rows: "")
    assert export.main() == 0
    assert work.is_dir()


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["untied", "tied"])
def test_gguf_holds_the_checkpoint_in_q4_0(tmp_path: Path, shape: Config) -> None:
    folder = write(tmp_path / "random", shape)
    gguf_export.write_gguf(folder, tmp_path / "random.gguf")
    before, after = open_source(str(folder)), open_source(str(tmp_path / "random.gguf"))
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        expected = tensor.read(0, tensor.shape[0])
        if expected.ndim == 2:
            packed = gguf.quants.quantize(expected, gguf_export.Q4_0)
            expected = gguf.quants.dequantize(packed, gguf_export.Q4_0)
        np.testing.assert_array_equal(after.tensors[name].read(0, tensor.shape[0]), expected)
    rope = after.config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (
        "llama3",
        shape["rope_scaling"]["factor"],
        500000.0,
    )
    assert after.config["tie_word_embeddings"] is shape["tie_word_embeddings"]


def test_what_depth_costs_is_measured_for_every_published_depth() -> None:
    pytest.importorskip("torch", reason="tracing needs PyTorch")
    layers = [SHAPES[name]["num_hidden_layers"] for name in depth.depths()]
    assert layers == sorted({config["num_hidden_layers"] for name, config in SHAPES.items() if name != "llama-tiny"})
    found = depth.one("llama-3.2-1b", context=64)
    assert tuple(found["seconds"]) == depth.STAGES
    assert found["data_bytes"] > 1_235_814_400 * 4.625 // 8
    rows = [depth.row("llama-3.2-1b", [{**found, "peak_rss": 1}, {**found, "peak_rss": 3}])]
    assert (rows[0]["layers"], rows[0]["peak_rss"]) == (16, 2)
    assert f"| 16 | {found['nodes']} |" in depth.markdown(rows)


def test_memory_of_children_counts_and_mapped_files_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * (40 << 20))
    child = "b = b'x' * (80 << 20); import time; time.sleep(0.5)"
    parent = (
        "import mmap, subprocess, sys\n"
        f"file = open({str(file)!r}); m = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096])\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode + 7)"
    )
    result = measure([sys.executable, "-c", parent])
    assert result.status == 7
    assert result.seconds > 0.5
    assert result.peak_anon > 80 << 20
    assert result.peak_rss > result.peak_anon + (40 << 20)


class Counter:
    """An engine that counts upwards from the prompt's last token."""

    def encode(self, text: str) -> Sequence[int]:
        return [len(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def generate(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        yield from range(prompt[-1] + 1, min(prompt[-1] + 1 + count, 100))


def test_workers_report_rates_and_tokens() -> None:
    result = protocol.speed(lambda *_: Counter(), Path("model"), 1, [1, 2, 3], 5)
    assert result["tokens"] == [4, 5, 6, 7, 8]
    assert min(result["prefill_tokens_per_second"], result["decode_tokens_per_second"]) > 0


def test_a_worker_whose_engine_stops_early_fails() -> None:
    with pytest.raises(RuntimeError, match="ended after 2 of 5"):
        protocol.speed(lambda *_: Counter(), Path("model"), 1, [96, 97], 5)


def test_failure_of_a_tool_is_reported_with_its_output(tmp_path: Path) -> None:
    tool = export.Tool("broken", "int4", sys.executable, "numpy", ("-c", "import sys; sys.exit('no OUTPUT here')"))
    with pytest.raises(RuntimeError, match="broken ended with status 1:\nno OUTPUT here"):
        export.run(tool, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tool_writes_into_a_folder_that_goes_again(tmp_path: Path) -> None:
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'model').write_bytes(bytes(1234))"
    done = export.run(export.Tool("writer", "int4", sys.executable, "numpy", ("-c", code, "OUTPUT")), tmp_path)
    assert done.output_bytes == 1234
    assert list(tmp_path.iterdir()) == []


def test_a_peer_without_its_package_is_named() -> None:
    with pytest.raises(ValueError, match="has no no-such-package-at-all installed"):
        report.version(sys.executable, "no-such-package-at-all")


def test_prompt_ids_lie_in_the_vocabulary_and_stay_the_same() -> None:
    ids = run.prompt_ids(1000, 49152)
    assert ids == run.prompt_ids(1000, 49152)
    assert len(set(ids)) == 1000
    assert 0 <= min(ids) <= max(ids) < 49152


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_per_token_leave_out_what_is_looked_up(tmp_path: Path, tied: bool) -> None:
    names = {"a.MatMul.weight": 100, "cos_cache": 7, "model.embed_tokens.weight": 30}
    graph = onnx.helper.make_graph([], "g", [], [])
    data = b""
    for name, size in names.items():
        tensor = graph.initializer.add(name=name, dims=[size], data_type=onnx.TensorProto.UINT8, data_location=1)
        location = {"location": "model.onnx.data", "offset": len(data), "length": size}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in location.items())
        data += bytes(size)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes(data)
    assert run.bytes_per_token(tmp_path, tied=tied) == (130 if tied else 100)


def test_bytes_per_token_of_other_formats_are_their_files(tmp_path: Path) -> None:
    for name, size in (("model-1.safetensors", 11), ("model-2.safetensors", 13), ("config.json", 5)):
        (tmp_path / name).write_bytes(bytes(size))
    assert run.bytes_per_token(tmp_path, tied=True) == 24
    assert run.bytes_per_token(tmp_path / "model-1.safetensors", tied=True) == 11


def test_the_cost_of_adapters_is_measured(tmp_path: Path) -> None:
    checkpoint = write_llama_folder(tmp_path / "llama")
    arguments = SimpleNamespace(checkpoint=checkpoint, rank=3, prompt=9, new=4, rounds=2, threads=1)
    (tmp_path / "work").mkdir()
    found = adapters.measure(arguments, tmp_path / "work")
    assert list(found) == [adapters.PLAIN, adapters.NONE, "every projection", "q and v"]
    assert all(speed > 0 for pair in found.values() for speed in pair)
    lines = adapters.markdown(found).splitlines()
    assert lines[2].startswith(f"| {adapters.PLAIN} |")
    assert lines[2].endswith("| 1.00 | 1.00 |")
