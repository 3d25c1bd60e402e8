"""Bytes of a model's weights as `build` writes them, and how many of them a token reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..names import ORT
from ..optimize.formats import EMBEDDING, FP16, FP32, HEAD, Format, stored_bytes
from ..optimize.tensors import SourceTensor

_FLOAT16_SCALES = 19
"""The first opset whose DequantizeLinear takes scales in float16; below, they are float32."""

_VECTORS = {4: FP32.name, 2: FP16.name}


@dataclass(frozen=True)
class Weights:
    """Bytes of weights.

    stored: by the name of their format, all copies, as in the bundle's data file without its rotary tables.
    read: of them, those that one token reads. Of the embedding that is one row, which is not counted.
    multiplied: numbers of weights in matrix products, each of which a token multiplies once.
    dense: bytes of those that are in floating point.
    """

    stored: Mapping[str, int]
    read: int
    multiplied: int
    dense: int

    @property
    def total(self) -> int:
        return sum(self.stored.values())


def weights_of(
    tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format], dialect: str, opset: int, number_bytes: int
) -> Weights:
    """Count the weights of a graph of `dialect` and `opset` whose tensors are stored in `formats`.

    number_bytes: of a number in the dtype of activations, which norms and scales have too. A TensorRT graph holds a
    tied embedding that is quantised twice, since a product reads it by columns and a look-up by rows.
    """
    engine, tied = dialect != ORT, HEAD not in tensors
    scale_bytes = number_bytes if not engine or opset >= _FLOAT16_SCALES else 4
    stored: Counter[str] = Counter()
    read = multiplied = dense = 0
    for name, tensor in tensors.items():
        format, shape = formats[name], tensor.shape
        if len(shape) == 1:
            stored[_VECTORS[number_bytes]] += shape[0] * number_bytes
            read += shape[0] * number_bytes
            continue
        looked_up, multiplies = name == EMBEDDING, name != EMBEDDING or tied
        product = stored_bytes(_even(name, shape, format) if engine else shape, format, scale_bytes)
        table = stored_bytes(shape, format, scale_bytes)
        twice = looked_up and tied and engine and format.quantised
        stored[format.name] += product + table if twice else product if multiplies else table
        if multiplies:
            read += product
            multiplied += math.prod(shape)
            dense += 0 if format.quantised else product
    return Weights(dict(stored), read, multiplied, dense)


def _even(name: str, shape: tuple[int, ...], format: Format) -> tuple[int, ...]:
    """Rows of 4 bits come in pairs. What is stacked with its like, as gate and up are, makes pairs anyway; all that is
    left is the head, and formats that cannot be stacked.
    """
    alone = name in (EMBEDDING, HEAD) or format.tensor_scale
    return (shape[0] + shape[0] % 2, *shape[1:]) if format.bits == 4 and alone else shape
