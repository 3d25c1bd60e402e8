"""The graph of an `ort` bundle with its cache in float32, where it ships with one in int8: for full precision.

Rounding makes jumps: two machines whose keys differ in the seventh digit cache some of them one step apart, and later
layers some more (measured on SmolLM2: logits 0.3 apart, where float32 is 0.0001). So what must be exact leaves the
rounding out; its scales are compared as the facts they are, and what it costs is measured on what ships.
"""

from __future__ import annotations

from .onnx_nodes import Node, read_nodes, with_nodes
from .protobuf import fields_of, messages_of, text_of

SCALES = slice(12, 14)
"""k_scale and v_scale among the inputs of GroupQueryAttention (ONNX Runtime, docs/ContribOperators.md)."""
PASTS = slice(3, 5)
"""past_key and past_value."""

_ATTRIBUTES = frozenset(("k_quant_type", "v_quant_type", "kv_cache_bit_width"))
_NODE_ATTRIBUTE, _ATTRIBUTE_NAME = 5, 1
_MODEL_GRAPH, _VALUES = 7, (11, 12, 13)  # inputs, outputs, values between
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_ELEMENT = 1, 2, 1, 1
_INT8, _FLOAT32 = 3, 1


def rounding_nodes(graph: bytes) -> list[Node]:
    """The nodes that round what they cache. Raises LlamaExportError when `graph` is no protobuf message."""
    return [node for node in read_nodes(graph) if _rounds(node)]


def with_float_cache(graph: bytes) -> bytes:
    """The same graph whose attention keeps keys and values as they are; `graph` itself where it does that already."""
    nodes = read_nodes(graph)
    rounding = [node for node in nodes if _rounds(node)]
    if not rounding:
        return graph
    cached = {name for node in rounding for name in (*node.inputs[PASTS], *node.outputs[1:3])}
    return _retyped(with_nodes(graph, [_plain(node) for node in nodes], {}), cached)


def _rounds(node: Node) -> bool:
    return node.op == "GroupQueryAttention" and any(node.inputs[SCALES])


def _plain(node: Node) -> Node:
    if not _rounds(node):
        return node
    parts = []
    for part in fields_of(node.encoded, 0, len(node.encoded)):
        if part.number == _NODE_ATTRIBUTE and part.varint is None:
            inner = messages_of(node.encoded, part.start, part.stop, _ATTRIBUTE_NAME)
            if any(text_of(node.encoded, name) in _ATTRIBUTES for name in inner):
                continue
        parts.append(node.encoded[part.key : part.stop])
    others = {name: value for name, value in node.attributes.items() if name not in _ATTRIBUTES}
    plain = Node(node.op, node.inputs, node.outputs, node.domain, others, b"".join(parts))
    return plain.taking(node.inputs[: SCALES.start])


def _retyped(graph: bytes, names: set[str]) -> bytes:
    """With float32 in place of int8 as the type of these values."""
    changed = bytearray(graph)
    for body in messages_of(graph, 0, len(graph), _MODEL_GRAPH):
        for value in fields_of(graph, body.start, body.stop):
            if value.number not in _VALUES or value.varint is not None:
                continue
            fields = {part.number: part for part in fields_of(graph, value.start, value.stop)}
            name, kind = fields.get(_VALUE_NAME), fields.get(_VALUE_TYPE)
            if name is None or kind is None or text_of(graph, name) not in names:
                continue
            for tensor in messages_of(graph, kind.start, kind.stop, _TYPE_TENSOR):
                for element in fields_of(graph, tensor.start, tensor.stop):
                    if element.number == _TENSOR_ELEMENT and element.varint == _INT8:
                        changed[element.start] = _FLOAT32
    return bytes(changed)
