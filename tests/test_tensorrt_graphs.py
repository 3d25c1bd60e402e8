"""The dialects `trt` and `trt-primitive`: the same numbers as PyTorch, on the very file that TensorRT gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from llama_export.errors import LlamaExportError
from llama_export.optimize.graph import FLOAT32_SCOPE, nodes_of
from llama_export.optimize.operators.lint import types_of
from onnx import helper
from support.graphs import VARIANTS, llama, logits_of, source_tensors, traced_once, with_stored_weights
from support.replay import DIALECTS, Replay, lower_to, write
from transformers import PreTrainedModel


def replay(
    dialect: str, variant: str, folder: Path, *, rows: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Replay, PreTrainedModel]:
    """A graph of this variant ready to run, and the model whose weights it stores."""
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    graph = traced_once(model.config, dtype=dtype)
    half = dtype == torch.float16
    formats = lower_to(dialect, graph, model.config, tensors, "fp16" if half else "fp32")
    twin = with_stored_weights(model, tensors, formats, np.float16 if half else np.float32)
    return Replay(write(graph, tensors, folder), rows), twin


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_equals_pytorch(variant: str, dialect: str, tmp_path: Path) -> None:
    """In one piece; in chunks and single steps, over what the first reading left in the cache."""
    graph, model = replay(dialect, variant, tmp_path)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 40))
    expected = logits_of(model, ids)
    for cuts in ((40,), (25, 38, 39, 40)):
        found = graph.read(ids, cuts)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("variant", ["grouped", "biased", "head-dim-20", "odd-rows", "mistral-window", "qwen2"])
def test_float16_activations(variant: str, dialect: str, tmp_path: Path) -> None:
    """What a GPU runs. Off by what float16 rounds, and by no more; logits come in float32."""
    graph, model = replay(dialect, variant, tmp_path, rows=2, dtype=torch.float16)
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 9))
    expected = logits_of(model, ids)
    found = graph.read(ids, (5, 8, 9))
    assert found.dtype == np.float32
    assert {cache.dtype for cache in graph.cache.values()} == {np.dtype(np.float16)}
    assert np.abs(found - expected).max() < 0.004 * np.abs(expected).max()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("variant", ["one-kv-head", "mistral-window", "head-dim-20"])
def test_rows_of_a_batch_are_at_places_of_their_own(variant: str, dialect: str, tmp_path: Path) -> None:
    """Prompts of several lengths, each read alone as the prefill profile does, then decoded together."""
    graph, model = replay(dialect, variant, tmp_path, rows=3)
    vocab, lengths = model.config.vocab_size, [5, 11, 2]
    texts = np.random.default_rng(3).integers(0, vocab, (3, 20))
    caches = {name: cache.copy() for name, cache in graph.cache.items()}
    for row, length in enumerate(lengths):
        graph.cache = {name: cache[row : row + 1].copy() for name, cache in caches.items()}
        graph.read(texts[row : row + 1, :length], (length,))
        for name, cache in graph.cache.items():
            caches[name][row] = cache[0]
    graph.cache = caches
    for step in range(4):
        places = [length + step for length in lengths]
        found = graph(np.stack([texts[row, place : place + 1] for row, place in enumerate(places)]), places)
        for row, place in enumerate(places):
            assert np.abs(found[row, 0] - logits_of(model, texts[row : row + 1, : place + 1])[0, -1]).max() < 1e-4


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("variant", ["grouped", "qwen2-window"])
def test_a_text_is_rewound_by_its_positions_alone(variant: str, dialect: str, tmp_path: Path) -> None:
    graph, model = replay(dialect, variant, tmp_path)
    random = np.random.default_rng(4)
    first, second = random.integers(0, model.config.vocab_size, (2, 1, 30))
    graph.read(first, (30,))
    text = np.concatenate([first[:, :12], second[:, :7]], axis=1)
    found = graph(second[:, :7], [12])
    assert np.abs(found - logits_of(model, text)[:, 12:]).max() < 1e-4


@pytest.mark.parametrize("dialect", DIALECTS)
def test_logits_are_of_the_positions_asked_for(dialect: str, tmp_path: Path) -> None:
    graph, model = replay(dialect, "grouped", tmp_path, rows=2)
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, (2, 8))
    expected = logits_of(model, ids)
    asked = np.array([[7, 0, 3], [2, 2, 6]])
    found = graph(ids, [0, 0], asked)
    assert found.shape == (2, 3, model.config.vocab_size)
    assert np.abs(found - np.take_along_axis(expected, asked[:, :, None], axis=1)).max() < 1e-4


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dialect", ["trt", "primitive-21"])
def test_quantised_weights(precision: str, dialect: str, tmp_path: Path) -> None:
    """Blocks, by DequantizeLinear on transposed weights."""
    model = llama(**VARIANTS["untied"])
    tensors = source_tensors(model)
    graph = traced_once(model.config)
    formats = lower_to(dialect, graph, model.config, tensors, precision)
    twin = with_stored_weights(model, tensors, formats)
    ids = np.random.default_rng(6).integers(0, model.config.vocab_size, (1, 12))
    found = Replay(write(graph, tensors, tmp_path), 1).read(ids, (9, 12))
    assert np.abs(found - logits_of(twin, ids)).max() < 1e-4


@pytest.mark.parametrize("dialect", DIALECTS)
def test_inputs_and_outputs(dialect: str) -> None:
    """As bundles and engines' profiles have them."""
    config = llama(num_hidden_layers=1, **VARIANTS["head-dim-20"]).config
    graph = traced_once(config, dtype=torch.float16)
    lower_to(dialect, graph, config, source_tensors(llama(num_hidden_layers=1, **VARIANTS["head-dim-20"])), "fp16")
    past = [64, 24] if dialect == "trt" else ["past_sequence", 20]
    present = [64, 24] if dialect == "trt" else ["sequence", 20]
    half, long = ir.DataType.FLOAT16, ir.DataType.INT64
    assert signature(graph.graph.inputs) == {
        "input_ids": (long, ["batch", "sequence"]),
        "position_ids": (long, ["batch", "sequence"]),
        "logits_positions": (long, ["batch", "kept"]),
        **{f"past_key_values.0.{part}": (half, ["batch", 2, *past]) for part in ("key", "value")},
    }
    assert signature(graph.graph.outputs) == {
        "logits": (ir.DataType.FLOAT, ["batch", "kept", 259]),
        **{f"present.0.{part}": (half, ["batch", 2, *present]) for part in ("key", "value")},
    }


def signature(values: Sequence[ir.Value]) -> dict[str, tuple[ir.DataType, list[int | str]]]:
    return {
        str(value.name): (value.dtype, [size if isinstance(size, int) else size.value for size in value.shape])
        for value in values
    }


def test_heads_beyond_all_kernels_are_refused() -> None:
    config = llama(num_hidden_layers=1, head_dim=264).config
    with pytest.raises(LlamaExportError, match="264 values and TensorRT's attention takes up to 256"):
        lower_to("trt", traced_once(config), config, source_tensors(llama(num_hidden_layers=1, head_dim=264)), "fp32")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_graphs_are_valid_onnx(dialect: str, tmp_path: Path) -> None:
    """By ONNX's own checker, types and shapes included, in their opset and its IR version."""
    model = llama(**VARIANTS["biased"])
    graph = traced_once(model.config, dtype=torch.float16)
    lower_to(dialect, graph, model.config, source_tensors(model), "fp16")
    path = write(graph, source_tensors(model), tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path, load_external_data=False)
    opset = proto.opset_import[0].version
    assert len(proto.opset_import) == 1
    assert proto.ir_version == helper.find_min_ir_version_for(proto.opset_import)
    if opset < 24:
        assert {node.op_type for node in proto.graph.node} & {"Attention", "TensorScatter", "RotaryEmbedding"} == set()


def test_only_queries_of_a_group_are_moved(tmp_path: Path) -> None:
    """Keys and values are laid together once a layer, and neither repeated nor expanded for grouped heads."""
    model = llama(**VARIANTS["one-kv-head"])
    graph = traced_once(model.config, dtype=torch.float16)
    lower_to("primitive-21", graph, model.config, source_tensors(model), "fp16")
    assert [node.op_type for node in graph.graph if node.op_type in ("Expand", "Tile")] == ["Tile"]  # the positions
    for softmax in nodes_of(graph, "Softmax"):
        add = softmax.inputs[0].producer()
        product = add.inputs[0].producer()
        (after,) = softmax.outputs[0].consumers()
        assert [add.op_type, product.op_type, after.op_type] == ["Add", "MatMul", "MatMul"]
        assert product.inputs[1].producer().inputs[0].producer().op_type == "Concat"
        assert after.inputs[1].producer().op_type == "Concat"


def test_what_must_stay_in_float32_says_so() -> None:
    """TensorRT 8.6 chooses types itself, so a recipe names the nodes: squares, tables and the scale."""
    model = llama(**VARIANTS["grouped"])
    graph = traced_once(model.config, dtype=torch.float16)
    lower_to("primitive-17", graph, model.config, source_tensors(model), "fp16")
    types = types_of(graph)
    wide = {
        node.op_type
        for node in graph.graph
        if types[node.outputs[0]] == ir.DataType.FLOAT and f"/{FLOAT32_SCOPE}/" not in f"{node.name}"
    }
    assert wide == {"Gather", "Split", "Cast"}  # rows of the tables, halves of a head, the logits
