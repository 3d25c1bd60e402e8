"""Norm weights and biases are stored plainly, in the dtype of the activations."""

from __future__ import annotations

import onnx_ir as ir

from ..formats import BF16, FP16, FP32
from ..stored import Stored, parts_of, store, stored_of

_FORMATS = {ir.DataType.FLOAT: FP32, ir.DataType.FLOAT16: FP16, ir.DataType.BFLOAT16: BF16}


def lower_vectors(model: ir.Model) -> None:
    """Needs the matrices described and unused weights gone; describes the rest."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if (
            value.const_value is None
            and stored_of(value) is None
            and value.shape is not None
            and value.dtype is not None
        ):
            shape = [int(size) for size in value.shape]  # type: ignore[arg-type]
            store(graph, name, shape, value.dtype, Stored(parts_of(value), _FORMATS[value.dtype], "values"))
