"""Does a graph round each layer's keys and values by the scales that calibration found for them?

The scales are tables of the data file, compared bit for bit like weights. Which of them each attention reads is told by
the graph alone, and the full-precision replay leaves the rounding out: so here names are compared.
"""

from __future__ import annotations

from ..bundle import GRAPH_FILE
from ..cache_graph import PASTS, SCALES
from ..onnx_nodes import Node, read_nodes
from ..protobuf import messages_of, text_of
from .input_scales import InputDifference
from .reference import Index

SCALE_ENDING = ".scale"
"""What follows the name of an input of the cache in the name of its scales."""

_NODE_ATTRIBUTE, _ATTRIBUTE_NAME, _ATTRIBUTE_TEXT = 5, 1, 4
_KINDS, _BITS = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}, 8


def compare_cache(graph: bytes, index: Index) -> list[InputDifference]:
    """What differs from the reference in how `graph`, a bundle's model.onnx, rounds what it caches; empty where nothing
    does. Raises LlamaExportError when the graph is no protobuf message.
    """
    recorded = {record.name for record in index.tables if record.name.endswith(SCALE_ENDING)}
    differences = []
    for node in read_nodes(graph):
        if node.op == "GroupQueryAttention":
            for problem in _problems(node, recorded):
                name = next(iter(node.outputs), "")
                differences.append(InputDifference(name, f"{problem} in {GRAPH_FILE}"))
    return differences


def _problems(node: Node, recorded: set[str]) -> list[str]:
    """What is wrong with one attention: the first of it."""
    wanted = tuple(name + SCALE_ENDING for name in node.inputs[PASTS])
    if not any(node.inputs[SCALES]):
        return ["it caches what it should round first"] if recorded.intersection(wanted) else []
    if not recorded.issuperset(wanted):
        return ["it rounds what it caches by scales that the reference does not record"]
    if node.inputs[SCALES] != wanted:
        return [f"it rounds what it caches by {' and '.join(node.inputs[SCALES])} instead of {' and '.join(wanted)}"]
    if _texts(node) != _KINDS or node.attributes.get("kv_cache_bit_width") != _BITS:
        return ["it does not round what it caches to 8 bits by a scale for each channel"]
    return []


def _texts(node: Node) -> dict[str, str]:
    """The attributes of `_KINDS` that hold texts."""
    found = {}
    for attribute in messages_of(node.encoded, 0, len(node.encoded), _NODE_ATTRIBUTE):
        names, texts = (
            [text_of(node.encoded, one) for one in messages_of(node.encoded, attribute.start, attribute.stop, number)]
            for number in (_ATTRIBUTE_NAME, _ATTRIBUTE_TEXT)
        )
        if names and texts and names[-1] in _KINDS:
            found[names[-1]] = texts[-1]
    return found
