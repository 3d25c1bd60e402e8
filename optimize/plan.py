"""Which weight is stored in which format."""

from __future__ import annotations

from collections.abc import Mapping

from .formats import EMBEDDING, FP32, HEAD, Format, precision_format
from .policy import ORT, Policy
from .tensors import Int64, SourceTensor


def plan_formats(
    tensors: Mapping[str, SourceTensor], precision: str | None, head: str | None = None, policy: Policy = ORT
) -> dict[str, Format]:
    """Decide the stored format of every tensor; `precision` None keeps what the checkpoint has, as far as `policy` can.

    head: a precision of the head alone, also where it is the embedding too; None for that of all. Vectors (norms,
    biases) stay in full precision: they are read once a token and weigh nothing. An embedding of its own (not tied to
    the head) is never below 8 bits: no sum over it averages its error away. Rows that are no multiple of the block
    cannot be gathered in blocks, such an embedding is stored as fp16. Raises UsageError for a precision that `policy`
    lacks.
    """
    tied, head_name = HEAD not in tensors, head_of(tensors)

    def decide(tensor: SourceTensor) -> Format:
        if len(tensor.shape) == 1:
            return FP32
        asked = head if head is not None and tensor.name == head_name else precision
        columns = tensor.shape[1]
        if asked is None:
            return policy.own(tensor.format, columns)
        chosen = precision_format(asked, policy.precisions)
        if tensor.name == EMBEDDING:
            return policy.embedding(chosen, columns, tied=tied)
        return policy.projection(chosen, columns)

    return {name: decide(tensor) for name, tensor in tensors.items()}


def head_of(tensors: Mapping[str, SourceTensor]) -> str:
    """The name of the head's weight, which may be the embedding."""
    return HEAD if HEAD in tensors else EMBEDDING


def is_quantised(tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format]) -> bool:
    """Whether any matrix is stored in fewer bits than floating point takes."""
    return any(formats[name].quantised for name, tensor in tensors.items() if len(tensor.shape) > 1)


def has_wide_head(tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format]) -> bool:
    """Whether the head is stored in floating point beside projections in blocks, so that it is most of what is read for
    a token.
    """
    return not formats[head_of(tensors)].quantised and any(format.quantised for format in formats.values())


def column_orders(tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format]) -> dict[str, Int64]:
    """The tensors whose columns are stored in an order of their own, each with it."""
    orders = {name: tensor.order_in(formats[name]) for name, tensor in tensors.items()}
    return {name: order for name, order in orders.items() if order is not None}
