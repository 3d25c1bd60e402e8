"""The look-up of an embedding's rows, as far as all dialects lower it alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from .dense import dense_values
from .formats import EMBEDDING, Format
from .graph import Recorder, ints, nodes_of

SCOPE = EMBEDDING.removesuffix(".weight")

LookUp = Callable[[ir.Graph, Recorder, ir.Node, Format], ir.Value]
"""Records what stands for the Gather of an embedding in a format; returns the rows [batch, sequence, columns]."""


def replace_lookup(model: ir.Model, formats: Mapping[str, Format], quantised: LookUp) -> None:
    """Needs Gather(embedding, input_ids); leaves what `quantised` records in its place, or of a table in floating point
    a Gather and a Cast of the few rows.
    """
    graph, format = model.graph, formats[EMBEDDING]
    gather = next(node for node in nodes_of(model, "Gather") if node.inputs[0] is graph.initializers[EMBEDDING])
    record, old = Recorder(SCOPE), gather.outputs[0]
    new = (quantised if format.quantised else _dense)(graph, record, gather, format)
    graph.insert_before(gather, record.nodes)
    ir.convenience.replace_all_uses_with(old, new)
    new.shape, new.type = old.shape, old.type
    graph.remove(gather, safe=True)


def with_offsets(
    graph: ir.Graph, record: Recorder, values: ir.Value, offsets: ir.Value, ids: ir.Value | None, block: int
) -> ir.Value:
    """The gathered values [batch, sequence, columns], each block of them plus its own offset, of `offsets`
    [rows, columns / block].
    """
    own = record("Unsqueeze", record("Gather", offsets, ids, axis=0), ints(graph, -1))
    total = record("Add", record("Reshape", values, ints(graph, 0, 0, -1, block)), own)
    return record("Reshape", total, ints(graph, 0, 0, -1))


def _dense(graph: ir.Graph, record: Recorder, gather: ir.Node, format: Format) -> ir.Value:
    """Gather first, cast the few rows after: casting the table would hold it a second time."""
    weight, ids = gather.inputs
    assert weight is not None and weight.dtype is not None
    values = dense_values(graph, weight, format)
    rows = record("Gather", values, ids, axis=0)
    return rows if values.dtype == weight.dtype else record("Cast", rows, to=weight.dtype)
