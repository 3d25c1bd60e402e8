"""Graphs changed for the CPU in memory give the same values, bit for bit where nothing is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.runtime.cpu_graph import for_cpu, rounds_activations
from llama_export.runtime.onnx_file import external_initializers
from llama_export.runtime.onnx_nodes import Node, read_nodes, with_nodes
from support import onnx_bytes as onnx
from support.tiny_bundle import random_llama
from support.tiny_tensorrt import STATIC, tensorrt_files

onnxruntime = pytest.importorskip("onnxruntime", reason="graphs are run with ONNX Runtime")

ROWS, COLUMNS, BLOCK = 13, 48, 16
DATA = "model.onnx.data"


def run(graph: bytes, folder: Path, feeds: dict[str, Any], *, plain: bool = False) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found: list[np.ndarray] = onnxruntime.InferenceSession(graph, options).run(None, feeds)
    return found


def table(folder: Path, bits: int, dtype: str) -> bytes:
    """DequantizeLinear of codes [ROWS, COLUMNS] in blocks, and two Gathers of its rows."""
    rng = np.random.default_rng(bits)
    limit = 1 << bits - 1
    codes = rng.integers(-limit, limit, (ROWS, COLUMNS)).astype(np.int8)
    stored = codes if bits == 8 else (codes[:, ::2] & 15 | codes[:, 1::2] << 4).astype(np.int8).view(np.uint8)
    scales = rng.uniform(0.001, 0.1, (ROWS, COLUMNS // BLOCK)).astype(dtype)
    (folder / DATA).write_bytes(stored.tobytes() + scales.tobytes())
    packed = (ROWS, COLUMNS) if bits == 4 else ()
    tensors = [
        onnx.tensor("codes", stored, (DATA, 0), packed=packed),
        onnx.tensor("scales", scales, (DATA, stored.nbytes)),
    ]
    nodes = [
        onnx.node("DequantizeLinear", ["codes", "scales"], ["all"], attributes={"axis": 1, "block_size": BLOCK}),
        onnx.node("Gather", ["all", "ids"], ["rows"]),
        onnx.node("Gather", ["all", "others"], ["more"], attributes={"axis": 0}),
    ]
    inputs = [onnx.value_info(name, "int64", ["batch", name]) for name in ("ids", "others")]
    outputs = [onnx.value_info(name, dtype, ["batch", name, COLUMNS]) for name in ("rows", "more")]
    return onnx.model(nodes, tensors, inputs, outputs)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_an_embedding_are_dequantised_bit_for_bit(bits: int, dtype: str, tmp_path: Path) -> None:
    graph = table(tmp_path, bits, dtype)
    weights = external_initializers(graph, (tmp_path / DATA).stat().st_size)
    changed = for_cpu(graph, weights, exact=False)
    feeds = {"ids": np.array([[0, 12, 7], [3, 3, 1]]), "others": np.array([[5], [11]])}
    for found, expected in zip(run(changed, tmp_path, feeds), run(graph, tmp_path, feeds, plain=True), strict=True):
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found, expected)
    kinds = [node.op for node in read_nodes(changed)]
    assert kinds == {4: ["GatherBlockQuantized"] * 2, 8: ["Gather", "Gather", "DequantizeLinear"] * 2}[bits]


def test_a_table_that_something_else_reads_stays(tmp_path: Path) -> None:
    graph = table(tmp_path, 8, "float32")
    nodes = [*read_nodes(graph), Node("Identity", ("all",), ("copy",))]
    shared = with_nodes(graph, nodes, {})
    weights = external_initializers(shared, (tmp_path / DATA).stat().st_size)
    assert for_cpu(shared, weights, exact=True) == shared


def rounded(*, reused: bool) -> bytes:
    """x, rounded to 8 bits and back, times 2; and, `reused`, the codes as well."""
    tensors = [
        onnx.tensor("scale", np.array(0.5, np.float32)),
        onnx.tensor("zero", np.array(0, np.int8)),
        onnx.tensor("two", np.array(2, np.float32)),
    ]
    nodes = [
        onnx.node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        onnx.node("DequantizeLinear", ["codes", "scale", "zero"], ["near"]),
        onnx.node("Mul", ["near", "two"], ["y"]),
    ]
    outputs = [onnx.value_info("y", "float32", [3])]
    if reused:
        nodes.append(onnx.node("Identity", ["codes"], ["kept"]))
        outputs.append(onnx.value_info("kept", "int8", [3]))
    return onnx.model(nodes, tensors, [onnx.value_info("x", "float32", [3])], outputs)


@pytest.mark.parametrize("reused", [False, True])
def test_only_the_proof_leaves_out_the_rounding_of_activations(reused: bool, tmp_path: Path) -> None:
    graph, x = rounded(reused=reused), np.array([0.3, -1.2, 40.1], np.float32)
    assert rounds_activations(graph)
    assert for_cpu(graph, {}, exact=False) == graph
    exact = for_cpu(graph, {}, exact=True)
    np.testing.assert_array_equal(run(exact, tmp_path, {"x": x})[0], x * 2)
    assert [*run(graph, tmp_path, {"x": x})[0]] == [1.0, -2.0, 80.0]
    assert rounds_activations(exact) == reused


def test_the_proof_keeps_a_rounding_that_is_undone_by_another_scale(tmp_path: Path) -> None:
    graph = rounded(reused=False)
    nodes = [
        node.taking(["codes", "two", "zero"]) if node.op == "DequantizeLinear" else node for node in read_nodes(graph)
    ]
    changed = with_nodes(graph, nodes, {})
    assert for_cpu(changed, {}, exact=True) == changed


def test_a_table_dequantised_along_another_axis_is_left_to_onnxruntime(tmp_path: Path) -> None:
    """Or the proof would be of blocks along rows, whatever the file says."""
    graph = table(tmp_path, 8, "float32").replace(onnx.attribute("axis", 1), onnx.attribute("axis", 0))
    weights = external_initializers(graph, (tmp_path / DATA).stat().st_size)
    assert [node.attributes["axis"] for node in read_nodes(graph)[:1]] == [0]
    assert for_cpu(graph, weights, exact=True) == graph


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "attributes"),
    [
        ("DequantizeLinear", [], ["w"], {}),
        ("DequantizeLinear", ["codes"], ["w"], {"axis": 0, "block_size": 16}),
        ("DequantizeLinear", ["codes", "scales"], ["w"], {"axis": 0}),
        ("DequantizeLinear", ["codes", "scales"], ["w"], {"axis": 0, "block_size": 0}),
        ("DequantizeLinear", ["codes", "scales"], ["w"], {"axis": 0, "block_size": 12}),
        ("DequantizeLinear", ["codes", "scales"], ["w"], {"axis": 1, "block_size": 16}),
        ("Gather", [], ["w"], {}),
        ("MatMul", ["x"], ["w"], {}),
    ],
)
def test_a_node_that_does_not_fit_its_operator(
    op: str, inputs: list[str], outputs: list[str], attributes: dict[str, int]
) -> None:
    codes = onnx.tensor("codes", np.zeros(96, np.uint8), (DATA, 0), packed=(32, 6), kind="float4e2m1")
    last = onnx.node("MatMul", ["x", "w"], ["y"])
    graph = onnx.model([onnx.node(op, inputs, outputs, attributes=attributes), last], [codes], [], [], 23)
    with pytest.raises(LlamaExportError, match="has a node whose inputs, outputs or attributes do not fit"):
        for_cpu(graph, external_initializers(graph, 96), exact=True)


def test_values_of_4_bit_floats_are_exact(tmp_path: Path) -> None:
    """Against the onnx package's own reading of every code, times its block's scale."""
    helper = pytest.importorskip("ml_dtypes", reason="the format's own definition is asked")
    columns, rows, block = 32, 6, 16
    codes = np.random.default_rng(4).integers(0, 16, (columns, rows)).astype(np.uint8)
    stored = codes.reshape(-1)[::2] | codes.reshape(-1)[1::2] << 4
    scales = np.random.default_rng(5).uniform(0.01, 1, (columns // block, rows)).astype(np.float32)
    (tmp_path / DATA).write_bytes(stored.tobytes())
    tensors = [
        onnx.tensor("codes", stored, (DATA, 0), packed=(columns, rows), kind="float4e2m1"),
        onnx.tensor("scales", scales),
    ]
    nodes = [
        onnx.node("DequantizeLinear", ["codes", "scales"], ["w"], attributes={"axis": 0, "block_size": block}),
        onnx.node("MatMul", ["x", "w"], ["y"]),
    ]
    x = onnx.value_info("x", "float32", [columns, columns])
    graph = onnx.model(nodes, tensors, [x], [onnx.value_info("y", "float32", [columns, rows])], 23)
    changed = for_cpu(graph, external_initializers(graph, stored.nbytes), exact=False)
    [found] = run(changed, tmp_path, {"x": np.eye(columns, dtype=np.float32)})
    values = codes.view(helper.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(found, values * np.repeat(scales, block, axis=0))


def test_a_graph_with_nothing_to_change_is_the_same_bytes() -> None:
    graph, data = tensorrt_files(random_llama(), "trt-primitive", 64)
    assert not rounds_activations(graph)
    assert for_cpu(graph, external_initializers(graph, len(data)), exact=True) is graph


def test_attention_reads_the_used_part_of_the_cache_alone() -> None:
    graph, data = tensorrt_files(random_llama(), STATIC, 64)
    changed = read_nodes(for_cpu(graph, external_initializers(graph, len(data)), exact=False))
    attentions = [node for node in changed if node.op == "Attention"]
    assert len(attentions) == 2
    for node in attentions:
        assert all(name.endswith("/used") for name in node.inputs[1:4])
        assert not node.inputs[0].endswith("/used")
    written = [node.outputs[0] for node in changed if node.op == "TensorScatter"]
    assert all(name.startswith("present.") for name in written)  # whole, in place


# The codec


def test_nodes_are_read_as_they_were_written() -> None:
    nodes = [
        Node("Gather", ("a", "", "b"), ("c",), "", {"axis": -1, "big": 1 << 40}),
        Node("Own", (), ("d", "e"), "com.microsoft"),
    ]
    empty = onnx.model([], [], [], [])
    model = with_nodes(empty, nodes, {"com.microsoft": 1, "third": 7})
    found = read_nodes(model)
    assert [(one.op, one.inputs, one.outputs, one.domain, one.attributes) for one in found] == [
        (one.op, one.inputs, one.outputs, one.domain, one.attributes) for one in nodes
    ]
    assert with_nodes(model, found, {"third": 7}) == model
    assert model.count(b"third") == 1
    assert model.count(b"com.microsoft") == 2  # the operator set and the node


def test_other_inputs_leave_all_else() -> None:
    model = onnx.model([onnx.node("Slice", ["a", "b"], ["c"], attributes={"floats": 0.5, "name": "x"})], [], [], [])
    [node] = read_nodes(model)
    [changed] = read_nodes(with_nodes(model, [node.taking(["z", "", "y"])], {}))
    assert changed.inputs == ("z", "", "y")
    assert (changed.op, changed.outputs, changed.attributes) == (node.op, node.outputs, node.attributes)
    assert b"floats" in changed.encoded
    assert Node("Neg", ("a",), ("b",)).taking(["c"]).encode() == Node("Neg", ("c",), ("b",)).encode()


def product(folder: Path, scale_dtype: str, bits: int = 4) -> bytes:
    """x @ DequantizeLinear(codes [COLUMNS, ROWS + 1] in blocks along the columns)."""
    rng = np.random.default_rng(bits)
    rows, limit = ROWS + 1, 1 << bits - 1
    codes = rng.integers(-limit, limit, (COLUMNS, rows)).astype(np.int8)
    stored = codes if bits == 8 else (codes[:, ::2] & 15 | codes[:, 1::2] << 4).astype(np.int8).view(np.uint8)
    scales = rng.uniform(0.001, 0.1, (COLUMNS // BLOCK, rows)).astype(scale_dtype)
    (folder / DATA).write_bytes(stored.tobytes() + scales.tobytes())
    tensors = [
        onnx.tensor("codes", stored, (DATA, 0), packed=(COLUMNS, rows) if bits == 4 else ()),
        onnx.tensor("scales", scales, (DATA, stored.nbytes)),
    ]
    nodes = [
        onnx.node("DequantizeLinear", ["codes", "scales"], ["w"], attributes={"axis": 0, "block_size": BLOCK}),
        onnx.node("MatMul", ["x", "w"], ["y"]),
        onnx.node("MatMul", ["x", "w"], ["z"]),
    ]
    outputs = [onnx.value_info(name, scale_dtype, ["batch", rows]) for name in ("y", "z")]
    return onnx.model(nodes, tensors, [onnx.value_info("x", scale_dtype, ["batch", COLUMNS])], outputs)


@pytest.mark.parametrize("bits", [4, 8])
def test_products_in_float16_are_computed_in_float32(bits: int, tmp_path: Path) -> None:
    graph = product(tmp_path, "float16", bits)
    weights = external_initializers(graph, (tmp_path / DATA).stat().st_size)
    changed = for_cpu(graph, weights, exact=False)
    ops = [node.op for node in read_nodes(changed)]
    assert ops == ["Cast", "DequantizeLinear", "Cast", "MatMul", "Cast", "MatMul", "Cast"]
    x = np.random.default_rng(3).standard_normal((5, COLUMNS)).astype(np.float16)
    before, after = (run(one, tmp_path, {"x": x}, plain=True) for one in (graph, changed))
    for one, other in zip(before, after, strict=True):
        assert other.dtype == np.float16
        assert np.abs(one.astype(np.float32) - other).max() < 0.01 * np.abs(one).max()


def test_products_in_float32_stay_as_they_are(tmp_path: Path) -> None:
    graph = product(tmp_path, "float32")
    weights = external_initializers(graph, (tmp_path / DATA).stat().st_size)
    assert for_cpu(graph, weights, exact=False) == graph
