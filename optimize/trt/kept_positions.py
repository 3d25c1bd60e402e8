"""The head computes logits only where they are asked for, and hands them out in float32."""

from __future__ import annotations

import onnx_ir as ir

from ..graph import Recorder, ints, producer

LOGITS_POSITIONS = "logits_positions"


def keep_asked_positions(model: ir.Model) -> None:
    """Needs logits = MatMul(hidden, ...) with a row for each new token; leaves `logits` float32 [batch, kept, vocab].

    `logits_positions` int64 [batch, kept], a new input, names for each row the new tokens of this call (from 0 on)
    that get logits. A prompt needs its last one alone, and a head is a large part of a small model. An engine's
    profiles bound `kept`, which a mask could not.
    """
    graph, logits = model.graph, model.graph.outputs[0]
    head = producer(logits, "MatMul")
    assert head is not None, "the canonical graph's logits come from a MatMul"
    asked = ir.Value(name=LOGITS_POSITIONS, shape=ir.Shape(["batch", "kept"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.insert(2, asked)
    hidden = head.inputs[0]
    assert hidden is not None
    record = Recorder(LOGITS_POSITIONS)
    kept = record("GatherND", hidden, record("Unsqueeze", asked, ints(graph, -1)), batch_dims=1)
    kept.type, kept.shape = hidden.type, ir.Shape(["batch", "kept", *(hidden.shape or ())[2:]])
    graph.insert_before(head, record.nodes)
    head.replace_input_with(0, kept)
    logits.shape = ir.Shape(["batch", "kept", *(logits.shape or ())[2:]])
    if logits.dtype != ir.DataType.FLOAT:
        _widen(graph, logits)


def _widen(graph: ir.Graph, logits: ir.Value) -> None:
    """Make a Cast of the logits the output. Samplers compute in float32, and a device casts faster than a host."""
    head, record = logits.producer(), Recorder("logits")
    assert head is not None
    wide = record("Cast", logits, to=ir.DataType.FLOAT)
    wide.shape, wide.type = logits.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(head, record.nodes)
    graph.outputs[0] = wide
    logits.name, wide.name = head.name, logits.name
