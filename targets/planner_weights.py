"""Bytes of a model's weights as `build` writes them, and how many of them a token reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..optimize.formats import EMBEDDING, HEAD, Format, stored_bytes
from ..optimize.tensors import SourceTensor
from .made import ORT_DIALECT


@dataclass(frozen=True)
class Weights:
    """Bytes of weights.

    stored: by the name of their format, all copies, as in the bundle's data file without its rotary tables.
    read: of them, those that one token reads. Of the embedding that is one row, which is not counted.
    multiplied: numbers of weights in matrix products, each of which a token multiplies once.
    """

    stored: Mapping[str, int]
    read: int
    multiplied: int

    @property
    def total(self) -> int:
        return sum(self.stored.values())


def weights_of(
    tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format], dialect: str, number_bytes: int
) -> Weights:
    """Count the weights of a graph of `dialect` whose tensors are stored in `formats`.

    number_bytes: of a number in the dtype of activations, which scales have too. A TensorRT graph holds a tied
    embedding that is quantised twice, since a product reads it by columns and a look-up by rows.
    """
    stored: Counter[str] = Counter()
    read = multiplied = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor.shape, formats[name], dialect, number_bytes)
        is_embedding, tied = name == EMBEDDING, HEAD not in tensors
        twice = is_embedding and tied and formats[name].quantised and dialect != ORT_DIALECT
        rows = stored_bytes(tensor.shape, formats[name], number_bytes)
        stored[formats[name].name] += rows + size if twice else rows if is_embedding and not tied else size
        if not is_embedding or tied:
            read += size
            multiplied += tensor.shape[0] * tensor.shape[1] if len(tensor.shape) > 1 else 0
    return Weights(dict(stored), read, multiplied)


def _bytes(shape: tuple[int, ...], format: Format, dialect: str, number_bytes: int) -> int:
    """Bytes of one copy that a product reads: TensorRT's hold an even number of the checkpoint's rows in 4 bits."""
    if dialect != ORT_DIALECT and len(shape) > 1 and format.quantised and format.bits < 8:
        shape = (shape[0] + shape[0] % 2, *shape[1:])
    return stored_bytes(shape, format, number_bytes)
