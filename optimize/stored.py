"""What stands behind an initializer of a lowered graph: which checkpoint tensors, in which format, and which part of
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from .formats import Format
from .graph import sizes_of

Role = Literal["values", "codes", "scales", "zeros", "offsets", "global"]
"""`global`: the one number by which the scales of a whole tensor are multiplied."""
_STORED, _PARTS, _ROWS = "stored", "parts", "rows"


@dataclass(frozen=True)
class Stored:
    """One initializer's content: `role` of the checkpoint tensors `parts`, stacked by rows, in `format`.

    signed: integer codes are in two's complement, 2**(bits - 1) less than in `tensors.Blocks`. transposed: columns of
    the checkpoint's matrix are rows here; of 4-bit codes an odd number of columns is padded with a zero.

    Initializers with equal descriptions are the same bytes, whatever their shapes: a tied embedding and head are stored
    once.
    """

    parts: tuple[str, ...]
    format: Format
    role: Role
    signed: bool = False
    transposed: bool = False


def parts_of(weight: ir.Value) -> tuple[str, ...]:
    """The checkpoint tensors whose rows, stacked, are this weight of the canonical graph: by default the one of its
    name.
    """
    parts: tuple[str, ...] = weight.meta.get(_PARTS, (str(weight.name),))
    return parts


def rows_of_parts(weight: ir.Value) -> tuple[int, ...]:
    """How many rows each of `parts_of` has."""
    rows: tuple[int, ...] = weight.meta.get(_ROWS, (sizes_of(weight)[0],))
    return rows


def stacked(graph: ir.Graph, name: str, weights: list[ir.Value]) -> ir.Value:
    """A new weight: the rows of `weights` one after another."""
    rows = sum(sizes_of(weight)[0] for weight in weights)
    value = ir.Value(name=name, shape=ir.Shape([rows, *sizes_of(weights[0])[1:]]), type=weights[0].type)
    value.meta[_PARTS] = tuple(part for weight in weights for part in parts_of(weight))
    value.meta[_ROWS] = tuple(count for weight in weights for count in rows_of_parts(weight))
    graph.initializers[name] = value
    return value


def store(graph: ir.Graph, name: str, shape: list[int], dtype: ir.DataType, content: Stored) -> ir.Value:
    """An initializer of the lowered graph that the writer will fill with `content`."""
    value = graph.initializers.get(name) or ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.meta[_STORED] = content
    graph.initializers[name] = value
    return value


def stored_of(initializer: ir.Value) -> Stored | None:
    content: Stored | None = initializer.meta.get(_STORED)
    return content
