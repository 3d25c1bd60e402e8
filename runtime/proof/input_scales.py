"""Are the scales by which a graph rounds what its projections read those that calibration found?

They are numbers of model.onnx itself. The full-precision replay leaves such roundings out, and what really runs is
allowed what they cost, so a scale three times too large would show nowhere else. Found by what is connected with what,
not by names: from each product back to its weight, which the reference knows, and to the rounding of its other side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..bundle import GRAPH_FILE
from ..onnx_file import inline_scalars
from ..onnx_nodes import Node, read_nodes
from .reference import Index

_FLOATS = {"float16": "<f2", "float32": "<f4"}
_PLAIN = "not rounded"


@dataclass(frozen=True)
class InputDifference:
    """A rounding that is not the recorded one. name: of the weight that what is rounded is multiplied with, or of a
    node that is none of any weight's. problem: the end of a sentence about it.
    """

    name: str
    problem: str

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.name}: {self.problem}"


def compare_inputs(graph: bytes, index: Index) -> list[InputDifference]:
    """What differs from `Index.inputs` in how `graph`, a bundle's model.onnx, rounds activations; empty where nothing
    does. Raises LlamaExportError when the graph is no protobuf message.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for record in index.weights:
        if "codes" in record.initializers:
            names[record.initializers["codes"]].append(record.name)
    found = _Found(graph, names)
    expected = {record.name: _told(record.scale, record.dtype) for record in index.inputs}
    differences = []
    for name in dict.fromkeys((*expected, *found.roundings)):
        want = expected.get(name, _PLAIN)
        wrong = [one for one in found.roundings.get(name, ["nowhere"]) if one != want]
        if wrong:
            told = f"{want} by calibration" if name in expected else "not recorded by the reference"
            differences.append(InputDifference(name, f"its input is {wrong[0]} in {GRAPH_FILE}, and {told}"))
    return differences + list(found.strays())


class _Found:
    """The roundings of a graph. roundings: by weight, how what each product with it reads is rounded, in words."""

    def __init__(self, graph: bytes, weights: Mapping[str, list[str]]) -> None:
        """weights: by initializer of their codes."""
        self._nodes = read_nodes(graph)
        self._makers = {name: node for node in self._nodes for name in node.outputs}
        self._scalars = {name: one for name, one in inline_scalars(graph).items() if name not in self._makers}
        self._chains: set[str] = set()  # values between the beginning of a rounding and its product
        self._products: set[str] = set()
        self.roundings: dict[str, list[str]] = defaultdict(list)
        for node in self._nodes:
            if node.op == "MatMul" and len(node.inputs) == 2:
                codes = self._made(self._uncast(node.inputs[1]), "DequantizeLinear")
                names = weights.get(codes.inputs[0], []) if codes is not None else []
                rounding = self._rounding(node.inputs[0]) if names else _PLAIN
                self._products.update(node.outputs if names else ())
                for name in names:
                    self.roundings[name].append(rounding)

    def strays(self) -> Iterator[InputDifference]:
        """Nodes that round something else, or read what is rounded for a product."""
        for node in self._nodes:
            name = next(iter(node.outputs), "")
            quantises = node.op == "QuantizeLinear"
            if quantises and name not in self._chains:
                yield InputDifference(name, "it rounds activations that no recorded weight is multiplied with")
            elif quantises or name not in self._chains:
                read = node.inputs[1:] if name in self._products else node.inputs
                if not self._chains.isdisjoint(read):
                    yield InputDifference(name, "it reads activations that are rounded for a projection")

    def _rounding(self, name: str) -> str:
        """How the value is rounded to 8 bits and back."""
        last = self._uncast(name)
        back = self._made(last, "DequantizeLinear")
        there = self._made(back.inputs[0], "QuantizeLinear") if back is not None else None
        if back is None or there is None:
            return _PLAIN
        self._chains |= {name, last, back.inputs[0]}
        if there.inputs[1:] != back.inputs[1:] or there.attributes or back.attributes:
            return "rounded in one way and brought back in another"
        step, zero = (self._scalars.get(one) for one in (*there.inputs[1:3], "", "")[:2])
        if step is None or zero is None or step[0] not in _FLOATS:
            return "rounded by what is no constant number"
        if any(zero[1]):
            return "rounded with a zero point"
        return _told(float(np.frombuffer(step[1], _FLOATS[step[0]])[0]), zero[0])

    def _made(self, name: str, op: str) -> Node | None:
        """The node that makes a value, where it is this one of ONNX and reads something."""
        node = self._makers.get(name)
        return node if node is not None and (node.op, node.domain) == (op, "") and node.inputs else None

    def _uncast(self, name: str) -> str:
        """What a value was before its dtype was changed."""
        cast = self._made(name, "Cast")
        return name if cast is None else cast.inputs[0]


def _told(scale: float, dtype: str) -> str:
    """With the digits that tell any two float32 apart, so that scales are the same where their words are."""
    return f"rounded to {scale:.9g} times a number of {dtype}"
