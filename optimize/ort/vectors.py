"""Norm weights and biases are stored plainly, in the dtype of the activations."""

from __future__ import annotations

import onnx_ir as ir

from ..graph import sizes_of
from ..quantise import dense_format
from ..stored import Stored, parts_of, store, stored_of


def lower_vectors(model: ir.Model) -> None:
    """Needs the matrices described and unused weights gone; describes the rest."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if value.const_value is None and stored_of(value) is None and value.dtype is not None:
            content = Stored(parts_of(value), dense_format(value.dtype.numpy()), "values")
            store(graph, name, sizes_of(value), value.dtype, content)
