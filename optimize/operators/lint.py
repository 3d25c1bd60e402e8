"""What a graph has that a release's parser does not take: better known before the file is on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from ..graph import constant
from .releases import Operators

_NAMES: Mapping[ir.DataType, str] = {
    ir.DataType.FLOAT: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.FLOAT4E2M1: "FP4",
}
"""NVIDIA's names of types, where they are not ONNX's."""

_DATA: Mapping[str, tuple[int, ...]] = {
    "Attention": (0, 1, 2),
    "TensorScatter": (0, 1),
    "Where": (1, 2),
    **dict.fromkeys(
        (
            *("DequantizeLinear", "Expand", "Gather", "GatherElements", "GatherND", "Pad", "QuantizeLinear"),
            *("ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Trilu"),
            "Unsqueeze",
        ),
        (0,),
    ),
}
"""The inputs that the lists speak of, where others are indices, shapes, scales or conditions; else all are."""

_QUANTISING = ("DequantizeLinear", "QuantizeLinear")


def unsupported(model: ir.Model, operators: Operators) -> list[str]:
    """What `operators` does not take of a lowered graph: one sentence for each node, type or limit; none when all is
    well. Weights may lack their values.
    """
    first, last = operators.opsets
    opset = model.graph.opset_imports.get("", 0)
    problems = [] if first <= opset <= last else [f"opset {opset} is not one of {first} to {last}"]
    problems += [f"the domain {domain!r} is not ONNX's" for domain in model.graph.opset_imports if domain]
    types = types_of(model)
    for node in model.graph:
        for problem in _problems(node, types, operators):
            problems.append(f"{node.name} ({node.op_type}): {problem}")
    return problems


def _problems(node: ir.Node, types: Mapping[ir.Value, ir.DataType], operators: Operators) -> Iterator[str]:
    known = operators.types.get(node.op_type) if not node.domain else None
    if known is None:
        yield f"{operators.name} has no such operator"
        return
    for name in sorted(_type_names(node, types, operators) - known):
        yield f"{operators.name} takes {', '.join(sorted(known))} and not {name}"
    for index in operators.constants.get(node.op_type, ()):
        if index < len(node.inputs) and node.inputs[index] is not None and constant(node.inputs[index]) is None:
            yield f"input {index} must be a constant"
    if node.op_type in _QUANTISING and len(node.inputs) > 2 and node.inputs[2] is not None:
        zero_point = constant(node.inputs[2])
        if zero_point is None or zero_point.astype("float32").any():
            yield "zero points must be zero"
    for name in operators.ignored_attributes.get(node.op_type, ()):
        if name in node.attributes:
            yield f"the attribute {name} is ignored"
    for name, value in operators.fixed_attributes.get(node.op_type, {}).items():
        if name in node.attributes and node.attributes[name].as_int() != value:
            yield f"{name} must be {value}"
    most = operators.most_inputs.get(node.op_type)
    if most is not None and any(value is not None for value in node.inputs[most:]):
        yield f"it takes {most} inputs"


def _type_names(node: ir.Node, types: Mapping[ir.Value, ir.DataType], operators: Operators) -> set[str]:
    """The types of the node's data, as the release sees them; a Cast's result counts too."""
    indices = _DATA.get(node.op_type, range(len(node.inputs)))
    values = [node.inputs[index] for index in indices if index < len(node.inputs)]
    if node.op_type == "Cast":
        values.append(node.outputs[0])
    names = (_NAMES.get(types[value], types[value].name) for value in values if value is not None)
    return {operators.narrowed.get(name, name) for name in names}


def types_of(model: ir.Model) -> dict[ir.Value, ir.DataType]:
    """The type of every value of a sorted graph, by what its operators do to types; those written down may be old."""
    graph = model.graph
    found: dict[ir.Value, ir.DataType] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        assert value.dtype is not None, f"{value.name} has no type"
        found[value] = value.dtype
    for node in graph:
        dtype = _RESULTS.get(node.op_type, _as_first)(node, found)
        found.update((output, dtype) for output in node.outputs)
    return found


def _as_first(node: ir.Node, types: Mapping[ir.Value, ir.DataType]) -> ir.DataType:
    return _of_input(0)(node, types)


def _of_input(index: int) -> Callable[[ir.Node, Mapping[ir.Value, ir.DataType]], ir.DataType]:
    def result(node: ir.Node, types: Mapping[ir.Value, ir.DataType]) -> ir.DataType:
        value = node.inputs[index]
        assert value is not None
        return types[value]

    return result


def _constantly(dtype: ir.DataType) -> Callable[[ir.Node, Mapping[ir.Value, ir.DataType]], ir.DataType]:
    return lambda node, types: dtype


def _cast(node: ir.Node, types: Mapping[ir.Value, ir.DataType]) -> ir.DataType:
    return ir.DataType(node.attributes["to"].as_int())


_RESULTS: Mapping[str, Callable[[ir.Node, Mapping[ir.Value, ir.DataType]], ir.DataType]] = {
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _constantly(ir.DataType.BOOL)),
    "Cast": _cast,
    "DequantizeLinear": _of_input(1),
    "QuantizeLinear": _of_input(2),
    "Shape": _constantly(ir.DataType.INT64),
    "Where": _of_input(1),
}
"""The type of an operator's results, where it is not that of its first input."""
