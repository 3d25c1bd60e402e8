"""Changes to a TensorRT dialect's graph, in memory, so that ONNX Runtime's CPU runs it at a bearable speed and, for the
proof, in full precision. None changes a value that the graph computes, but for the roundings that `exact` leaves out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..errors import LlamaExportError
from .bundle import GRAPH_FILE
from .onnx_file import Initializer
from .onnx_nodes import Node, read_nodes, with_nodes, with_type
from .recipe import POSITIONS

_MICROSOFT = "com.microsoft"
_OPSETS = {_MICROSOFT: 1}
_FLOAT, _INT32, _FLOAT16, _UINT4 = 1, 6, 10, 21
"""TensorProto.DataType."""
_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
E2M1 = tuple(sign * half / 2 for sign in (1.0, -1.0) for half in _HALVES)
"""The value of each code of FLOAT4E2M1, negative zero too (OCP Microscaling Formats 1.0, table 5)."""

Pass = Callable[[Sequence[Node], Mapping[str, Initializer]], Iterable[Node]]


def for_cpu(graph: bytes, weights: Mapping[str, Initializer], *, exact: bool) -> bytes:
    """The graph as it runs best on this processor; the same bytes where nothing is to be changed.

    weights: the initializers that lie in the data file. exact: without the quantisation of activations. Raises
    LlamaExportError when a node is not as its operator needs it.
    """
    before = read_nodes(graph)
    nodes: Sequence[Node] = before
    passes: tuple[Pass, ...] = (
        rows_before_values,
        used_keys,
        looked_up_fours,
        *((plain_activations,) if exact else ()),
        wide_products,
    )
    try:
        for change in passes:
            nodes = list(change(nodes, weights))
        if nodes == before:
            return graph
        fours = {name for name, weight in weights.items() if weight.dtype == "float4e2m1"}
        return with_type(with_nodes(graph, nodes, _OPSETS), fours, _UINT4)
    except (LookupError, ValueError, ArithmeticError) as error:  # whichever pass comes upon it first
        raise LlamaExportError(
            f"{GRAPH_FILE} has a node whose inputs, outputs or attributes do not fit its operator; copy or build the "
            "bundle again."
        ) from error


def rounds_activations(graph: bytes) -> bool:
    """Whether the graph itself rounds activations to 8 bits."""
    return any(node.op == "QuantizeLinear" for node in read_nodes(graph))


def rows_before_values(nodes: Sequence[Node], weights: Mapping[str, Initializer]) -> Iterable[Node]:
    """Dequantise the rows that an embedding looks up instead of the whole table, which takes seconds a token."""
    uses = _uses(nodes)
    tables = {
        node.outputs[0]: node
        for node in nodes
        if node.op == "DequantizeLinear"
        and node.inputs[0] in weights
        and node.attributes.get("axis", 1) in (1, -1)  # along rows; any other is left to ONNX Runtime
        and _only_looked_up(uses[node.outputs[0]])
    }
    for node in nodes:
        table = tables.get(node.inputs[0]) if node.op == "Gather" else None
        if table is not None:
            yield from _looked_up(node, table, weights)
        elif not node.outputs or node.outputs[0] not in tables:
            yield node


def used_keys(nodes: Sequence[Node], weights: Mapping[str, Initializer]) -> Iterable[Node]:
    """Let Attention read the part of a static cache that holds tokens; the rest is masked, and would cost the same."""
    scattered = {node.outputs[0] for node in nodes if node.op == "TensorScatter"}
    attentions = [node for node in nodes if node.op == "Attention" and set(node.inputs[1:3]) <= scattered]
    if not attentions:
        return nodes
    one, rows, keys, used = (f"used_keys/{name}" for name in ("one", "rows", "keys", "count"))
    constants = {one: 1, f"{one}/none": 0, rows: 2, keys: 3}
    result = [Node("Constant", (), (name,), attributes={"value_ints": [value]}) for name, value in constants.items()]
    result.append(Node("ReduceMax", (POSITIONS,), (f"{used}/last",), attributes={"keepdims": 0}))
    result.append(Node("Add", (f"{used}/last", one), (used,)))
    sliced: dict[str, str] = {}
    for node in nodes:
        if node not in attentions:
            result.append(node)
            continue
        for name, axis in zip(node.inputs[1:4], (rows, rows, keys), strict=True):
            if name not in sliced:
                sliced[name] = f"{name}/used"
                result.append(Node("Slice", (name, f"{one}/none", used, axis), (sliced[name],)))
        result.append(node.taking([sliced.get(name, name) for name in node.inputs]))
    return result


def looked_up_fours(nodes: Sequence[Node], weights: Mapping[str, Initializer]) -> Iterable[Node]:
    """Look the values of 4-bit floats up in a table, as DequantizeLinear has no kernel for them here.

    ONNX Runtime computes the result once and keeps it, dense: all of it depends on weights alone.
    """
    for node in nodes:
        codes = weights.get(node.inputs[0]) if node.op == "DequantizeLinear" else None
        if codes is None or codes.dtype != "float4e2m1":
            yield node
            continue
        (columns, rows), block, name = codes.shape, node.attributes["block_size"], node.outputs[0]
        assert isinstance(block, int)
        if node.attributes.get("axis", 1) not in (0, -2) or columns % block:
            raise ValueError(f"blocks of {block} in {codes.shape}")
        parts = {part: f"{name}/{part}" for part in ("table", "index", "values", "blocks", "axis", "scales", "product")}
        blocked, whole = f"{name}/blocked", f"{name}/whole"
        yield Node("Constant", (), (parts["table"],), attributes={"value_floats": E2M1})
        yield Node("Constant", (), (blocked,), attributes={"value_ints": (columns // block, block, rows)})
        yield Node("Constant", (), (whole,), attributes={"value_ints": (columns, rows)})
        yield Node("Constant", (), (parts["axis"],), attributes={"value_ints": (1,)})
        yield Node("Cast", (codes.name,), (parts["index"],), attributes={"to": _INT32})
        yield Node("Gather", (parts["table"], parts["index"]), (parts["values"],))
        yield Node("Reshape", (parts["values"], blocked), (parts["blocks"],))
        yield Node("Unsqueeze", (node.inputs[1], parts["axis"]), (parts["scales"],))
        yield Node("Mul", (parts["blocks"], parts["scales"]), (parts["product"],))
        yield Node("Reshape", (parts["product"], whole), node.outputs)


def plain_activations(nodes: Sequence[Node], weights: Mapping[str, Initializer]) -> Iterable[Node]:
    """Leave activations as they are where the graph rounds them to 8 bits and back."""
    uses = _uses(nodes)
    rounded = {node.outputs[0]: node for node in nodes if node.op == "QuantizeLinear"}

    def undone(use: Node, source: Node) -> bool:
        """Whether it brings the codes back to where they came from: by the same scale."""
        return use.op == "DequantizeLinear" and use.inputs[1:] == source.inputs[1:]

    for node in nodes:
        source = rounded.get(node.inputs[0]) if node.op == "DequantizeLinear" else None
        if source is not None and undone(node, source):
            yield Node("Identity", (source.inputs[0],), node.outputs)
        elif node.op != "QuantizeLinear" or not all(undone(use, node) for use in uses[node.outputs[0]]):
            yield node


def wide_products(nodes: Sequence[Node], weights: Mapping[str, Initializer]) -> Iterable[Node]:
    """Multiply dequantised weights in float32 where the graph does in float16, which no processor kernel computes in.

    ONNX Runtime would cast anyway, but before 1.24 it then misses that the two nodes are its fast MatMulNBits, and
    dequantises the whole weight for each token (measured with 1.23.2 on SmolLM2: 84 times slower).
    """
    uses = _uses(nodes)
    narrow = {
        node.outputs[0]
        for node in nodes
        if node.op == "DequantizeLinear"
        and node.inputs[0] in weights
        and (scales := weights.get(node.inputs[1])) is not None
        and scales.dtype == "float16"
        and all(use.op == "MatMul" and use.inputs[1] == node.outputs[0] for use in uses[node.outputs[0]])
    }
    widened: dict[str, str] = {}

    def wide(name: str) -> Iterable[Node]:
        if name not in widened:
            widened[name] = f"{name}/wide"
            yield Node("Cast", (name,), (widened[name],), attributes={"to": _FLOAT})

    for node in nodes:
        if node.outputs and node.outputs[0] in narrow:
            yield from wide(node.inputs[1])
            yield node.taking([node.inputs[0], widened[node.inputs[1]], *node.inputs[2:]])
        elif node.op == "MatMul" and node.inputs[1] in narrow:
            yield from wide(node.inputs[0])
            product = f"{node.outputs[0]}/wide"
            yield Node("MatMul", (widened[node.inputs[0]], node.inputs[1]), (product,))
            yield Node("Cast", (product,), node.outputs, attributes={"to": _FLOAT16})
        else:
            yield node


def _uses(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    """The nodes that take each value."""
    uses: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            uses[name].append(node)
    return uses


def _only_looked_up(uses: Sequence[Node]) -> bool:
    return bool(uses) and all(use.op == "Gather" and use.attributes.get("axis", 0) == 0 for use in uses)


def _looked_up(gather: Node, table: Node, weights: Mapping[str, Initializer]) -> Iterable[Node]:
    """The rows of a quantised table: by one kernel where there is one for its codes, else rows of codes and of scales.

    GatherBlockQuantized takes 4-bit codes in blocks (ONNX Runtime, docs/ContribOperators.md).
    """
    indices, codes = gather.inputs[1], weights[table.inputs[0]]
    block = table.attributes.get("block_size", 0)
    if codes.dtype in ("int4", "uint4") and block:
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block}
        inputs = (codes.name, indices, *table.inputs[1:])
        yield Node("GatherBlockQuantized", inputs, gather.outputs, _MICROSOFT, attributes)
        return
    rows = []
    for role, name in zip(("codes", "scales", "zeros"), table.inputs, strict=False):
        rows.append(f"{gather.outputs[0]}.{role}")
        yield Node("Gather", (name, indices), (rows[-1],), attributes={"axis": 0})
    # [batch, sequence, columns]: the columns, which were axis 1, are axis 2 now
    yield Node("DequantizeLinear", tuple(rows), gather.outputs, attributes={"axis": 2, "block_size": block})
