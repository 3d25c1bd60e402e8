"""The nodes of a serialized graph, read and replaced without the onnx package.

Field numbers: onnx.proto of ONNX 1.16 and later. Everything but the nodes and the operator sets stays as it is, byte
for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .protobuf import Field, block_field, fields_of, messages_of, number_field, text_of

_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE = 1
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_GRAPH_INITIALIZER, _TENSOR_TYPE, _TENSOR_NAME = 5, 2, 8
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_FLOATS, _ATTRIBUTE_INTS, _ATTRIBUTE_TYPE = 1, 3, 7, 8, 20
_INT, _FLOATS, _INTS = 2, 6, 7


@dataclass(frozen=True)
class Node:
    """One node. attributes: of one that was read, those that are integers; of a new one, integers, lists of them and
    lists of floats. encoded: as it stands in its file, with all its attributes; empty for a new one.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = ""
    attributes: Mapping[str, int | Sequence[int] | Sequence[float]] = field(default_factory=dict)
    encoded: bytes = b""

    def encode(self) -> bytes:
        """The NodeProto."""
        return self.encoded or b"".join(
            (
                *(block_field(_NODE_INPUT, name.encode()) for name in self.inputs),
                *(block_field(_NODE_OUTPUT, name.encode()) for name in self.outputs),
                block_field(_NODE_NAME, self.outputs[0].encode()),
                block_field(_NODE_OP, self.op.encode()),
                *(block_field(_NODE_ATTRIBUTE, _attribute(name, value)) for name, value in self.attributes.items()),
                block_field(_NODE_DOMAIN, self.domain.encode()),
            )
        )

    def taking(self, inputs: Sequence[str]) -> Node:
        """The same node with other inputs."""
        others = (
            self.encoded[part.key : part.stop]
            for part in fields_of(self.encoded, 0, len(self.encoded))
            if part.number != _NODE_INPUT
        )
        encoded = b"".join((*(block_field(_NODE_INPUT, name.encode()) for name in inputs), *others))
        return replace(self, inputs=tuple(inputs), encoded=encoded if self.encoded else b"")


def read_nodes(model: bytes) -> list[Node]:
    """The nodes of the main graph, in order. Raises LlamaExportError when `model` is no protobuf message."""
    return [
        _node(model, part)
        for graph in messages_of(model, 0, len(model), _MODEL_GRAPH)
        for part in messages_of(model, graph.start, graph.stop, _GRAPH_NODE)
    ]


def with_nodes(model: bytes, nodes: Iterable[Node], opsets: Mapping[str, int]) -> bytes:
    """The same model with other nodes, in an order in which they can run. opsets: versions of the domains that the new
    ones need beside those that the model names.
    """
    parts, named = [], set()
    for part in fields_of(model, 0, len(model)):
        if part.number == _MODEL_GRAPH and part.varint is None:
            parts.append(block_field(_MODEL_GRAPH, _graph(model, part, nodes)))
            continue
        if part.number == _MODEL_OPSET and part.varint is None:
            domains = [text_of(model, one) for one in messages_of(model, part.start, part.stop, _OPSET_DOMAIN)]
            named.update(domains or [""])
        parts.append(model[part.key : part.stop])
    for domain, version in opsets.items():
        if domain not in named:
            body = block_field(_OPSET_DOMAIN, domain.encode()) + number_field(_OPSET_VERSION, version)
            parts.append(block_field(_MODEL_OPSET, body))
    return b"".join(parts)


def with_type(model: bytes, names: Container[str], number: int) -> bytes:
    """The same model with another TensorProto.DataType of some initializers, whose bytes are left as they are.

    number: below 128, as all types are.
    """
    changed = bytearray(model)
    for graph in messages_of(model, 0, len(model), _MODEL_GRAPH):
        for tensor in messages_of(model, graph.start, graph.stop, _GRAPH_INITIALIZER):
            fields = {part.number: part for part in fields_of(model, tensor.start, tensor.stop)}
            name, kind = fields.get(_TENSOR_NAME), fields.get(_TENSOR_TYPE)
            if name is not None and kind is not None and text_of(model, name) in names:
                changed[kind.start : kind.stop] = bytes([number])
    return bytes(changed)


def _graph(model: bytes, graph: Field, nodes: Iterable[Node]) -> bytes:
    kept = (
        model[part.key : part.stop]
        for part in fields_of(model, graph.start, graph.stop)
        if part.number != _GRAPH_NODE or part.varint is not None
    )
    return b"".join((*(block_field(_GRAPH_NODE, node.encode()) for node in nodes), *kept))


def _node(model: bytes, part: Field) -> Node:
    texts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_OP: [], _NODE_DOMAIN: []}
    attributes: dict[str, int | Sequence[int] | Sequence[float]] = {}
    for one in fields_of(model, part.start, part.stop):
        if one.number in texts and one.varint is None:
            texts[one.number].append(text_of(model, one))
        elif one.number == _NODE_ATTRIBUTE and one.varint is None:
            found = {inner.number: inner for inner in fields_of(model, one.start, one.stop)}
            name, value = found.get(_ATTRIBUTE_NAME), found.get(_ATTRIBUTE_INT)
            if name is not None and value is not None and value.varint is not None:
                attributes[text_of(model, name)] = value.varint - (1 << 64 if value.varint >> 63 else 0)
    op, domain = (next(iter(texts[number]), "") for number in (_NODE_OP, _NODE_DOMAIN))
    inputs, outputs = (tuple(texts[number]) for number in (_NODE_INPUT, _NODE_OUTPUT))
    return Node(op, inputs, outputs, domain, attributes, model[part.start : part.stop])


def _attribute(name: str, value: int | Sequence[int] | Sequence[float]) -> bytes:
    if isinstance(value, int):
        body = number_field(_ATTRIBUTE_INT, value) + number_field(_ATTRIBUTE_TYPE, _INT)
    elif all(isinstance(item, int) for item in value):
        items = b"".join(number_field(_ATTRIBUTE_INTS, int(item)) for item in value)
        body = items + number_field(_ATTRIBUTE_TYPE, _INTS)
    else:
        items = block_field(_ATTRIBUTE_FLOATS, struct.pack(f"<{len(value)}f", *value))
        body = items + number_field(_ATTRIBUTE_TYPE, _FLOATS)
    return block_field(_ATTRIBUTE_NAME, name.encode()) + body
