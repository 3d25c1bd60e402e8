"""Which weight is stored in which format."""

from __future__ import annotations

from collections.abc import Mapping

from .formats import BLOCK, EMBEDDING, FP16, FP32, HEAD, INT8, Format, precision_format
from .tensors import Int64, SourceTensor


def plan_formats(
    tensors: Mapping[str, SourceTensor], precision: str | None, *, wide_head: bool = True
) -> dict[str, Format]:
    """Decide the stored format of every tensor; `precision` None keeps what the checkpoint has.

    wide_head: whether that holds, too, for a head in floating point beside projections that come quantised. Quantisers
    mostly leave it out; without, it becomes int8, as it is read whole for each token.
    Vectors (norms, biases) stay in full precision: they are read once a token and weigh nothing. An embedding of its
    own (not tied to the head) is never below 8 bits: no sum over it averages its error away. Rows that are no multiple
    of the block cannot be gathered in blocks, such an embedding is stored as fp16.
    """
    tied = HEAD not in tensors
    narrow = None if wide_head else wide_head_of(tensors)

    def decide(tensor: SourceTensor) -> Format:
        if len(tensor.shape) == 1:
            return FP32
        if precision is None:
            return INT8 if tensor.name == narrow else tensor.format
        chosen = precision_format(precision)
        if tensor.name == EMBEDDING and chosen.quantised:
            if tensor.shape[1] % BLOCK:
                return FP16
            return chosen if tied else INT8
        return chosen

    return {name: decide(tensor) for name, tensor in tensors.items()}


def wide_head_of(tensors: Mapping[str, SourceTensor]) -> str | None:
    """The name of a head in floating point beside projections that come quantised; None where there is none."""
    head = tensors[HEAD if HEAD in tensors else EMBEDDING]
    if head.format.quantised or head.shape[1] % BLOCK:
        return None
    return head.name if any(tensor.format.quantised for tensor in tensors.values()) else None


def column_orders(tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format]) -> dict[str, Int64]:
    """The tensors whose columns are stored in an order of their own, each with it."""
    orders = {name: tensor.order_in(formats[name]) for name, tensor in tensors.items()}
    return {name: order for name, order in orders.items() if order is not None}
