"""Where the values of each place stand in a bundle's graph, told by the names of its nodes.

Every node is named after the module of transformers that it came from, `model.layers.0.self_attn.q_k_v_proj/MatMul`,
in all dialects. What a module takes in and gives out then follows from the edges of the graph, whatever it is made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import onnx

from ...errors import LlamaExportError
from ...runtime.bundle import GRAPH_FILE, Shape
from ...runtime.session import PRESENT
from . import places as at

_PRODUCTS = ("MatMulNBits", "FusedMatMul", "MatMul")
_SUM = 3
"""Which output of SkipSimplifiedLayerNormalization is the sum that it takes the norm of."""
_PARTS = {
    **{"q": at.QUERIES, "k": at.KEYS, "v": at.VALUES, "o": at.OUTPUT},
    **{"gate": at.GATE, "up": at.UP, "down": at.DOWN},
}
_FUSED = {
    "GroupQueryAttention": "rotary embedding of queries and keys, cache, and attention in one op",
    "SkipSimplifiedLayerNormalization": "residual and norm in one op",
}


@dataclass(frozen=True)
class Seen:
    """A value of the graph. op: the name of the node that makes it, op_type its type. columns: those that count, all
    where None. contains: what else that node does, "" for nothing.
    """

    name: str
    op: str
    op_type: str
    columns: tuple[int, int] | None = None
    contains: str = ""


@dataclass(frozen=True)
class Anatomy:
    """layers: by decoder layer, what is seen at each place that the graph shows; outside: the same of the places that
    are in no layer.
    """

    layers: tuple[Mapping[str, Seen], ...]
    outside: Mapping[str, Seen]

    @property
    def exposed(self) -> list[str]:
        """The values that are to be made outputs of the graph, each once."""
        seen = [*self.outside.values(), *(value for layer in self.layers for value in layer.values())]
        return list(dict.fromkeys(value.name for value in seen))


def dissect(model: onnx.ModelProto, shape: Shape, head_dim: int) -> Anatomy:
    """Find the places in a bundle's graph. head_dim: of the model; the cache's may be padded.

    Raises LlamaExportError where the nodes are not named as a build names them.
    """
    graph = _Graph(model.graph)
    try:
        layers = tuple(_layer(graph, number, shape, head_dim) for number in range(shape.layers))
        outside = {
            at.EMBEDDED: graph.result("model.embed_tokens"),
            at.NORM: graph.result("model.norm"),
            at.LOGITS: graph.seen("logits", graph.last("lm_head")),
        }
    except (LookupError, ValueError) as error:
        raise LlamaExportError(
            f"{GRAPH_FILE} does not show where {error} is computed, as its nodes are not named the way a build names "
            "them; build the bundle again."
        ) from error
    return Anatomy(layers, outside)


class _Graph:
    """The nodes of a graph by module, and who makes and who takes each value."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._takers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._modules: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._outputs = {value.name for value in graph.output}
        for node in graph.node:
            self._modules[_module(node)].append(node)
            for name in node.input:
                self._takers[name].append(node)

    def nodes(self, module: str, part: str = "") -> list[onnx.NodeProto]:
        """The nodes of a module in order, or those whose names go on with `part`."""
        return [node for node in self._modules[module] if node.name.startswith(f"{module}/{part}")]

    def modules(self, parent: str) -> list[str]:
        """The modules directly inside of one."""
        return [name for name in self._modules if name.rpartition(".")[0] == parent]

    def last(self, module: str) -> onnx.NodeProto:
        """The node with a module's result: the last one that anything outside of it reads."""
        for node in reversed(self._modules[module]):
            if any(self._read_outside(name, module) for name in node.output if name):
                return node
        raise LookupError(module)

    def result(self, module: str) -> Seen:
        node = self.last(module)
        return self.seen(node.output[0], node)

    def given(self, module: str) -> Seen:
        """The first value that a module takes from outside of it, no weights."""
        for node in self._modules[module]:
            for name in node.input:
                maker = self._makers.get(name)
                if maker is not None and _module(maker) != module:
                    return self.seen(name, maker)
        raise LookupError(f"the input of {module}")

    def added(self, norm: str) -> Seen:
        """The sum that a norm is taken of."""
        node = self._modules[norm][-1]
        if node.op_type == "SkipSimplifiedLayerNormalization":
            return self.seen(node.output[_SUM], node)
        return self.given(norm)

    def product(self, module: str) -> onnx.NodeProto | None:
        """The node that multiplies with a module's weights; None where it has none of its own."""
        return next((node for node in self._modules[module] if node.op_type in _PRODUCTS), None)

    def made(self, name: str) -> Seen:
        if name not in self._makers:
            raise LookupError(name)
        return self.seen(name, self._makers[name])

    def seen(self, name: str, node: onnx.NodeProto, columns: tuple[int, int] | None = None) -> Seen:
        return Seen(name, node.name, node.op_type, columns, _FUSED.get(node.op_type, ""))

    def _read_outside(self, name: str, module: str) -> bool:
        return name in self._outputs or any(_module(node) != module for node in self._takers[name])


def _module(node: onnx.NodeProto) -> str:
    return node.name.partition("/")[0]


def _layer(graph: _Graph, number: int, shape: Shape, head_dim: int) -> dict[str, Seen]:
    layer = f"model.layers.{number}"
    following = f"model.layers.{number + 1}.input_layernorm" if number + 1 < shape.layers else "model.norm"
    widths = {
        at.QUERIES: shape.heads * head_dim,
        **dict.fromkeys((at.KEYS, at.VALUES), shape.kv_heads * head_dim),
        **dict.fromkeys((at.GATE, at.UP), shape.ffn),
        **dict.fromkeys((at.OUTPUT, at.DOWN), shape.hidden),
    }
    found = {
        at.INPUT_NORM: graph.result(f"{layer}.input_layernorm"),
        at.POST_NORM: graph.result(f"{layer}.post_attention_layernorm"),
        at.ATTENDED: graph.added(f"{layer}.post_attention_layernorm"),
        at.LEFT: graph.added(following),
        **_projections(graph, (f"{layer}.self_attn", f"{layer}.mlp"), widths),
        **_attention(graph, number),
        at.ACTIVATED: graph.given(f"{layer}.mlp.down_proj"),
    }
    missing = widths.keys() - found.keys()
    if missing:
        raise LookupError(f"{layer}'s projection {min(missing)}")
    return found


def _projections(graph: _Graph, parents: Sequence[str], widths: Mapping[str, int]) -> dict[str, Seen]:
    """What each projection gives, be it one of its own or a part of a packed one."""
    found = {}
    for module in (name for parent in parents for name in graph.modules(parent)):
        names = module.rpartition(".")[2].removesuffix("_proj").split("_")
        product = graph.product(module)
        if not module.endswith("_proj") or not set(names) <= _PARTS.keys() or product is None:
            continue  # such as one that orders the columns for a packed product
        parts, node = [_PARTS[name] for name in names], graph.last(module)
        contains = f"{', '.join(names)} in one product" if len(names) > 1 else ""
        if len(node.output) == len(parts):
            found.update(
                {part: _by(graph.seen(name, node), product, contains) for part, name in _split(graph, node, parts)}
            )
            continue
        stops = accumulate((widths[part] for part in parts), initial=0)
        for part, bounds in zip(parts, pairwise(stops), strict=True):
            found[part] = _by(graph.seen(node.output[0], node, bounds if len(parts) > 1 else None), product, contains)
    return found


def _split(graph: _Graph, node: onnx.NodeProto, parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Which output is which part: the gate is the one that the activation reads, so that an exchange shows here."""
    names = list(node.output)
    if list(parts) == [at.GATE, at.UP]:
        read = graph.given(f"{_module(node).rpartition('.')[0]}.act_fn").name
        if read == names[1]:
            names.reverse()
    return zip(parts, names, strict=True)


def _attention(graph: _Graph, number: int) -> dict[str, Seen]:
    module = f"model.layers.{number}.self_attn"
    nodes = graph.nodes(module)
    whole = [node for node in nodes if node.op_type in ("GroupQueryAttention", "Attention")]
    attends = (whole or graph.nodes(module, "attention/"))[-1:]
    turning = [node for node in nodes if node.op_type == "RotaryEmbedding"]
    query = turning[:1] or graph.nodes(module, "rotary/")[-1:]
    key = turning[1:2] or graph.nodes(module, "rotary_2/")[-1:]
    if not attends:
        raise LookupError(f"attention of {module}")
    keys, values = (graph.made(f"{PRESENT}{number}.{part}") for part in ("key", "value"))
    result = graph.given(f"{module}.o_proj")
    found = {at.CACHED_KEYS: keys, at.CACHED_VALUES: values, at.ATTENTION: _by(result, attends[0])}
    if key:
        found[at.CACHED_KEYS] = _by(keys, key[0])
    if query:
        found[at.TURNED_QUERIES] = graph.seen(query[0].output[0], query[0])
    if scaling := graph.nodes(module, "scale/")[-1:]:
        found[at.SCALED_QUERIES] = graph.seen(scaling[0].output[0], scaling[0])
    return found


def _by(value: Seen, node: onnx.NodeProto, contains: str | None = None) -> Seen:
    """`value` as the work of another node than the one that hands it on."""
    contains = _FUSED.get(node.op_type, "") if contains is None else contains
    return Seen(value.name, node.name, node.op_type, value.columns, contains)
