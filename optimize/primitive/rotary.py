"""RotaryEmbedding in primitive ops."""

from __future__ import annotations

import onnx_ir as ir

from ..graph import FLOAT32_SCOPE, Recorder, ints, nodes_of


def lower_rotary(model: ir.Model) -> None:
    """Needs `store_rotary_tables`: RotaryEmbedding(x, cos, sin) in float32, x [batch, heads, sequence, head_dim],
    tables [batch, sequence, head_dim / 2]. The halves a and b of each head become a * cos - b * sin and
    b * cos + a * sin.
    """
    graph = model.graph
    unsqueezed: dict[ir.Value, ir.Value] = {}
    for node in nodes_of(model, "RotaryEmbedding"):
        x, *tables = node.inputs[:3]
        assert x is not None
        record = Recorder(f"{node.name}/{FLOAT32_SCOPE}".replace("/RotaryEmbedding", "/rotary"))
        for table in tables:
            assert table is not None
            if table not in unsqueezed:
                unsqueezed[table] = record("Unsqueeze", table, ints(graph, 1))
        cos, sin = (unsqueezed[table] for table in tables if table is not None)
        half = _last(x) // 2
        split = ir.node("Split", [x, ints(graph, half, half)], {"axis": -1}, num_outputs=2, name=f"{node.name}/Split")
        first, second = split.outputs
        first.name, second.name = f"{split.name}:0", f"{split.name}:1"
        low = record("Sub", record("Mul", first, cos), record("Mul", second, sin))
        high = record("Add", record("Mul", second, cos), record("Mul", first, sin))
        rotated = record("Concat", low, high, axis=-1)
        old = node.outputs[0]
        rotated.shape, rotated.type = old.shape, old.type
        graph.insert_before(node, [split, *record.nodes])
        ir.convenience.replace_all_uses_with(old, rotated, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _last(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[-1])  # type: ignore[arg-type]
