"""The hidden states in a bundle's graph: which value each decoder layer ends in, and how to see it.

The names of a graph's values are module paths, as `build` writes them; a graph that has others shows no hidden states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..onnx_nodes import Node, read_nodes
from ..protobuf import block_field, fields_of

_NORM = re.compile(r"model\.(?:layers\.(\d{1,9})\.input_layernorm|norm)/")
_MODEL_GRAPH, _GRAPH_OUTPUT, _VALUE_NAME = 7, 12, 1
_SUM = 3
"""Which output of SkipSimplifiedLayerNormalization is what it normalises (ONNX Runtime, docs/ContribOperators.md)."""


def hidden_values(graph: bytes) -> dict[int, str]:
    """The value that holds the hidden state after each decoder layer: what the next layer's first norm takes, or the
    last norm. Raises LlamaExportError when `graph` is no protobuf message.
    """
    taken: dict[int | None, str] = {}
    for node in read_nodes(graph):
        match = _NORM.match(node.outputs[0]) if node.outputs else None
        if match is not None:
            layer = None if match[1] is None else int(match[1])
            taken.setdefault(layer, _normalised(node))
    numbered = {layer - 1: value for layer, value in taken.items() if layer}
    if None in taken:
        numbered[max(numbered, default=-1) + 1] = taken[None]
    return {layer: value for layer, value in sorted(numbered.items()) if value}


def with_outputs(graph: bytes, names: Iterable[str]) -> bytes:
    """The same graph that also gives these values; their types and shapes are left for ONNX Runtime to infer."""
    added = b"".join(block_field(_GRAPH_OUTPUT, block_field(_VALUE_NAME, name.encode())) for name in names)
    parts = []
    for part in fields_of(graph, 0, len(graph)):
        if part.number == _MODEL_GRAPH and part.varint is None:
            parts.append(block_field(_MODEL_GRAPH, graph[part.start : part.stop] + added))
        else:
            parts.append(graph[part.key : part.stop])
    return b"".join(parts)


def _normalised(node: Node) -> str:
    if node.op == "SkipSimplifiedLayerNormalization":
        return node.outputs[_SUM] if len(node.outputs) > _SUM else ""
    return node.inputs[0]
