"""The head computes logits only where they are asked for: each row's last `logits_to_keep` valid positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import add_initializer, producer


def keep_last_positions(model: ir.Model) -> None:
    """Needs `lower_attention` (attention_mask) and the final norm before the head; gathers between the two.

    Rows of a batch end at different places: valid = sum(attention_mask) - (total - sequence) of the new tokens count,
    at least one, and the positions [valid - keep, valid) are taken, none below 0. `logits_to_keep` int64 [1] is an
    initializer that is also listed as an input (default 1), so other tools need not feed it; `logits` is declared
    [batch, 1, vocab], which onnxruntime-genai allocates from.
    """
    graph = model.graph
    logits = graph.outputs[0]
    head = _head(logits)
    keep = add_initializer(graph, "logits_to_keep", np.array([1], np.int64))
    graph.inputs.append(keep)
    ids, mask = graph.inputs[0], graph.inputs[1]
    constants = {value: add_initializer(graph, name, np.array([value], np.int64)) for name, value in _CONSTANTS}
    scalars = {
        value: add_initializer(graph, f"{name}_scalar", np.array(value, np.int64)) for name, value in _CONSTANTS[:2]
    }
    added: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"last_positions/{op_type}_{len(added)}")
        node.outputs[0].name = node.name
        added.append(node)
        return node.outputs[0]

    sequence = op("Shape", ids, start=1, end=2)
    total = op("Shape", mask, start=1, end=2)
    valid = op("Sub", op("ReduceSum", mask, constants[1], keepdims=1), op("Sub", total, sequence))
    valid = op("Min", op("Max", valid, constants[1]), sequence)
    offsets = op("Range", scalars[0], op("Squeeze", keep), scalars[1])
    positions = op("Max", op("Add", op("Sub", valid, keep), offsets), constants[0])
    hidden = head.inputs[0]
    assert hidden is not None
    kept = op("GatherND", hidden, op("Unsqueeze", positions, constants[-1]), batch_dims=1)
    kept.type, kept.shape = hidden.type, ir.Shape(["batch", "logits_to_keep", *(hidden.shape or ())[2:]])
    graph.insert_before(head, added)
    head.replace_input_with(0, kept)
    logits.shape = ir.Shape(["batch", 1, *(logits.shape or ())[2:]])


_CONSTANTS = (("zero", 0), ("one", 1), ("minus_one", -1))


def _head(logits: ir.Value) -> ir.Node:
    node = producer(logits, "MatMul")
    assert node is not None, "the canonical graph's logits come from a MatMul"
    return node
