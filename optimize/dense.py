"""Matrices that stay floating-point numbers in a lowered graph."""

from __future__ import annotations

import onnx_ir as ir

from .formats import Format
from .graph import Recorder, sizes_of
from .quantise import DENSE
from .stored import Stored, parts_of, store


def dense_weight(graph: ir.Graph, record: Recorder, weight: ir.Value, format: Format) -> ir.Value:
    """The weight stored in `format`, cast to the dtype that it has in the canonical graph, which is that of the
    activations (ONNX Runtime folds the Cast when it loads).
    """
    assert weight.dtype is not None
    values = dense_values(graph, weight, format)
    return values if values.dtype == weight.dtype else record("Cast", values, to=weight.dtype)


def dense_values(graph: ir.Graph, weight: ir.Value, format: Format) -> ir.Value:
    """The weight as it is stored in the floating-point `format`."""
    content = Stored(parts_of(weight), format, "values")
    return store(
        graph, f"{weight.name}.{format.name}", sizes_of(weight), ir.DataType.from_numpy(DENSE[format]), content
    )
