"""Numbers to codes and back: round-to-nearest in blocks, and the bytes that the kernels read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .formats import BF16, FP16, FP32, INT4_OFFSET, Format
from .tensors import BLOCK, Blocks, Float32, SourceTensor, UInt8

Reader = Callable[[int, int], Blocks]


def quantise(rows: Float32, bits: int) -> Blocks:
    """Round `rows` [n, columns] to nearest, symmetric, one scale for each block of 32 columns (the last one is padded).

    The scale maps the value of largest magnitude, sign included, to the most negative code, which uses the whole range
    [-2^(bits-1), 2^(bits-1)) and loses less than scaling to the positive end (the choice of GGUF's Q4_0 and of ONNX
    Runtime's symmetric quantiser). A block of zeros has scale 0 and the codes of zero.
    """
    # NaN and infinity make scales that are not finite, which the writer looks for; no warning is needed on the way.
    with np.errstate(invalid="ignore", over="ignore"):
        return _rounded(_padded(rows), bits)


def _padded(rows: Float32) -> Float32:
    columns = rows.shape[1]
    return np.pad(rows, ((0, 0), (0, -columns % BLOCK))) if columns % BLOCK else rows


def _rounded(rows: Float32, bits: int) -> Blocks:
    n, zero = rows.shape[0], 2 ** (bits - 1)
    blocks = rows.reshape(n, -1, BLOCK)
    largest, smallest = blocks.max(axis=-1), blocks.min(axis=-1)
    scales = np.where(largest > -smallest, largest, smallest) / np.float32(-zero)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = blocks * inverse[..., None]
    np.rint(codes, out=codes)
    codes += np.float32(zero)
    np.clip(codes, 0, 2 * zero - 1, out=codes)
    return Blocks(bits, codes.astype(np.uint8).reshape(n, -1), scales)


def dequantise(blocks: Blocks, columns: int) -> Float32:
    """The float32 values [n, columns] that `blocks` stand for; padding at the end of a row is cut off."""
    n = blocks.codes.shape[0]
    values = blocks.codes.reshape(n, -1, BLOCK).astype(np.float32)
    values -= np.float32(2 ** (blocks.bits - 1))
    values *= blocks.scales[..., None]
    if blocks.offsets is not None:
        values += blocks.offsets[..., None]
    return values.reshape(n, -1)[:, :columns]


def pack(blocks: Blocks) -> UInt8:
    """The codes as MatMulNBits stores them, [n, padded columns * bits / 8]; of two 4-bit codes the first is the low
    nibble."""
    if blocks.bits == 8:
        return blocks.codes
    high = np.left_shift(blocks.codes[:, 1::2], np.uint8(4))
    return np.bitwise_or(blocks.codes[:, 0::2], high)


def round_scales(blocks: Blocks, dtype: npt.DTypeLike) -> Blocks:
    """The same codes with scales and offsets as they survive being stored in `dtype`, that of the activations."""

    def rounded(values: Float32) -> Float32:
        return values.astype(dtype).astype(np.float32)

    return Blocks(
        blocks.bits, blocks.codes, rounded(blocks.scales), None if blocks.offsets is None else rounded(blocks.offsets)
    )


def blocks_of(tensor: SourceTensor, format: Format) -> Reader:
    """How rows of `tensor` become blocks of `format`: the checkpoint's own codes where it has them, else
    round-to-nearest.
    """
    own = tensor.blocks
    native = {"Q4_0": "int4", "Q4_1": INT4_OFFSET.name, "Q8_0": "int8"}.get(tensor.dtype)
    if own is not None and native == format.name:
        return own
    return lambda start, stop: quantise(tensor.read(start, stop), format.bits)


def stored_values(tensor: SourceTensor, format: Format, start: int, stop: int, scale_dtype: npt.DTypeLike) -> Float32:
    """Rows [start, stop) as float32, exactly as a bundle that stores them in `format` computes with them."""
    if format.quantised:
        blocks = round_scales(blocks_of(tensor, format)(start, stop), scale_dtype)
        return dequantise(blocks, tensor.shape[1])
    rows = tensor.read(start, stop)
    return rows if format == FP32 else to_dense(rows, format).astype(np.float32)


def to_dense(rows: Float32, format: Format) -> npt.NDArray[np.generic]:
    """`rows` in the floating-point `format`, rounded to nearest even."""
    import ml_dtypes  # noqa: PLC0415  (a build dependency; the planner imports this module without it)

    types: dict[Format, npt.DTypeLike] = {FP32: np.float32, FP16: np.float16, BF16: ml_dtypes.bfloat16}
    return rows.astype(types[format], copy=False)
