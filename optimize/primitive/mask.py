"""The mask of a cache that grows: once in the graph, shared by all layers, added to the scores."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import Recorder, activations_of, add_initializer, constant, input_named, ints, past_name, producer

HIDDEN = -32768.0
"""What is added to a hidden key's score. Finite, so that a row of nothing else is no NaN in a kernel that goes through
the keys in tiles; half of what float16 holds, so that a score below 0 does not make it infinite.
"""

_NEVER = 1 << 30
"""The position given to rows of the past that are not the text's: above every query's, and no sum overflows int32."""


def additive_mask(model: ir.Model, visible: ir.Value, context: int, group: int) -> ir.Value:
    """0 where a query sees a key and HIDDEN elsewhere: [batch, 1, group * sequence, past_sequence + sequence] in the
    dtype of the activations.

    visible: the canonical graph's mask, for its sliding window. Keys are the past's rows and then the new tokens: row i
    of the past is position i and counts where i < position_ids[:, 0]; what lies beyond is whatever the caller's buffer
    held, so a text is rewound by its positions alone. Queries are repeated `group` times as `lower_attention` stacks
    them. In int32, the one integer type that TensorRT 8.6 computes in.
    """
    graph, record = model.graph, Recorder("mask")
    past = input_named(graph, past_name(0, "key"))
    new = record("Cast", input_named(graph, "position_ids"), to=ir.DataType.INT32)
    first = record("Slice", new, ints(graph, 0), ints(graph, 1), ints(graph, 1))
    indices = add_initializer(graph, "past_positions", np.arange(context, dtype=np.int32))
    length = record("Slice", record("Shape", past), ints(graph, 2), ints(graph, 3), ints(graph, 0))
    indices = record("Slice", indices, ints(graph, 0), length, ints(graph, 0))
    never = add_initializer(graph, "never", np.array(_NEVER, np.int32))
    known = record("Where", record("Less", indices, first), indices, never)
    keys = record("Unsqueeze", record("Concat", known, new, axis=1), ints(graph, 1, 2))
    repeated = new if group == 1 else record("Tile", new, ints(graph, 1, group))
    queries = record("Unsqueeze", repeated, ints(graph, 1, 3))
    seen = record("LessOrEqual", keys, queries)
    window = window_of(visible)
    if window is not None:
        width = add_initializer(graph, "window", np.array(window, np.int32))
        seen = record("And", seen, record("Greater", keys, record("Sub", queries, width)))
    dtype = activations_of(model)
    shown, hidden = (
        add_initializer(graph, name, np.array(value, dtype.numpy()))
        for name, value in (("shown", 0.0), ("hidden", HIDDEN))
    )
    mask = record("Where", seen, shown, hidden)
    mask.type = ir.TensorType(dtype)
    graph.insert_before(graph[0], record.nodes)
    return mask


def window_of(visible: ir.Value) -> int | None:
    """How many keys a query sees by the canonical mask `key <= query And key > query - window`; None for all."""
    both = producer(visible, "And")
    if both is None:
        return None
    above = producer(both.inputs[1], "Greater")
    below = producer(above.inputs[1], "Sub") if above is not None else None
    window = constant(below.inputs[1]) if below is not None else None
    assert window is not None and window.size == 1, "the canonical graph's window is a constant"
    return int(window.reshape(-1)[0])
