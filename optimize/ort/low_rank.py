"""Adapters that stay beside the weights: two thin matrices for each product, inputs of the graph that default to none.

y = x @ W + (x @ A) @ B, A [inputs, rank] and B [rank, outputs] with the scale in it (LoRA, arXiv:2106.09685). Both are
initializers of rank 0 that are also listed as inputs, so whoever feeds nothing gets the model itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..graph import ORDER, Recorder, add_initializer, producer, sizes_of
from ..linears import linears_of
from ..stored import parts_of, rows_of_parts

_SLOT = "slot"
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Slot:
    """Where an adapter is added: the product `name` of the weights `parts`, stacked by rows, each of so many rows.

    columns: inputs of the product.
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int


def add_low_rank(model: ir.Model, adapted: Collection[str]) -> None:
    """Needs `pack_linears` and `keep_last_positions`; leaves a slot for each product that has one of the weights
    `adapted` in it.
    """
    for linear in linears_of(model):
        parts = parts_of(linear.weight)
        if not any(part in adapted for part in parts):
            continue
        columns = sizes_of(linear.weight)[1]
        slot = Slot(str(linear.weight.name).removesuffix(".weight"), parts, rows_of_parts(linear.weight), columns)
        thin = [_thin(model.graph, slot, suffix, linear.weight) for suffix in (A_SUFFIX, B_SUFFIX)]
        old, x = linear.result, _in_place(linear.matmul.inputs[0])
        record = Recorder(f"{slot.name}/lora")
        added = record("MatMul", record("MatMul", x, thin[0]), thin[1])
        new = record("Add", old, added)
        new.shape, new.type = old.shape, old.type
        users = [(user, index) for user, index in old.uses() if user is not new.producer()]
        after = old.producer()
        assert after is not None
        model.graph.insert_after(after, record.nodes)
        for user, index in users:
            user.replace_input_with(index, new)
        for position, output in enumerate(model.graph.outputs):
            if output is old:  # the logits
                new.name, old.name = old.name, f"{old.name}/base"
                model.graph.outputs[position] = new


def slots_of(model: ir.Model) -> list[Slot]:
    """The slots of a lowered graph, in order."""
    return [value.meta[_SLOT] for value in model.graph.inputs if _SLOT in value.meta]


def _thin(graph: ir.Graph, slot: Slot, suffix: str, weight: ir.Value) -> ir.Value:
    """One of the two inputs, of rank 0 by default."""
    assert weight.dtype is not None
    is_a = suffix == A_SUFFIX
    none = np.zeros((slot.columns, 0) if is_a else (0, sum(slot.rows)), weight.dtype.numpy())
    value = add_initializer(graph, slot.name + suffix, none)
    rank = f"{slot.name}.rank"
    value.shape = ir.Shape([slot.columns, rank] if is_a else [rank, sum(slot.rows)])
    if is_a:
        value.meta[_SLOT] = slot
    graph.inputs.append(value)
    return value


def _in_place(x: ir.Value | None) -> ir.Value | None:
    """The input with its columns in place, before an order of the weight's own."""
    gather = producer(x, "Gather")
    order = gather.inputs[1] if gather is not None else None
    ordered = order is not None and str(order.name).startswith(ORDER)
    return gather.inputs[0] if gather is not None and ordered else x
