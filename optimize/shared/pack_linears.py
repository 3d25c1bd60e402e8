"""Projections of the same input become one matrix product: q, k and v; gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from ..formats import Format
from ..graph import Recorder, ints, sizes_of
from ..linears import Linear, linears_of
from ..stored import parts_of, stacked


def pack_linears(model: ir.Model, formats: Mapping[str, Format]) -> None:
    """Needs the canonical projections; leaves one for each group that reads the same value in the same format, and a
    Split, and nothing of those that it stands for. Weights that each have a scale of their own stay apart.

    Fewer and larger products: at one row each costs a start and a stop of all threads.
    """
    groups: dict[tuple[object, ...], list[Linear]] = defaultdict(list)
    for linear in linears_of(model):
        format = formats[parts_of(linear.weight)[0]]
        alone = linear.weight if format.tensor_scale else None
        groups[linear.matmul.inputs[0], format, linear.bias is None, alone].append(linear)
    for group in groups.values():
        if len(group) > 1:
            _pack(model.graph, group)
    common.RemoveUnusedNodesPass()(model)


def _pack(graph: ir.Graph, group: list[Linear]) -> None:
    name = _joint_name([str(linear.weight.name).removesuffix(".weight") for linear in group])
    record, first = Recorder(name), group[0].matmul
    weight = stacked(graph, f"{name}.weight", [linear.weight for linear in group])
    joint = record("MatMul", first.inputs[0], record("Transpose", weight, perm=[1, 0]))
    biases = [linear.bias for linear in group if linear.bias is not None]
    if biases:
        joint = record("Add", joint, stacked(graph, f"{name}.bias", biases))
    joint.type = weight.type
    widths = ints(graph, *(sizes_of(linear.weight)[0] for linear in group))
    split = ir.node("Split", [joint, widths], {"axis": -1}, num_outputs=len(group), name=f"{name}/Split")
    graph.insert_before(first, [*record.nodes, split])
    for index, (linear, part) in enumerate(zip(group, split.outputs, strict=True)):
        part.name, part.shape, part.type = f"{split.name}:{index}", linear.result.shape, weight.type
        ir.convenience.replace_all_uses_with(linear.result, part)


def _joint_name(names: list[str]) -> str:
    """`…self_attn.q_proj`, `…k_proj`, `…v_proj` together are `…self_attn.q_k_v_proj`."""
    module = names[0].rpartition(".")[0]
    suffixes = [name.rpartition(".")[2].removesuffix("_proj") for name in names]
    return f"{module}.{'_'.join(suffixes)}_proj"
