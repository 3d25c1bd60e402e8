"""The head computes logits only where they are asked for: each row's last `logits_to_keep` valid positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import Recorder, add_initializer, ints, producer, scalar

_TO_THE_END = np.iinfo(np.int64).max


def keep_last_positions(model: ir.Model, *, recordable: bool = False) -> None:
    """Needs `lower_attention` (attention_mask) and the final norm before the head; gathers between the two.

    Rows of a batch end at different places: valid = sum(attention_mask) - (total - sequence) of the new tokens count,
    at least one, and the positions [valid - keep, valid) are taken, none below 0. `logits_to_keep` int64 [1] is an
    initializer that is also listed as an input (default 1), so other tools need not feed it; `logits` is declared
    [batch, 1, vocab], which onnxruntime-genai allocates from.

    recordable: compute the same so that a CUDA graph of a run can be recorded, see `_gathered_on_gpu`.
    """
    graph = model.graph
    logits = graph.outputs[0]
    head = producer(logits, "MatMul")
    assert head is not None, "the canonical graph's logits come from a MatMul"
    keep = add_initializer(graph, "logits_to_keep", np.array([1], np.int64))
    graph.inputs.append(keep)

    hidden = head.inputs[0]
    assert hidden is not None
    op = Recorder("last_positions")
    kept = (_gathered_on_gpu if recordable else _gathered)(op, graph, hidden, keep)
    kept.type, kept.shape = hidden.type, ir.Shape(["batch", "logits_to_keep", *(hidden.shape or ())[2:]])
    graph.insert_before(head, op.nodes)
    head.replace_input_with(0, kept)
    logits.shape = ir.Shape(["batch", 1, *(logits.shape or ())[2:]])


def _gathered(op: Recorder, graph: ir.Graph, hidden: ir.Value, keep: ir.Value) -> ir.Value:
    """The rows [batch, keep, hidden] of `hidden` [batch, sequence, hidden]."""
    (ids, mask), one = graph.inputs[:2], ints(graph, 1)
    sequence, total = (op("Shape", value, start=1, end=2) for value in (ids, mask))
    valid = op("Sub", op("ReduceSum", mask, one, keepdims=1), op("Sub", total, sequence))
    valid = op("Min", op("Max", valid, one), sequence)
    steps = op("Range", scalar(graph, 0), op("Squeeze", keep), scalar(graph, 1))
    positions = op("Max", op("Add", op("Sub", valid, keep), steps), ints(graph, 0))
    return op("GatherND", hidden, op("Unsqueeze", positions, ints(graph, -1)), batch_dims=1)


def _gathered_on_gpu(op: Recorder, graph: ir.Graph, hidden: ir.Value, keep: ir.Value) -> ir.Value:
    """As `_gathered`, for masks whose ones come first, without what ONNX Runtime cannot record as a CUDA graph.

    Its session refuses a graph with copies between processor and GPU (HasMemcpyNodes in inference_session.cc): what is
    made of shapes lies in the processor's memory, so it may only be read as a size or an index, which kernels take from
    there, and never be added to what lies on the GPU. So may `keep`. And GatherND copies from memory that is gone when
    the recording is replayed (gather_nd.cc of the CUDA provider).
    """
    (ids, mask), one, zero = graph.inputs[:2], ints(graph, 1), ints(graph, 0)
    sequence, total = (op("Shape", value, start=1, end=2) for value in (ids, mask))
    new = op("Slice", mask, op("Sub", total, sequence), ints(graph, _TO_THE_END), one)
    valid = op("Max", op("ReduceSum", new, one, keepdims=1), one)
    from_end = op("CumSum", op("Expand", one, keep), scalar(graph, 0), reverse=1)
    positions = op("Unsqueeze", op("Max", op("Sub", valid, from_end), zero), ints(graph, -1))
    assert hidden.shape is not None
    everywhere = op("Expand", positions, ints(graph, 1, 1, int(hidden.shape[-1])))  # type: ignore[arg-type]
    return op("GatherElements", hidden, everywhere, axis=1)
