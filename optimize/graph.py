"""Names that the passes share, and small questions to ask of a graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

INV_FREQ = "model.rotary_emb.inv_freq"
MICROSOFT = "com.microsoft"


def past_name(layer: int, part: str) -> str:
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    return f"present.{layer}.{part}"


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
