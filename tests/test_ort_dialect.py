"""The `ort` dialect: the same numbers as PyTorch on the stored weights, in the ops that every supported runtime has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from llama_export.export.rotary import rotary_tables
from llama_export.optimize.formats import EMBEDDING, INT4, INT8, Format, int_format
from llama_export.optimize.ort import OrtOptions, lower
from llama_export.optimize.ort.attention import lower_attention
from llama_export.optimize.ort.last_positions import keep_last_positions
from llama_export.optimize.ort.linear import lower_linears
from llama_export.optimize.ort.norms import lower_norms
from llama_export.optimize.ort.pack_qkv import pack_qkv
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.quantise import dequantise, quantise
from llama_export.optimize.shared.pack_linears import pack_linears
from llama_export.optimize.stored import stored_of
from llama_export.optimize.tensors import Blocks, SourceTensor
from support.graphs import (
    VARIANTS,
    llama,
    logits_of,
    lowered,
    run_ort,
    session,
    source_tensors,
    traced_once,
    with_stored_weights,
)

CONTEXT = 64
PRECISIONS = ("fp32", "fp16", "int8", "int4")
TABLES = (np.ones((CONTEXT, 16), np.float32), np.ones((CONTEXT, 16), np.float32))


def ops(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lowered_graph_equals_pytorch(variant: str, tmp_path: Path) -> None:
    """In full precision, and in int4 against PyTorch on the same quantised weights; in one piece, chunks and steps."""
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    for precision in ("fp32", "int4"):
        folder = tmp_path / precision
        folder.mkdir()
        formats = lowered(traced_once(model.config), model.config, tensors, folder, precision=precision)
        ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 40))
        expected = logits_of(with_stored_weights(model, tensors, formats), ids)
        graph = session(folder / "model.onnx")
        assert np.abs(run_ort(graph, ids, (40,)) - expected).max() < 1e-4
        assert np.abs(run_ort(graph, ids, (25, 38, 39, 40)) - expected).max() < 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["biased", "untied", "odd-sizes", "odd-rows", "qwen2-window"])
def test_every_precision(precision: str, variant: str, tmp_path: Path) -> None:
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    formats = lowered(traced_once(model.config), model.config, tensors, tmp_path, precision=precision)
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 9))
    expected = logits_of(with_stored_weights(model, tensors, formats), ids)
    graph = session(tmp_path / "model.onnx")
    assert np.abs(run_ort(graph, ids, (8, 9)) - expected).max() < 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["grouped", "biased", "head-dim-20", "odd-rows", "mistral-window"])
def test_float16_activations(variant: str, precision: str, tmp_path: Path) -> None:
    """What a GPU runs; the CPU's kernels take the same graph. Off by what float16 rounds, and by no more."""
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    graph = traced_once(model.config, dtype=torch.float16)
    formats = lowered(graph, model.config, tensors, tmp_path, precision=precision)
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 9))
    expected = logits_of(with_stored_weights(model, tensors, formats, np.float16), ids)
    found = run_ort(session(tmp_path / "model.onnx"), ids, (8, 9))
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < 0.004 * np.abs(expected).max()


def with_native_blocks(
    tensors: dict[str, SourceTensor], format: Format, *, ordered: bool = False
) -> dict[str, SourceTensor]:
    """The same matrices as checkpoints that come quantised have them; with columns in an order of their own, too."""

    def native(tensor: SourceTensor) -> SourceTensor:
        if len(tensor.shape) == 1 or (tensor.name == EMBEDDING and (format.zeros or ordered)):
            return tensor
        generator, columns = np.random.default_rng(len(tensor.name)), tensor.shape[1]
        # As GPTQ has them: the same for projections that read the same values, and for no others.
        order = np.random.default_rng(columns + ("gate" in tensor.name)).permutation(columns) if ordered else None
        rows = tensor.read(0, tensor.shape[0])
        blocks = quantise(rows if order is None else rows[:, order], int_format(format.bits, format.block))
        points = generator.integers(0, 2**format.bits, blocks.scales.shape).astype(np.uint8)
        offsets = generator.standard_normal(blocks.scales.shape).astype(np.float32) / 50
        blocks = Blocks(
            format, blocks.codes, blocks.scales, points if format.zeros else None, offsets if format.offsets else None
        )

        def part(start: int, stop: int) -> Blocks:
            return Blocks(
                format,
                blocks.codes[start:stop],
                blocks.scales[start:stop],
                None if blocks.zeros is None else blocks.zeros[start:stop],
                None if blocks.offsets is None else blocks.offsets[start:stop],
            )

        def read(start: int, stop: int) -> np.ndarray:
            stored = dequantise(part(start, stop), columns)
            if order is None:
                return stored
            values = np.empty_like(stored)
            values[:, order] = stored
            return values

        return SourceTensor(tensor.name, tensor.shape, "test", format, read, part, order)

    return {name: native(tensor) for name, tensor in tensors.items()}


NATIVE = [
    *(INT4, INT8, int_format(4, 16), int_format(8, 16), int_format(4, 128), int_format(8, 64)),
    *(int_format(4, offsets=True), int_format(8, offsets=True), int_format(4, 16, offsets=True)),
    *(int_format(4, zeros=True), int_format(8, zeros=True), int_format(4, 128, zeros=True)),
]


@pytest.mark.parametrize("format", NATIVE, ids=lambda format: format.name)
def test_native_blocks_are_kept_without_loss(format: Format, tmp_path: Path) -> None:
    tied = not format.zeros  # no checkpoint has an embedding with zero points
    check_native(
        with_native_blocks(source_tensors(llama(num_hidden_layers=2, **WIDE, tie_word_embeddings=tied)), format),
        tied,
        tmp_path,
    )


@pytest.mark.parametrize("format", [INT4, int_format(4, 16, zeros=True)], ids=lambda format: format.name)
def test_columns_in_an_order_of_their_own(format: Format, tmp_path: Path) -> None:
    tensors = with_native_blocks(
        source_tensors(llama(num_hidden_layers=2, **WIDE, tie_word_embeddings=False)), format, ordered=True
    )
    check_native(tensors, False, tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    inputs = {node.name: node.input[0] for node in model.graph.node if node.op_type == "MatMulNBits"}
    assert "model.layers.0.self_attn.q_k_v_proj/MatMulNBits" in inputs  # of one order
    assert "model.layers.0.mlp.gate_proj/MatMulNBits" in inputs  # of two
    orders = [one for one in model.graph.initializer if one.name.startswith("order.")]
    assert len(orders) == 3  # shared by all of equal columns
    assert all(one.external_data for one in orders)


WIDE = {"intermediate_size": 256}  # of whole blocks


def check_native(tensors: dict[str, SourceTensor], tied: bool, folder: Path) -> None:
    model = llama(num_hidden_layers=2, **WIDE, tie_word_embeddings=tied)
    formats = plan_formats(tensors, None)
    graph = traced_once(model.config)
    lowered(graph, model.config, tensors, folder, precision=None)
    twin = with_stored_weights(model, tensors, formats)
    values = twin.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    assert (values == tensors["model.layers.1.mlp.up_proj.weight"].read(0, values.shape[0])).all()
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 9))
    expected = logits_of(twin, ids)
    found = run_ort(session(folder / "model.onnx"), ids, (8, 9))
    assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_mixed_formats_keep_projections_apart(tmp_path: Path) -> None:
    """A GGUF may store v in more bits than q and k: then q and k are packed, and v stays by itself."""
    model = llama()
    tensors = source_tensors(model)
    formats = plan_formats(tensors, "int4")
    graph = traced_once(model.config)
    mixed = {**formats, **{name: INT8 for name in formats if "v_proj" in name}}
    lower(graph, OrtOptions(mixed, rotary_tables(model.config, CONTEXT), 0))
    attention = next(node for node in graph.graph if node.op_type == "GroupQueryAttention")
    assert all(value is not None for value in attention.inputs[:3])
    assert ops(graph)["MatMulNBits"] == 3 * 5 + 1


def full_lowering(**changes: object) -> ir.Model:
    config = llama(**changes).config
    graph = traced_once(config)
    formats = plan_formats(source_tensors(llama(**changes)), "int4")
    lower(graph, OrtOptions(formats, rotary_tables(config, CONTEXT), 4))
    return graph


def test_graph_is_what_the_dialect_promises() -> None:
    graph = full_lowering()
    found = ops(graph)
    assert graph.graph.opset_imports == {"": 21, "com.microsoft": 1}
    assert found["GroupQueryAttention"] == 3
    assert found["MatMulNBits"] == 3 * 4 + 1  # q with k and v, o, gate with up, down; head
    assert found["SkipSimplifiedLayerNormalization"] == 6
    assert found["SimplifiedLayerNormalization"] == 1
    assert found["GatherBlockQuantized"] == 1
    assert not {"Transpose", "Attention", "RotaryEmbedding", "MatMul"} & set(found)
    assert [value.name for value in graph.graph.inputs][:2] == ["input_ids", "attention_mask"]
    assert graph.graph.inputs[-1] is graph.graph.initializers["logits_to_keep"]
    assert [str(size) for size in graph.graph.outputs[0].shape] == ["batch", "1", "259"]
    packed = next(node for node in graph.graph if node.op_type == "GroupQueryAttention")
    assert packed.inputs[1] is None and packed.inputs[2] is None


def test_tied_embedding_and_head_are_one_description() -> None:
    graph = full_lowering().graph
    assert stored_of(graph.initializers["model.embed_tokens.codes"]) == stored_of(graph.initializers["lm_head.codes"])


@pytest.mark.parametrize("variant", ["grouped", "mistral-window"])
def test_batch_rows_end_at_their_own_positions(variant: str, tmp_path: Path) -> None:
    """Right-padded rows of a batch: each gets the logits of its last valid token, in prefill and in decoding."""
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    lowered(traced_once(model.config), model.config, tensors, tmp_path, precision="fp32")
    graph = session(tmp_path / "model.onnx")
    ids = np.random.default_rng(4).integers(0, 259, (2, 7))
    lengths = (7, 4)
    mask = (np.arange(7)[None] < np.array(lengths)[:, None]).astype(np.int64)
    empty = {value.name: np.zeros((2, 2, 0, 32), np.float32) for value in graph.get_inputs() if "past" in value.name}
    logits, *presents = graph.run(None, {"input_ids": ids, "attention_mask": mask, **empty})
    new = np.array([[11], [22]])
    mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
    past = dict(zip(empty, presents, strict=True))
    after, *_ = graph.run(None, {"input_ids": new, "attention_mask": mask, **past})
    for row, length in enumerate(lengths):
        text = np.concatenate([ids[row, :length], new[row]])[None]
        expected = logits_of(model, text)[0]
        assert np.abs(logits[row, 0] - expected[-2]).max() < 1e-4
        assert np.abs(after[row, 0] - expected[-1]).max() < 1e-4


def test_logits_to_keep_defaults_to_the_last_position(tmp_path: Path) -> None:
    model = llama()
    lowered(traced_once(model.config), model.config, source_tensors(model), tmp_path, precision="fp32")
    graph = session(tmp_path / "model.onnx")
    ids = np.random.default_rng(5).integers(0, 259, (1, 6))
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, 6), np.int64)}
    feeds |= {value.name: np.zeros((1, 2, 0, 32), np.float32) for value in graph.get_inputs() if "past" in value.name}
    everything = graph.run(["logits"], {**feeds, "logits_to_keep": np.array([6])})[0]
    assert (graph.run(["logits"], feeds)[0] == everything[:, -1:]).all()
    assert (graph.run(["logits"], {**feeds, "logits_to_keep": np.array([3])})[0] == everything[:, -3:]).all()


# Each pass alone.


@pytest.fixture
def graph() -> ir.Model:
    return traced_once(llama(num_hidden_layers=1, attention_bias=True).config)


def test_lower_attention(graph: ir.Model) -> None:
    tables = tuple(np.random.default_rng(0).standard_normal((2, CONTEXT, 16)).astype(np.float32))
    lower_attention(graph, tables)
    found = ops(graph)
    assert found["GroupQueryAttention"] == 1
    assert not {"Attention", "TensorScatter", "RotaryEmbedding", "Cos", "LessOrEqual"} & set(found)
    assert [value.name for value in graph.graph.inputs] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [value.name for value in graph.graph.outputs] == ["logits", "present.0.key", "present.0.value"]
    for name, table in zip(("cos_cache", "sin_cache"), tables, strict=True):
        assert (graph.graph.initializers[name].const_value.numpy() == table).all()


def test_pack_linears_splits_what_it_joins(graph: ir.Model) -> None:
    formats = plan_formats(source_tensors(llama(num_hidden_layers=1, attention_bias=True)), "int8")
    pack_linears(graph, formats)
    splits = [node for node in graph.graph if node.op_type == "Split"]
    assert [list(node.inputs[1].const_value.numpy()) for node in splits] == [[128, 64, 64], [160, 160]]
    weight = graph.graph.initializers["model.layers.0.self_attn.q_k_v_proj.weight"]
    assert list(weight.shape) == [256, 128]
    assert "model.layers.0.self_attn.q_k_v_proj.bias" in graph.graph.initializers


def test_pack_qkv_needs_one_projection(graph: ir.Model) -> None:
    lower_attention(graph, TABLES)
    pack_qkv(graph)
    attention = next(node for node in graph.graph if node.op_type == "GroupQueryAttention")
    assert attention.inputs[1] is not None
    pack_linears(graph, plan_formats(source_tensors(llama(num_hidden_layers=1, attention_bias=True)), "int8"))
    pack_qkv(graph)
    assert attention.inputs[1] is None


def test_norms_take_the_residual_addition_in(graph: ir.Model) -> None:
    lower_norms(graph)
    found = ops(graph)
    assert (found["SimplifiedLayerNormalization"], found["SkipSimplifiedLayerNormalization"]) == (1, 2)
    residual = [node for node in graph.graph if node.op_type == "Add" and "proj" not in str(node.name)]
    assert residual == []


def test_linears_compute_in_the_given_accuracy(graph: ir.Model) -> None:
    lower_linears(graph, plan_formats(source_tensors(llama(num_hidden_layers=1, attention_bias=True)), "int8"), 4)
    products = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    assert len(products) == 8
    assert {node.attributes["accuracy_level"].as_int() for node in products} == {4}
    assert {node.attributes["bits"].as_int() for node in products} == {8}


def test_last_positions_sit_before_the_head(graph: ir.Model) -> None:
    lower_attention(graph, TABLES)
    keep_last_positions(graph)
    head = graph.graph.outputs[0].producer()
    assert head.inputs[0].producer().op_type == "GatherND"


def test_models_pass_the_checker_and_old_runtimes(tmp_path: Path) -> None:
    """Nothing beyond opset 21 and IR version 10, which onnxruntime 1.23.2 reads."""
    model = llama()
    lowered(traced_once(model.config), model.config, source_tensors(model), tmp_path, precision="int4")
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert proto.ir_version == 10
    standard = {node.op_type for node in proto.graph.node if node.domain == ""} - {"SimplifiedLayerNormalization"}
    for op_type in standard:
        assert onnx.defs.get_schema(op_type, 21).since_version <= 21
    assert {node.domain for node in proto.graph.node} <= {"", "com.microsoft"}
