"""The faults of issue 5, to plant in any dialect: each in a middle layer, where it has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from llama_export.runtime.bundle import reference_file
from llama_export.runtime.proof.reference import EXACT, WeightRecord, fingerprint
from llama_export.runtime.proof.reference_file import load, save
from onnx import helper, numpy_helper
from support import faults

LAYER = "model.layers.1"
GATHER, SCOPE = "Gather", f"{LAYER}.self_attn/planted"


def table(bundle: Path, theta: float) -> None:
    """Store the rotary tables of another theta."""
    for name, turn in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        offset, width, count = faults.place(bundle, name)
        half = count // faults.tensor(bundle, name).dims[0]
        angles = np.outer(np.arange(count // half), theta ** (-np.arange(half) / half))
        with (bundle / faults.DATA).open("r+b") as file:
            file.seek(offset)
            file.write(turn(angles).astype({4: "<f4", 2: "<f2"}[width]).tobytes())


def forget_tables(bundle: Path) -> None:
    """Let the reference record the tables that are stored, as if they were right."""
    path = bundle / reference_file(EXACT)
    reference = load(path)

    def again(record: WeightRecord) -> WeightRecord:
        if record.name not in ("cos_cache", "sin_cache"):
            return record
        offset, width, count = faults.place(bundle, record.name)
        stored = np.fromfile(bundle / faults.DATA, {4: "<f4", 2: "<f2"}[width], count, offset=offset)
        sha256, norm = fingerprint(iter([stored.astype(np.float32).reshape(record.shape)]))
        return replace(record, sha256=sha256, norm=norm)

    tables = tuple(again(record) for record in reference.index.tables)
    path.unlink()  # which may be a link to the bundle that this is a copy of
    save(replace(reference, index=replace(reference.index, tables=tables)), path)


def exchange_key_heads(bundle: Path) -> None:
    """Let attention read the two heads of the keys in each other's place."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        fused = _find(graph, lambda node: node.op_type == "GroupQueryAttention" and node.name.startswith(LAYER))
        if fused is not None:
            packed = faults.attribute_of(fused, "num_heads"), faults.attribute_of(fused, "kv_num_heads")
            width = _last_size(graph, f"present.{LAYER[-1]}.key")
            queries, keys = packed[0] * width, packed[1] * width
            order = np.arange(queries + 2 * keys)
            order[queries : queries + keys] = np.roll(order[queries : queries + keys], width)
            _gathered(graph, fused, 0, order, -1)
            return
        rotated = "Transpose_2"
        taking = next(node for node in graph.node if f"{LAYER}.self_attn/{rotated}" in node.input)
        _gathered(graph, taking, list(taking.input).index(f"{LAYER}.self_attn/{rotated}"), np.array([1, 0]), 1)

    faults.graph(change)(bundle)


def no_scale(bundle: Path) -> None:
    """Leave out 1/sqrt(head_dim)."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.name.startswith(f"{LAYER}.self_attn/") and node.op_type in ("GroupQueryAttention", "Attention"):
                faults.set_attribute(node, "scale", 1.0)
            elif node.name.startswith(f"{LAYER}.self_attn/scale/"):
                node.input[1] = _constant(model.graph, "one", np.array(1, np.float32))

    faults.graph(change)(bundle)


def late_by_one(bundle: Path) -> None:
    """Turn tokens by the next position as soon as the cache holds any."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        if any(value.name == "position_ids" for value in graph.input):
            context = next(table.dims[0] for table in graph.initializer if table.name == "cos_cache")
            zero, one, last = (_constant(graph, f"late_{n}", np.array([n], np.int64)) for n in (0, 1, context - 1))
            nodes = [
                helper.make_node(GATHER, ["position_ids", zero], ["late/first"], name="late/first", axis=1),
                helper.make_node("Min", ["late/first", one], ["late/any"], name="late/any"),
                helper.make_node("Add", ["position_ids", "late/any"], ["late/next"], name="late/next"),
                helper.make_node("Min", ["late/next", last], ["late/positions"], name="late/positions"),
            ]
            for node in graph.node:
                if node.op_type == GATHER and node.name.startswith("model.rotary_emb/"):
                    node.input[1] = "late/positions"
            _insert_first(graph, nodes)
            return
        # seqlens_k one too small where it is not the length of what comes in: the newest key overwrites the one before
        width = helper.make_node("Shape", ["input_ids"], ["late/shape"], name="late/shape", start=1, end=2)
        one = _constant(graph, "late_1", np.array([1], np.int64))
        total = helper.make_node(
            "ReduceSum", ["attention_mask", "late_axis"], ["late/total"], name="late/t", keepdims=0
        )
        _constant(graph, "late_axis", np.array([1], np.int64))
        past = helper.make_node("Sub", ["late/total", "late/shape"], ["late/past"], name="late/past")
        some = helper.make_node("Min", ["late/past", one], ["late/some"], name="late/some")
        narrow = helper.make_node("Cast", ["late/some"], ["late/narrow"], name="late/narrow", to=onnx.TensorProto.INT32)
        lengths = next(node.input[5] for node in graph.node if node.op_type == "GroupQueryAttention")
        less = helper.make_node("Sub", [lengths, "late/narrow"], ["late/lengths"], name="late/lengths")
        for node in graph.node:
            if node.op_type == "GroupQueryAttention":
                node.input[5] = "late/lengths"
        maker = next(index for index, node in enumerate(graph.node) if lengths in node.output)
        nodes = list(graph.node)
        nodes[maker + 1 : maker + 1] = [width, total, past, some, narrow, less]
        del graph.node[:]
        graph.node.extend(nodes)

    faults.graph(change)(bundle)


def epsilon(value: float) -> faults.Fault:
    """Another epsilon in one norm."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if not node.name.startswith(f"{LAYER}.post_attention_layernorm/"):
                continue
            if node.op_type.endswith(("LayerNormalization", "RMSNormalization")):
                faults.set_attribute(node, "epsilon", value)
            elif node.op_type == "Add":
                node.input[1] = _constant(model.graph, "other_epsilon", np.array(value, np.float32))

    return faults.graph(change)


def gate_and_up(bundle: Path) -> None:
    """Exchange the outputs of the Split behind gate and up."""
    faults.swap_outputs("Split", f"{LAYER}.mlp.gate_up_proj")(bundle)


def bad_scale(bundle: Path) -> None:
    """One scale of one block of down_proj half as large again."""
    name = f"{LAYER}.mlp.down_proj.scales"
    offset, width, _ = faults.place(bundle, name)
    stored = np.fromfile(bundle / faults.DATA, {4: "<f4", 2: "<f2"}[width], 4, offset=offset)
    faults.put(name, float(stored[3]) * 1.5, at=3)(bundle)


def _find(graph: onnx.GraphProto, wanted: Callable[[onnx.NodeProto], bool]) -> onnx.NodeProto | None:
    return next((node for node in graph.node if wanted(node)), None)


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _last_size(graph: onnx.GraphProto, output: str) -> int:
    value = next(value for value in graph.output if value.name == output)
    return value.type.tensor_type.shape.dim[-1].dim_value


def _gathered(graph: onnx.GraphProto, node: onnx.NodeProto, index: int, order: np.ndarray, axis: int) -> None:
    """Let a node read one of its inputs in another order."""
    name = _constant(graph, "planted_order", order.astype(np.int64))
    gather = helper.make_node(GATHER, [node.input[index], name], [SCOPE], name=SCOPE, axis=axis)
    place = list(graph.node).index(node)
    node.input[index] = SCOPE
    nodes = list(graph.node)
    nodes.insert(place, gather)
    del graph.node[:]
    graph.node.extend(nodes)


def _insert_first(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
