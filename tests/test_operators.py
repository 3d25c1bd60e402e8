"""The lists of operators that TensorRT's releases take, and the lint that holds every graph to them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from llama_export.errors import LlamaExportError
from llama_export.optimize.graph import Recorder, add_initializer, nodes_of
from llama_export.optimize.operators import Operators, all_operators, operators_of, unsupported
from support.graphs import VARIANTS, llama, source_tensors, traced_once
from support.replay import lower_to

RELEASES = {operators.name: operators for operators in all_operators()}
TAKES = {
    "TensorRT 8.6": ("primitive-17",),
    "TensorRT 10.0": ("primitive-17", "primitive-21"),
    "TensorRT 10.13": ("primitive-17", "primitive-21"),
    "TensorRT 10.15": ("primitive-17", "primitive-21", "trt"),
    "TensorRT-RTX 1.7": ("primitive-17", "primitive-21", "trt"),
}


def graph_of(dialect: str, variant: str, precision: str = "fp16") -> ir.Model:
    model = llama(**VARIANTS[variant])
    graph = traced_once(model.config, dtype=torch.float16)
    lower_to(dialect, graph, model.config, source_tensors(model), precision)
    return graph


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_graph_is_taken_by_its_releases(variant: str) -> None:
    for dialect in ("primitive-17", "primitive-21", "trt"):
        graph = graph_of(dialect, variant)
        found = {name: unsupported(graph, operators) for name, operators in RELEASES.items()}
        assert {name for name, problems in found.items() if not problems} == {
            name for name, dialects in TAKES.items() if dialect in dialects
        }, found


def test_all_lists_are_known_and_say_where_they_are_from() -> None:
    assert set(RELEASES) == set(TAKES)
    for operators in RELEASES.values():
        assert operators.source
        names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
        assert set(operators.types) <= names
        for limited in (operators.constants, operators.fixed_attributes, operators.most_inputs):
            assert set(limited) <= set(operators.types)


@pytest.mark.parametrize(
    ("backend", "version", "name"),
    [
        ("tensorrt", "8.6.2", "TensorRT 8.6"),
        ("tensorrt", "10.3.0", "TensorRT 10.0"),
        ("tensorrt", "10.13.3", "TensorRT 10.13"),
        ("tensorrt", "10.16.2", "TensorRT 10.15"),
        ("tensorrt", "11.4.1", "TensorRT 10.15"),
        ("tensorrt-rtx", "1.7.1", "TensorRT-RTX 1.7"),
    ],
)
def test_a_release_has_the_newest_list_that_is_not_newer(backend: str, version: str, name: str) -> None:
    assert operators_of(backend, version).name == name


def test_a_release_older_than_all_lists_is_refused() -> None:
    with pytest.raises(LlamaExportError, match=r"8\.5\.2 are not known.*TensorRT 8\.6, TensorRT 10\.0"):
        operators_of("tensorrt", "8.5.2")


def test_int4_needs_10_0() -> None:
    graph = graph_of("primitive-21", "grouped", "int4")
    problems = unsupported(graph, RELEASES["TensorRT 8.6"])
    assert any("DequantizeLinear" in problem and "INT4" in problem for problem in problems)
    assert unsupported(graph, RELEASES["TensorRT 10.0"]) == []


def _insert(graph: ir.Model, make: Callable[[Recorder, ir.Value], ir.Value]) -> None:
    """Put nodes made of a value of `graph` in float16 after the node that makes it."""
    node = next(nodes_of(graph, "Sigmoid"))
    record = Recorder("faulty")
    make(record, node.outputs[0])
    graph.graph.insert_after(node, record.nodes)


FAULTS: dict[str, tuple[Callable[[ir.Model], None], str]] = {
    "unknown-operator": (lambda graph: _insert(graph, lambda op, x: op("HardSwish", x)), "has no such operator"),
    "other-domain": (lambda graph: _insert(graph, lambda op, x: op.contrib("FusedMatMul", x, x)), "no such operator"),
    "type": (lambda graph: _insert(graph, lambda op, x: op("And", x, x)), "takes BOOL and not FP16"),
    "type-of-a-cast": (
        lambda graph: _insert(graph, lambda op, x: op("Cast", x, to=ir.DataType.BFLOAT16)),
        "and not BFLOAT16|and not BF16",
    ),
    "derived-type": (
        lambda graph: _insert(graph, lambda op, x: op("Sqrt", op("Cast", x, to=ir.DataType.INT32))),
        "takes FP16, FP32 and not INT32",
    ),
    "free-axes": (
        lambda graph: _insert(graph, lambda op, x: op("Unsqueeze", x, op("Shape", x))),
        "input 1 must be a constant",
    ),
    "ignored-attribute": (lambda graph: _insert(graph, lambda op, x: op("Shape", x, start=1)), "start is ignored"),
    "opset": (lambda graph: graph.graph.opset_imports.update({"": 18}), "opset 18 is not one of 7 to 17"),
    "domain": (lambda graph: graph.graph.opset_imports.update({"com.microsoft": 1}), "domain 'com.microsoft'"),
    "zero-point": (
        lambda graph: _insert(
            graph,
            lambda op, x: op(
                "QuantizeLinear",
                x,
                add_initializer(graph.graph, "step", np.array(0.5, np.float16)),
                add_initializer(graph.graph, "zero", np.array(3, np.int8)),
            ),
        ),
        "zero points must be zero",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_by_node_and_reason(fault: str) -> None:
    change, expected = FAULTS[fault]
    graph = graph_of("primitive-17", "grouped")
    change(graph)
    (problem,) = unsupported(graph, RELEASES["TensorRT 8.6"])
    assert any(text in problem for text in expected.split("|")), problem


def test_limits_of_the_fused_operators() -> None:
    graph, operators = graph_of("trt", "grouped"), RELEASES["TensorRT 10.15"]
    attention = next(nodes_of(graph, "Attention"))
    extended = ir.node("Attention", [*attention.inputs, *attention.inputs[1:3]], attention.attributes, name="longer")
    graph.graph.insert_after(attention, extended)
    scatter = next(nodes_of(graph, "TensorScatter"))
    scatter.attributes["axis"] = ir.AttrInt64("axis", 1)
    problems = unsupported(graph, operators)
    assert len(problems) == 2
    assert any("axis must be -2" in problem for problem in problems)
    assert any("takes 4 inputs" in problem for problem in problems)


def test_the_list_of_tensorrt_rtx_is_what_its_parser_says() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (the extra `rtx`)")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    listed: Operators = RELEASES["TensorRT-RTX 1.7"]
    assert [name for name in listed.types if not parser.supports_operator(name)] == []
    assert not parser.supports_operator("MatMulInteger")


def test_primitive_graphs_keep_axes_where_their_opset_has_them() -> None:
    """ReduceMean's axes became an input with opset 18."""
    for dialect, inputs in (("primitive-17", 1), ("primitive-21", 2)):
        means = list(nodes_of(graph_of(dialect, "grouped"), "ReduceMean"))
        assert {len(node.inputs) for node in means} == {inputs}
        assert all(("axes" in node.attributes) == (inputs == 1) for node in means)
