"""Names that the passes share, and small questions to ask of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

INV_FREQ = "model.rotary_emb.inv_freq"
ROTARY_TABLES = ("cos_cache", "sin_cache")
ORDER = "order."
"""How the names of column orders begin."""
MICROSOFT = "com.microsoft"
FLOAT32_SCOPE = "float32"
"""In the names of nodes that must compute in float32 even where a builder may choose a type: `…/float32/Mul`."""


def past_name(layer: int, part: str) -> str:
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    return f"present.{layer}.{part}"


def input_named(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def activations_of(model: ir.Model) -> ir.DataType:
    """The type that a graph computes in: that of its cache where this is not rounded to int8, and else of its logits,
    which may be wider in other graphs.
    """
    logits, cache = (value.dtype for value in model.graph.outputs[:2])
    dtype = logits if cache == ir.DataType.INT8 else cache
    assert dtype is not None
    return dtype


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes `value` when it is of `op_type`, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The content of a small constant or of an initializer that has its values, else None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def nodes_of(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    """The nodes of one type, in order; the graph may be changed while they are looked at."""
    return (node for node in list(model.graph) if node.op_type == op_type)


def add_initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """A small constant by name, made once however often it is asked for."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def ints(graph: ir.Graph, *values: int) -> ir.Value:
    """The constant int64 [n] of these values."""
    return add_initializer(graph, "_".join(("ints", *map(str, values))), np.array(values, np.int64))


def scalar(graph: ir.Graph, value: int) -> ir.Value:
    """The constant int64 []."""
    return add_initializer(graph, f"scalar_{value}", np.array(value, np.int64))


class Recorder:
    """Makes nodes of one output each under a scope (`model.layers.0.mlp.down_proj/MatMulNBits`), inserted together.

    Calling it records a node and returns its output; a second node of the same type is numbered.
    """

    def __init__(self, scope: str) -> None:
        self.nodes: list[ir.Node] = []
        self._scope, self._made = scope, Counter[str]()

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | str | Sequence[int]
    ) -> ir.Value:
        self._made[op_type] += 1
        suffix = f"_{self._made[op_type]}" if self._made[op_type] > 1 else ""
        node = ir.node(op_type, inputs, attributes, domain=domain, name=f"{self._scope}/{op_type}{suffix}")
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]

    def contrib(self, op_type: str, *inputs: ir.Value | None, **attributes: int | str | Sequence[int]) -> ir.Value:
        """The same for an op of ONNX Runtime's own."""
        return self(op_type, *inputs, domain=MICROSOFT, **attributes)


def sizes_of(value: ir.Value | None) -> list[int]:
    """The dimensions of a value whose shape is static."""
    assert value is not None and value.shape is not None, f"{value} has no shape"
    return [int(size) for size in value.shape]  # type: ignore[arg-type]
