"""Which nodes of model.onnx read a value: what an error about a graph names."""

from __future__ import annotations

from ..runtime.protobuf import fields_of, messages_of, text_of

# Field numbers: onnx.proto of ONNX 1.16 and later.
_MODEL_GRAPH, _GRAPH_NODE = 7, 1
_NODE_INPUT, _NODE_NAME, _NODE_OPERATOR = 1, 3, 4


def users(model: bytes, value: str) -> list[str]:
    """The nodes of a serialized ModelProto that read `value`, as "'name' (Operator)".

    Raises LlamaExportError when the bytes are no protobuf.
    """
    found = []
    for graph in messages_of(model, 0, len(model), _MODEL_GRAPH):
        for node in messages_of(model, graph.start, graph.stop, _GRAPH_NODE):
            parts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_NAME: [], _NODE_OPERATOR: []}
            for field in fields_of(model, node.start, node.stop):
                if field.number in parts:
                    parts[field.number].append(text_of(model, field))
            if value in parts[_NODE_INPUT]:
                found.append(f"{''.join(parts[_NODE_NAME])!r} ({''.join(parts[_NODE_OPERATOR])})")
    return found
