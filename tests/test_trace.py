"""The canonical graph: transformers' Llama, traced once, stamped to any depth, equal to PyTorch in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from llama_export.export.canonical import canonical
from llama_export.export.rotary import rotary_tables
from llama_export.export.trace import trace
from llama_export.optimize.fuse import fuse
from llama_export.optimize.fuse.rms_norm import fuse_rms_norm
from llama_export.optimize.fuse.rotary import fuse_rotary
from llama_export.optimize.fuse.simplify import simplify
from llama_export.optimize.fuse.static_reshape import fuse_static_reshape
from llama_export.optimize.stamp import stamp
from support.graphs import VARIANTS, llama, logits_of, run_canonical, saved_canonical, traced_once
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

CONTEXT = 48


@pytest.mark.parametrize("variant", VARIANTS)
def test_canonical_graph_equals_pytorch(variant: str, tmp_path: Path) -> None:
    model = llama(**VARIANTS[variant])
    path = saved_canonical(traced_once(model.config), model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 40))
    expected = logits_of(model, ids)
    assert expected.std() > 0.1  # a degenerate model would prove nothing
    assert np.abs(run_canonical(path, ids, (40,)) - expected).max() < 1e-4
    assert np.abs(run_canonical(path, ids, (25, 38, 39, 40)) - expected).max() < 1e-4


def ops(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


def test_canonical_graph_is_made_of_standard_ops() -> None:
    graph = canonical(llama(tie_word_embeddings=False).config, context=CONTEXT)
    found = ops(graph)
    assert graph.graph.opset_imports == {"": 24}
    assert found["Attention"] == 3
    assert found["TensorScatter"] == found["RotaryEmbedding"] == 6
    assert found["RMSNormalization"] == 7
    assert found["MatMul"] == 3 * 7 + 1
    assert not {"Concat", "Shape", "Slice", "ReduceMean", "Pow", "Identity", "Constant"} & set(found)


def test_every_trace_of_a_config_is_the_same() -> None:
    config = llama(**VARIANTS["biased"]).config
    first, second = (ir.to_proto(graph) for graph in (canonical(config, context=64), traced_once(config)))
    assert first.SerializeToString() == second.SerializeToString()


@pytest.mark.parametrize("variant", ["biased", "yarn", "qwen2-window"])
def test_stamped_graph_is_the_whole_trace(variant: str) -> None:
    config = llama(**VARIANTS[variant]).config
    whole = trace(config, context=CONTEXT, layers=3)
    fuse(whole)
    stamped = canonical(config, context=CONTEXT)
    assert ops(stamped) == ops(whole)
    assert weight_names(stamped) == weight_names(whole)
    assert [value.name for value in stamped.graph.inputs] == [value.name for value in whole.graph.inputs]
    assert [value.name for value in stamped.graph.outputs] == [value.name for value in whole.graph.outputs]
    assert neighbours(stamped) == neighbours(whole)


def weight_names(graph: ir.Model) -> list[str]:
    return sorted(name for name in graph.graph.initializers if name.startswith(("model.", "lm_head")))


def neighbours(graph: ir.Model) -> list[tuple[object, ...]]:
    """Each node as its operation, its attributes and, for each input, what it comes from, six producers deep."""

    def seen(value: ir.Value | None, depth: int) -> object:
        if value is None:
            return None
        node = value.producer()
        if node is None:
            constant = value.const_value
            return value.name if constant is None or constant.size > 64 else constant.numpy().tolist()
        if depth == 0:
            return node.op_type
        return (node.op_type, value.index(), tuple(seen(one, depth - 1) for one in node.inputs))

    found = []
    for node in graph.graph:
        attributes = sorted((key, str(attribute.value)) for key, attribute in node.attributes.items())
        found.append((node.op_type, str(attributes), str([seen(value, 6) for value in node.inputs])))
    found += [("output", str(value.name), str(seen(value, 6))) for value in graph.graph.outputs]
    return sorted(found)


def test_tracing_allocates_no_weights() -> None:
    """A 70B layer would be 3.4 GB in float32; traced, it is a description."""
    config = llama(hidden_size=128).config
    config.hidden_size, config.intermediate_size, config.vocab_size = 8192, 28672, 128256
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 64, 8, 128
    graph = canonical(config, context=CONTEXT)
    assert list(graph.graph.initializers["model.layers.2.mlp.up_proj.weight"].shape) == [28672, 8192]
    assert graph.graph.initializers["model.layers.2.mlp.up_proj.weight"].const_value is None


@pytest.mark.parametrize("variant", ["grouped", "yarn", "llama3-rope"])
def test_rotary_tables_are_transformers_own(variant: str) -> None:
    config = llama(**VARIANTS[variant]).config
    tables = rotary_tables(config, CONTEXT)
    embedding = LlamaRotaryEmbedding(config)
    for position in (0, 1, 6, 7, CONTEXT - 1):
        expected = embedding(torch.empty(0), torch.tensor([[position]]))
        for table, both_halves in zip(tables, expected, strict=True):
            assert table.shape == (CONTEXT, config.head_dim // 2)
            assert np.abs(np.tile(table[position], 2) - both_halves[0, 0].numpy()).max() < 2e-7
    norms = np.square(tables).sum(axis=0)
    assert norms == pytest.approx(np.full_like(norms, embedding.attention_scaling**2), rel=1e-5)


def traced() -> ir.Model:
    graph = trace(llama().config, context=CONTEXT)
    simplify(graph)
    return graph


def test_simplify_leaves_no_constant_arithmetic() -> None:
    graph = trace(llama().config, context=CONTEXT)
    before = len(list(graph.graph))
    simplify(graph)
    assert len(list(graph.graph)) < before / 2
    assert not {"Constant", "Identity", "CastLike", "Range"} & set(ops(graph))


def test_static_reshape_removes_shape_arithmetic() -> None:
    graph = traced()
    assert ops(graph)["Shape"] > 0
    fuse_static_reshape(graph)
    assert ops(graph)["Shape"] == 0
    targets = {tuple(node.inputs[1].const_value.numpy()) for node in graph.graph if node.op_type == "Reshape"}
    assert targets == {(0, 0, -1, 32), (0, 0, -1)}


def test_rms_norms_fuse_with_their_epsilon() -> None:
    graph = traced()
    fuse_rms_norm(graph)
    norms = [node for node in graph.graph if node.op_type == "RMSNormalization"]
    assert len(norms) == 3
    assert {round(node.attributes["epsilon"].as_float(), 9) for node in norms} == {1e-5}
    assert not {"Pow", "ReduceMean", "Sqrt"} & set(ops(graph))


def test_rotary_fuses_queries_and_keys() -> None:
    graph = traced()
    fuse_rotary(graph)
    found = ops(graph)
    assert (found["RotaryEmbedding"], found["Cos"], found["Sin"]) == (2, 1, 1)
    assert not {"Neg", "Slice"} & set(found)


def test_rotary_leaves_unequal_halves_alone() -> None:
    graph = traced()
    halves = [value for value in graph.graph.initializers.values() if value.const_value is not None]
    half = next(value for value in halves if value.const_value.size == 1 and value.const_value.numpy().item() == 16)
    half.const_value = ir.tensor(np.array([12], np.int64), name=half.name)
    fuse_rotary(graph)
    assert ops(graph)["RotaryEmbedding"] == 0


def test_stamp_needs_one_layer_to_be_a_noop() -> None:
    graph = traced()
    for run in (fuse_static_reshape, fuse_rms_norm, fuse_rotary, simplify):
        run(graph)
    before = ops(graph)
    stamp(graph, 1)
    assert ops(graph) == before
