"""Numbers to codes and back: round-to-nearest in blocks, and the bytes that the kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .formats import BF16, FP16, FP32, Format
from .tensors import Blocks, Float32, SourceTensor, UInt8

Reader = Callable[[int, int], Blocks]


def quantise(rows: Float32, format: Format) -> Blocks:
    """Round `rows` [n, columns] to nearest in a symmetric `format`, one scale for each block (the last one is padded).

    The scale maps the value of largest magnitude, sign included, to the most negative code, which uses the whole range
    [-2^(bits-1), 2^(bits-1)) and loses less than scaling to the positive end (the choice of GGUF's Q4_0 and of ONNX
    Runtime's symmetric quantiser). A block of zeros has scale 0 and the codes of zero.
    """
    assert not (format.zeros or format.offsets), f"{format.name} is for weights that come quantised"
    # NaN and infinity make scales that are not finite, which the writer looks for; no warning is needed on the way.
    with np.errstate(invalid="ignore", over="ignore"):
        return _rounded(_padded(rows, format.block), format)


def _padded(rows: Float32, block: int) -> Float32:
    columns = rows.shape[1]
    return np.pad(rows, ((0, 0), (0, -columns % block))) if columns % block else rows


def _rounded(rows: Float32, format: Format) -> Blocks:
    n, zero = rows.shape[0], 2 ** (format.bits - 1)
    blocks = rows.reshape(n, -1, format.block)
    largest, smallest = blocks.max(axis=-1), blocks.min(axis=-1)
    scales = np.where(largest > -smallest, largest, smallest) / np.float32(-zero)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = blocks * inverse[..., None]
    np.rint(codes, out=codes)
    codes += np.float32(zero)
    np.clip(codes, 0, 2 * zero - 1, out=codes)
    return Blocks(format, codes.astype(np.uint8).reshape(n, -1), scales)


def dequantise(blocks: Blocks, columns: int) -> Float32:
    """The float32 values [n, columns] that `blocks` stand for; padding at the end of a row is cut off."""
    n = blocks.codes.shape[0]
    values = blocks.codes.reshape(n, -1, blocks.format.block).astype(np.float32)
    zeros = np.float32(2 ** (blocks.format.bits - 1)) if blocks.zeros is None else blocks.zeros[..., None]
    values -= zeros
    values *= blocks.scales[..., None]
    if blocks.offsets is not None:
        values += blocks.offsets[..., None]
    return values.reshape(n, -1)[:, :columns]


def pack(codes: UInt8, bits: int) -> UInt8:
    """Codes or zero points as MatMulNBits stores them, [n, ceil(columns * bits / 8)]; of two 4-bit codes the first is
    the low nibble."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    high = np.left_shift(codes[:, 1::2], np.uint8(4))
    return np.bitwise_or(codes[:, 0::2], high)


def round_scales(blocks: Blocks, dtype: npt.DTypeLike) -> Blocks:
    """The same codes with scales and offsets as they survive being stored in `dtype`, that of the activations."""
    if np.dtype(dtype) == np.float32:
        return blocks

    def rounded(values: Float32) -> Float32:
        with np.errstate(over="ignore"):  # the writer looks for infinity
            return values.astype(dtype).astype(np.float32)

    offsets = None if blocks.offsets is None else rounded(blocks.offsets)
    return replace(blocks, scales=rounded(blocks.scales), offsets=offsets)


def blocks_of(tensor: SourceTensor, format: Format) -> Reader:
    """How rows of `tensor` become blocks of `format`: the checkpoint's own codes where it has them, else
    round-to-nearest.
    """
    if tensor.blocks is not None and tensor.keeps_own(format):
        return tensor.blocks
    return lambda start, stop: quantise(tensor.read(start, stop), format)


def stored_values(tensor: SourceTensor, format: Format, start: int, stop: int, scale_dtype: npt.DTypeLike) -> Float32:
    """Rows [start, stop) as float32, columns in their natural order, exactly as a bundle that stores them in `format`
    computes with them.
    """
    if format.quantised:
        blocks = round_scales(blocks_of(tensor, format)(start, stop), scale_dtype)
        values = dequantise(blocks, tensor.shape[1])
        order = tensor.order_in(format)
        return values if order is None else values[:, np.argsort(order)]
    rows = tensor.read(start, stop)
    return rows if format == FP32 else to_dense(rows, format).astype(np.float32)


DENSE: Mapping[Format, np.dtype[np.generic]] = {
    FP32: np.dtype(np.float32),
    FP16: np.dtype(np.float16),
    BF16: np.dtype(ml_dtypes.bfloat16),
}
"""Floating-point formats and the dtype of their values."""


def dense_format(dtype: npt.DTypeLike) -> Format:
    """The format whose values are of `dtype`."""
    return next(format for format, found in DENSE.items() if found == dtype)


def to_dense(rows: Float32, format: Format) -> npt.NDArray[np.generic]:
    """`rows` in the floating-point `format`, rounded to nearest even; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return rows.astype(DENSE[format], copy=False)
