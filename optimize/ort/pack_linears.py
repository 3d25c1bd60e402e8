"""Projections of the same input become one matrix product: q, k and v; gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..formats import Format
from ..graph import add_initializer, nodes_of, producer
from ..stored import parts_of, stacked


@dataclass(frozen=True)
class Linear:
    """One projection of the canonical graph: MatMul(x, Transpose(weight)), then an Add of a bias or not."""

    matmul: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    result: ir.Value


def linears_of(model: ir.Model) -> list[Linear]:
    return [linear for node in nodes_of(model, "MatMul") if (linear := _linear(node)) is not None]


def _linear(matmul: ir.Node) -> Linear | None:
    transpose = producer(matmul.inputs[1], "Transpose")
    weight = transpose.inputs[0] if transpose is not None else None
    if weight is None or not weight.is_initializer():
        return None
    users = matmul.outputs[0].consumers()
    if len(users) == 1 and users[0].op_type == "Add":
        for operand in users[0].inputs:
            if operand is not None and operand.is_initializer() and len(operand.shape or ()) == 1:
                return Linear(matmul, weight, operand, users[0].outputs[0])
    return Linear(matmul, weight, None, matmul.outputs[0])


def pack_linears(model: ir.Model, formats: Mapping[str, Format]) -> None:
    """Needs the canonical projections; leaves one for each group that reads the same value in the same format, and a
    Split.

    Fewer and larger products: at one row each costs a start and a stop of all threads.
    """
    groups: dict[tuple[object, ...], list[Linear]] = defaultdict(list)
    for linear in linears_of(model):
        groups[linear.matmul.inputs[0], formats[parts_of(linear.weight)[0]], linear.bias is None].append(linear)
    for group in groups.values():
        if len(group) > 1:
            _pack(model.graph, group)


def _pack(graph: ir.Graph, group: list[Linear]) -> None:
    name = _joint_name([str(linear.weight.name).removesuffix(".weight") for linear in group])
    last = group[-1].matmul
    weight = stacked(graph, f"{name}.weight", [linear.weight for linear in group])
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}/Transpose")
    product = ir.node("MatMul", [last.inputs[0], transpose.outputs[0]], name=f"{name}/MatMul")
    added, joint = [transpose, product], product.outputs[0]
    biases = [linear.bias for linear in group if linear.bias is not None]
    if biases:
        add = ir.node("Add", [joint, stacked(graph, f"{name}.bias", biases)], name=f"{name}/Add")
        added, joint = [*added, add], add.outputs[0]
    widths = [int(linear.weight.shape[0]) for linear in group if linear.weight.shape]  # type: ignore[arg-type]
    sizes = add_initializer(graph, "widths_" + "_".join(map(str, widths)), np.array(widths, np.int64))
    split = ir.node("Split", [joint, sizes], {"axis": -1}, num_outputs=len(group), name=f"{name}/Split")
    for node in (*added, split):
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}:{index}" if node is split else node.name
            output.type = last.outputs[0].type
    graph.insert_before(group[0].matmul, [*added, split])
    for linear, part in zip(group, split.outputs, strict=True):
        part.shape = linear.result.shape
        ir.convenience.replace_all_uses_with(linear.result, part)


def _joint_name(names: list[str]) -> str:
    """`…self_attn.q_proj`, `…k_proj`, `…v_proj` together are `…self_attn.q_k_v_proj`."""
    module = names[0].rpartition(".")[0]
    suffixes = [name.rpartition(".")[2].removesuffix("_proj") for name in names]
    return f"{module}.{'_'.join(suffixes)}_proj"
