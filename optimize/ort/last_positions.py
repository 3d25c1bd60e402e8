"""The head computes logits only where they are asked for: each row's last `logits_to_keep` valid positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import Recorder, add_initializer, ints, producer, scalar


def keep_last_positions(model: ir.Model) -> None:
    """Needs `lower_attention` (attention_mask) and the final norm before the head; gathers between the two.

    Rows of a batch end at different places: valid = sum(attention_mask) - (total - sequence) of the new tokens count,
    at least one, and the positions [valid - keep, valid) are taken, none below 0. `logits_to_keep` int64 [1] is an
    initializer that is also listed as an input (default 1), so other tools need not feed it; `logits` is declared
    [batch, 1, vocab], which onnxruntime-genai allocates from.
    """
    graph = model.graph
    logits, (ids, mask) = graph.outputs[0], graph.inputs[:2]
    head = producer(logits, "MatMul")
    assert head is not None, "the canonical graph's logits come from a MatMul"
    keep = add_initializer(graph, "logits_to_keep", np.array([1], np.int64))
    graph.inputs.append(keep)

    op, one = Recorder("last_positions"), ints(graph, 1)
    sequence, total = (op("Shape", value, start=1, end=2) for value in (ids, mask))
    valid = op("Sub", op("ReduceSum", mask, one, keepdims=1), op("Sub", total, sequence))
    valid = op("Min", op("Max", valid, one), sequence)
    steps = op("Range", scalar(graph, 0), op("Squeeze", keep), scalar(graph, 1))
    positions = op("Max", op("Add", op("Sub", valid, keep), steps), ints(graph, 0))
    hidden = head.inputs[0]
    assert hidden is not None
    kept = op("GatherND", hidden, op("Unsqueeze", positions, ints(graph, -1)), batch_dims=1)
    kept.type, kept.shape = hidden.type, ir.Shape(["batch", "logits_to_keep", *(hidden.shape or ())[2:]])
    graph.insert_before(head, op.nodes)
    head.replace_input_with(0, kept)
    logits.shape = ir.Shape(["batch", 1, *(logits.shape or ())[2:]])
