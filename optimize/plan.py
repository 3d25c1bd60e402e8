"""Which weight is stored in which format."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UsageError
from ..tables import listed
from .formats import BLOCKS, EMBEDDING, FP32, HEAD, Format
from .policy import ORT, Policy
from .schemes import BLOCK_SCHEMES, known_scheme
from .tensors import Int64, SourceTensor


def plan_formats(
    tensors: Mapping[str, SourceTensor], precision: str | None, head: str | None = None, policy: Policy = ORT
) -> dict[str, Format]:
    """Decide the stored format of every tensor; `precision` None keeps what the checkpoint has, as far as `policy` can.

    head: a precision of the head alone, also where it is the embedding too; None for that of all. Vectors (norms,
    biases) stay in full precision: they are read once a token and weigh nothing. An embedding of its own (not tied to
    the head) is never below 8 bits: no sum over it averages its error away. Rows that are no multiple of the block
    cannot be gathered in blocks, such an embedding is stored as fp16. A tensor whose own codes a precision takes keeps
    them as they are. Raises UsageError for a precision that `policy` lacks, and for a block that was named and divides
    no whole number of times into the columns where it has to.
    """
    tied, head_name = HEAD not in tensors, head_of(tensors)

    def decide(tensor: SourceTensor) -> Format:
        if len(tensor.shape) == 1:
            return FP32
        asked = head if head is not None and tensor.name == head_name else precision
        columns = tensor.shape[1]
        if asked is None:
            return policy.own(tensor.format, columns)
        chosen = _matrix_format(asked, policy)
        if tensor.name == EMBEDDING:
            return _keeping(tensor, policy.embedding(chosen, columns, tied=tied), policy)
        _check_block(asked, chosen, tensors, tensor, policy)
        return _keeping(tensor, policy.projection(chosen, columns), policy)

    return {name: decide(tensor) for name, tensor in tensors.items()}


def _matrix_format(precision: str, policy: Policy) -> Format:
    """What `precision` makes of a matrix."""
    scheme = known_scheme(precision)
    if scheme.name not in policy.precisions:
        others = [name for name in policy.precisions if name not in BLOCK_SCHEMES]
        raise UsageError(f"{policy.name} does not run {precision} weights; choose one of {', '.join(others)}.")
    return policy.precisions[scheme.name]


def _keeping(tensor: SourceTensor, format: Format, policy: Policy) -> Format:
    """`format`, or the checkpoint's own of the same bits and block where zero points may be: rounding its numbers anew
    would lose more, and so would storing its scales in fewer digits.
    """
    own = tensor.format
    same = (own.bits, own.block, own.coding, own.offsets) == (format.bits, format.block, format.coding, format.offsets)
    kept = policy.zeros and format.quantised and same and own.zeros <= format.zeros and tensor.blocks is not None
    return policy.own(own, tensor.shape[1]) if kept else format


def _check_block(
    precision: str, format: Format, tensors: Mapping[str, SourceTensor], tensor: SourceTensor, policy: Policy
) -> None:
    """Refuse a block that was named and cannot be had for this matrix, with those that all matrices can have."""
    scheme = known_scheme(precision)
    if not (scheme.named_block and policy.whole_blocks and tensor.shape[1] % format.block):
        return
    widths = {one.shape[1] for name, one in tensors.items() if len(one.shape) > 1}
    fitting = [block for block in BLOCKS if all(width % block == 0 for width in widths)]
    names = [scheme.name.replace(f"-b{format.block}", f"-b{block}") for block in fitting]
    ways = [*(name for name in names if name in policy.precisions), f"int{format.bits}"]
    raise UsageError(
        f"--precision {precision} takes rows of whole blocks with {policy.name}, but those of {tensor.name} have "
        f"{tensor.shape[1]} numbers; choose {listed(ways, 'or')}."
    )


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
