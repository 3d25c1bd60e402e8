"""The projections of the canonical graph, as passes find them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .graph import nodes_of, producer


@dataclass(frozen=True)
class Linear:
    """One projection of the canonical graph: MatMul(x, Transpose(weight)), then an Add of a bias or not."""

    matmul: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    result: ir.Value


def linears_of(model: ir.Model) -> list[Linear]:
    """All projections of a canonical graph whose weights are not lowered, in order."""
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
