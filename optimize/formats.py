"""The formats in which a weight can be stored, and which weight gets which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UsageError, did_you_mean
from .tensors import BLOCK, SourceTensor


@dataclass(frozen=True)
class Format:
    """How the values of one weight are stored.

    bits: of one value. block: consecutive columns that share a scale, 0 for plain floating point.
    offsets: whether each block has an offset added to its values (GGUF's Q4_1), see `tensors.Blocks`.
    """

    name: str
    bits: int
    block: int = 0
    offsets: bool = False

    @property
    def quantised(self) -> bool:
        return self.block > 0


FP32 = Format("fp32", 32)
FP16 = Format("fp16", 16)
BF16 = Format("bf16", 16)
INT8 = Format("int8", 8, BLOCK)
INT4 = Format("int4", 4, BLOCK)
INT4_OFFSET = Format("int4-offset", 4, BLOCK, offsets=True)

FORMATS: Mapping[str, Format] = {format.name: format for format in (FP32, FP16, BF16, INT8, INT4, INT4_OFFSET)}
PRECISIONS: Mapping[str, Format] = {format.name: format for format in (FP32, FP16, INT8, INT4)}
"""What `--precision` takes, and the format that it gives to matrices."""

NATIVE: Mapping[str, Format] = {
    "F32": FP32,
    "F16": FP16,
    "BF16": BF16,
    "Q8_0": INT8,
    "Q4_0": INT4,
    "Q4_1": INT4_OFFSET,
}
"""A checkpoint tensor's dtype -> the format that keeps it as it is."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def precision_format(precision: str) -> Format:
    """Return the matrix format of a `--precision`; UsageError names the known ones for any other word."""
    if precision not in PRECISIONS:
        raise UsageError(
            f"Unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}."
            + did_you_mean(precision, PRECISIONS)
        )
    return PRECISIONS[precision]


def plan_formats(tensors: Mapping[str, SourceTensor], precision: str | None) -> dict[str, Format]:
    """Decide the stored format of every tensor; `precision` None keeps what the checkpoint has, see `NATIVE`.

    Vectors (norms, biases) stay in full precision: they are read once a token and weigh nothing. An embedding of its
    own (not tied to the head) is never below 8 bits: no sum over it averages its error away. Rows that are no multiple
    of the block cannot be gathered in blocks, such an embedding is stored as fp16.
    """
    tied = HEAD not in tensors

    def decide(tensor: SourceTensor) -> Format:
        if len(tensor.shape) == 1:
            return FP32
        if precision is None:
            return NATIVE[tensor.dtype]
        chosen = precision_format(precision)
        if tensor.name == EMBEDDING and chosen.quantised:
            if tensor.shape[1] % BLOCK:
                return FP16
            return chosen if tied else INT8
        return chosen

    return {name: decide(tensor) for name, tensor in tensors.items()}


def stored_bytes(shape: tuple[int, ...], format: Format, scale_bytes: int = 4) -> int:
    """Bytes of a weight of `shape` (rows first) in `format`, scales and offsets of `scale_bytes` each included; blocks
    are padded at the row's end.
    """
    rows = shape[0]
    columns = shape[1] if len(shape) > 1 else 1
    if not format.quantised:
        return rows * columns * format.bits // 8
    blocks = rows * -(-columns // format.block)
    return blocks * (format.block * format.bits // 8 + scale_bytes * (2 if format.offsets else 1))
