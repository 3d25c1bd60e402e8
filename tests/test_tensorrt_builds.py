"""TensorRT-RTX parses and builds the graphs of both dialects, on a computer without a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from llama_export.optimize.graph import nodes_of
from llama_export.optimize.operators import operators_of, unsupported
from support.graphs import VARIANTS, llama, source_tensors, traced_once
from support.replay import lower_to, write
from support.tensorrt_build import Built, build, profiles

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (the extra `rtx`)")

DIALECTS = {"trt": "trt", "primitive-17": "trt-primitive", "primitive-21": "trt-primitive"}


def built(dialect: str, variant: str, folder: Path, *, precision: str = "fp16", capability: str = "SM89") -> Built:
    model = llama(**VARIANTS[variant])
    graph = traced_once(model.config, dtype=torch.float16)
    lower_to(dialect, graph, model.config, source_tensors(model), precision)
    path = write(graph, source_tensors(model), folder)
    return _built(path, dialect, capability)


def _built(path: Path, dialect: str, capability: str) -> Built:
    inputs = onnx.load(path, load_external_data=False).graph.input
    return build(path, profiles(DIALECTS[dialect], inputs), capability)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds(variant: str, tmp_path: Path) -> None:
    """With the prefill and the decode profile of a bundle; no input of a node is left out by the parser."""
    for dialect in DIALECTS:
        folder = tmp_path / dialect
        folder.mkdir()
        result = built(dialect, variant, folder)
        assert result.problems == ()
        assert result.plan_bytes > 0


@pytest.mark.parametrize("head_dim", [8, 20, 64, 96, 100, 128])
def test_heads_of_every_size_build(head_dim: int, tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1, head_dim=head_dim)
    graph = traced_once(model.config, dtype=torch.float16)
    lower_to("trt", graph, model.config, source_tensors(model), "fp16")
    assert _built(write(graph, source_tensors(model), tmp_path), "trt", "SM89").problems == ()


@pytest.mark.parametrize("capability", ["SM75", "SM80", "SM86", "SM120", "SM121"])
def test_other_gpus(capability: str, tmp_path: Path) -> None:
    assert built("trt", "head-dim-20", tmp_path, capability=capability).problems == ()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_build(precision: str, tmp_path: Path) -> None:
    assert built("trt", "untied", tmp_path, precision=precision).problems == ()


def test_an_input_that_the_parser_drops_is_a_problem(tmp_path: Path) -> None:
    """It warns of an input of the network alone; that Attention's nonpad_kv_seqlen is dropped, only the lint knows."""
    model = llama(num_hidden_layers=1)
    graph = traced_once(model.config, dtype=torch.float16)
    lower_to("trt", graph, model.config, source_tensors(model), "fp16")
    lengths = ir.Value(name="lengths", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    graph.graph.inputs.append(lengths)
    attention = next(nodes_of(graph, "Attention"))
    attributes = list(attention.attributes.values())
    longer = ir.Node("", "Attention", [*attention.inputs, None, None, lengths], attributes, name=attention.name)
    longer.outputs[0].name = attention.outputs[0].name
    graph.graph.insert_after(attention, longer)
    ir.convenience.replace_all_uses_with(attention.outputs[0], longer.outputs[0])
    graph.graph.remove(attention, safe=True)
    assert any("takes 4 inputs" in problem for problem in unsupported(graph, operators_of("tensorrt-rtx", "1.7.1")))
    result = _built(write(graph, source_tensors(model), tmp_path), "trt", "SM89")
    assert any("unused input" in problem.lower() for problem in result.problems), result
