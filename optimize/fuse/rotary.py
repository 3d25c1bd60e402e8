"""x * cos + rotate_half(x) * sin becomes RotaryEmbedding (opset 23) on tables of half the head dimension."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import pattern

from ..graph import constant, producer


class _Rotary(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """RoFormer's rotation in the half-split layout of transformers' `apply_rotary_pos_emb`.

    cos and sin arrive as f(concat(angles, angles)) with an optional factor (yarn's attention scaling) and cast;
    RotaryEmbedding takes f(angles), since both halves of the head share their angles.
    """

    def __init__(self) -> None:
        super().__init__("rotary", remove_nodes=False)  # queries and keys share the tables' Unsqueeze

    def pattern(self, op, x, cos, sin, axis, low, low_end, high, high_end):  # type: ignore[no-untyped-def]
        first = op.Slice(x, low, low_end, [3], [1])
        second = op.Slice(x, high, high_end, [3], [1])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, op.Unsqueeze(cos, axis)), op.Mul(rotated, op.Unsqueeze(sin, axis)))

    def check(self, context, x, cos, sin, axis, low, low_end, high, high_end, **_):  # type: ignore[no-untyped-def]
        result = pattern.MatchResult()
        head = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
        bounds = [constant(value) for value in (axis, low, low_end, high, high_end)]
        if not isinstance(head, int) or any(bound is None for bound in bounds):
            return result.fail("The head dimension or the bounds of the halves are not static.")
        unsqueezed, *halves, end = (int(bound.reshape(-1)[0]) for bound in bounds if bound is not None)
        if (unsqueezed, halves) != (1, [0, head // 2, head // 2]) or end < head:
            return result.fail("The head is not split into two equal halves.")
        if any(_half(op_type, table) is None for op_type, table in (("Cos", cos), ("Sin", sin))):
            return result.fail("cos and sin are not made of repeated angles.")
        return result

    def rewrite(self, op, x, cos, sin, **_):  # type: ignore[no-untyped-def]
        tables = [_rebuild(op, op_type, table) for op_type, table in (("Cos", cos), ("Sin", sin))]
        return op.RotaryEmbedding(x, *tables, interleaved=0)


def _half(op_type: str, table: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
    """The angles under a table, and the Mul and Cast nodes on the way from cos or sin to it (outermost first)."""
    on_the_way: list[ir.Node] = []
    value = table
    while (node := value.producer()) is not None and node.op_type in ("Mul", "Cast"):
        on_the_way.append(node)
        constants = [constant(other) is not None for other in node.inputs]
        value = node.inputs[1 if constants[0] else 0]  # type: ignore[assignment]
    function = producer(value, op_type)
    repeated = producer(function.inputs[0], "Concat") if function is not None else None
    if repeated is None or len(repeated.inputs) != 2 or repeated.inputs[0] is not repeated.inputs[1]:
        return None
    angles = repeated.inputs[0]
    return (angles, on_the_way) if angles is not None else None


def _rebuild(op, op_type: str, table: ir.Value) -> ir.Value:  # type: ignore[no-untyped-def]
    """The same factor and cast, over cos or sin of the angles once."""
    found = _half(op_type, table)
    assert found is not None
    angles, on_the_way = found
    value = op.Cos(angles) if op_type == "Cos" else op.Sin(angles)
    for node in reversed(on_the_way):
        factor = [other for other in node.inputs if constant(other) is not None]
        value = op.Mul(value, factor[0]) if factor else op.Cast(value, to=node.attributes["to"].as_int())
    return value  # type: ignore[no-any-return]


def fuse_rotary(model: ir.Model) -> None:
    """Needs folded constants; leaves one RotaryEmbedding each for queries and keys, and tables computed once."""
    pattern.RewriteRuleSet([_Rotary.rule()]).apply_to_model(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
