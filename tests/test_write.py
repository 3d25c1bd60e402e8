"""The data file: every weight once, at its place, with memory bounded by a step."""

from __future__ import annotations

import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from llama_export.errors import LlamaExportError
from llama_export.export.canonical import canonical
from llama_export.export.config import transformers_config
from llama_export.export.loss import loss_warning
from llama_export.export.rotary import rotary_tables
from llama_export.export.source import open_source
from llama_export.export.write import _STEP, lay_out, placements, write_data
from llama_export.optimize.formats import BF16
from llama_export.optimize.ort import OrtOptions, lower
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.quantise import dequantise, quantise, stored_values
from llama_export.optimize.schemes import DEFAULT_INT4
from llama_export.optimize.tensors import SourceTensor
from llama_export.progress import Silent
from support.gguf_models import write_llama_gguf
from support.graphs import llama, lowered, source_tensors

CONTEXT = 64
STEP_BYTES = 4 * _STEP


def test_bytes_lie_where_the_graph_says(tmp_path: Path) -> None:
    model = llama(intermediate_size=77)
    tensors = source_tensors(model)
    lowered(canonical(model.config, context=CONTEXT), model.config, tensors, tmp_path, precision="int4")
    proto = onnx.load(tmp_path / "model.onnx")
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in proto.graph.initializer}
    name = "model.layers.2.mlp.down_proj"
    blocks = quantise(tensors[f"{name}.weight"].read(0, 128), DEFAULT_INT4)
    codes = stored[f"{name}.codes"].reshape(128, -1)
    assert (codes & 15 == blocks.codes[:, 0::2]).all()
    assert (codes >> 4 == blocks.codes[:, 1::2]).all()
    zeros = stored[f"{name}.zeros"]
    assert (zeros[:, 0] & 15 == blocks.zeros[:, 0]).all() and (zeros[:, 0] >> 4 == blocks.zeros[:, 1]).all()
    assert stored[f"{name}.scales"].dtype == np.float16
    assert (stored[f"{name}.scales"] == blocks.scales).all()
    joint = stored["model.layers.1.self_attn.q_k_v_proj.scales"]
    value = quantise(tensors["model.layers.1.self_attn.v_proj.weight"].read(0, 64), DEFAULT_INT4)
    assert (joint[-64:] == value.scales).all()
    assert (stored["model.norm.weight"] == tensors["model.norm.weight"].read(0, 128)).all()
    assert dequantise(blocks, 77).shape == (128, 77)


def locations(path: Path) -> dict[str, int]:
    proto = onnx.load(path, load_external_data=False)
    return {
        one.name: int(next(entry.value for entry in one.external_data if entry.key == "offset"))
        for one in proto.graph.initializer
        if one.external_data
    }


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16"])
def test_a_tied_head_is_stored_once(precision: str, tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        model = llama(tie_word_embeddings=tied, vocab_size=4096)
        folder = tmp_path / str(tied)
        folder.mkdir()
        graph = canonical(model.config, context=CONTEXT)
        lowered(graph, model.config, source_tensors(model), folder, precision=precision)
        sizes[tied] = (folder / "model.onnx.data").stat().st_size
    assert sizes[False] - sizes[True] > 0.6 * 4096 * 128 * {"int4": 0.5, "int8": 1, "fp16": 2}[precision]
    if precision != "fp16":
        offsets = locations(tmp_path / "True" / "model.onnx")
        assert offsets["lm_head.codes"] == offsets["model.embed_tokens.codes"]
        assert "lm_head.scales" not in offsets, "both read one Cast of the embedding's"


def test_a_1b_llama_in_int4_stays_below_750_mb() -> None:
    """Laid out, not written: the shape of Llama 3.2 1B with its whole context of 131,072 positions."""
    config = llama(num_hidden_layers=1).config
    config.hidden_size, config.intermediate_size, config.vocab_size = 2048, 8192, 128256
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 32, 8, 64
    config.num_hidden_layers = 16
    graph = canonical(config, context=131072)

    def none(start: int, stop: int) -> np.ndarray:
        raise AssertionError("laying out reads no weight")

    tensors = {
        name: SourceTensor(name, tuple(value.shape), "BF16", BF16, none)
        for name, value in graph.graph.initializers.items()
        if value.const_value is None
    }
    lower(graph, OrtOptions(plan_formats(tensors, "int4"), rotary_tables(config, 131072), 4))
    assert 710e6 < lay_out(graph).size < 750e6


def lowered_graph(model: object, precision: str = "int4", activations: torch.dtype = torch.float32) -> object:
    graph = canonical(model.config, context=CONTEXT, dtype=activations)
    formats = plan_formats(source_tensors(model), precision)
    lower(graph, OrtOptions(formats, rotary_tables(model.config, CONTEXT), 0))
    return graph


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_weights_that_are_no_numbers_are_told_by_name(bad: float, precision: str, tmp_path: Path) -> None:
    model = llama()
    model.state_dict()["model.layers.1.mlp.up_proj.weight"][5, 7] = bad
    graph = lowered_graph(model, precision)
    with pytest.raises(LlamaExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        write_data(graph, lay_out(graph), source_tensors(model), tmp_path, Silent(), threads=2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_rows_are_read_in_steps_and_forgotten(precision: str, threads: int, tmp_path: Path) -> None:
    """Of a matrix of 40 MB each thread holds the rows of one step; those of a step that is done are freed."""
    model = llama(vocab_size=80000, num_hidden_layers=1)
    held, most, lock = [0], [0], threading.RLock()

    def count(size: int) -> None:
        with lock:
            held[0] += size
            most[0] = max(most[0], held[0])

    def watched(tensor: SourceTensor) -> SourceTensor:
        def read(start: int, stop: int) -> np.ndarray:
            rows = tensor.read(start, stop).copy()
            count(rows.nbytes)
            weakref.finalize(rows, count, -rows.nbytes)
            return rows

        return replace(tensor, read=read)

    graph = lowered_graph(model, precision)
    tensors = {name: watched(tensor) for name, tensor in source_tensors(model).items()}
    write_data(graph, lay_out(graph), tensors, tmp_path, Silent(), threads=threads)
    assert held[0] == 0
    assert STEP_BYTES <= most[0] <= threads * STEP_BYTES


class Told(Silent):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


LARGE = {
    "a matrix in fp16": ("model.layers.1.mlp.up_proj.weight", "fp16", torch.float32, 7e4),
    "a matrix in fp32, cast where it is read": ("model.layers.1.mlp.up_proj.weight", "fp32", torch.float16, 7e4),
    "scales": ("model.layers.1.mlp.up_proj.weight", "int4", torch.float16, 1e6),
    "a vector": ("model.layers.1.input_layernorm.weight", "int4", torch.float16, -7e4),
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float16_are_told_by_name(case: str, tmp_path: Path) -> None:
    name, precision, activations, value = LARGE[case]
    model = llama()
    model.state_dict()[name].view(-1)[5] = value
    graph = lowered_graph(model, precision, activations)
    with pytest.raises(LlamaExportError, match=rf"{re.escape(name)} holds numbers .* that do not fit float16.* -t cpu"):
        write_data(graph, lay_out(graph), source_tensors(model), tmp_path, Silent(), threads=2)


@pytest.mark.filterwarnings("error")
def test_the_largest_number_of_float16_fits(tmp_path: Path) -> None:
    model = llama()
    model.state_dict()["model.layers.1.mlp.up_proj.weight"][5, 7] = 65519.0  # rounds to 65504
    graph = lowered_graph(model, "fp16", torch.float16)
    write_data(graph, lay_out(graph), source_tensors(model), tmp_path, Silent(), threads=2)


def large_offsets(folder: Path, scale: float) -> Path:
    """A GGUF file in Q4_1 of which three blocks lie far from 0."""
    rows = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32) / 20
    rows[[3, 50, 95], 32:] = scale + rows[[3, 50, 95], 32:] / 50
    return write_llama_gguf(folder / "m.gguf", types="Q4_1", tensors={"blk.1.ffn_up.weight": rows})


@pytest.mark.parametrize(
    ("scale", "activations", "tensors"),
    [(0.5, torch.float32, 0), (3000.0, torch.float32, 1), (0.5, torch.float16, 1)],
)
def test_blocks_that_are_not_kept_exactly_are_told(
    scale: float, activations: torch.dtype, tensors: int, tmp_path: Path
) -> None:
    source = open_source(str(large_offsets(tmp_path, scale)))
    config, formats = transformers_config(source.config), plan_formats(source.tensors, None)
    graph = canonical(config, context=CONTEXT, dtype=activations)
    lower(graph, OrtOptions(formats, rotary_tables(config, CONTEXT), 0))
    losses = write_data(graph, lay_out(graph), source.tensors, tmp_path, Silent(), threads=2)

    differing = {}
    for name, tensor in source.tensors.items():
        if tensor.blocks is not None:
            dtype = "float16" if activations == torch.float16 else "float32"
            kept = stored_values(tensor, formats[name], 0, tensor.shape[0], dtype)
            differing[name] = (kept != tensor.read(0, tensor.shape[0])).reshape(-1, 32).any(axis=1).sum()
    assert sum(count > 0 for count in differing.values()) == tensors
    assert {loss.tensor: loss.blocks for loss in losses} == {name: count for name, count in differing.items() if count}
    assert all(0 < loss.relative < 1e-3 for loss in losses)
    if losses:
        assert losses[0].tensor in loss_warning(losses)


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    model = llama()

    class Heard(Silent):
        told: list[tuple[int, int]]

        def advance(self, done_bytes: int, total_bytes: int) -> None:
            self.told.append((done_bytes, total_bytes))

    heard = Heard()
    heard.told = []
    graph = lowered_graph(model)
    write_data(graph, lay_out(graph), source_tensors(model), tmp_path, heard, threads=2)
    done, total = heard.told[-1]
    assert [one for one, _ in heard.told] == sorted(one for one, _ in heard.told)
    assert done == total


def test_placements_name_every_tensor_and_its_row() -> None:
    model = llama(attention_bias=True)
    graph = lowered_graph(model)
    placed = placements(graph, source_tensors(model))
    assert placed.keys() == source_tensors(model).keys()
    value = placed["model.layers.0.self_attn.v_proj.weight"]
    assert value.row == 192
    assert value.initializers["codes"] == "model.layers.0.self_attn.q_k_v_proj.codes"
    assert placed["model.layers.0.self_attn.k_proj.bias"].row == 128
