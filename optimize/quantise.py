"""Numbers to codes and back: round-to-nearest in blocks, and the bytes that the kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .formats import BF16, FP16, FP32, Coding, Format
from .tensors import Blocks, Float32, SourceTensor, UInt8

Reader = Callable[[int, int], Blocks]


def quantise(rows: Float32, format: Format, largest: float = 0.0) -> Blocks:
    """Round `rows` [n, columns] to nearest in `format`, one scale for each block (the last one is padded) or row.

    Integers: the scale maps the value of largest magnitude, sign included, to the most negative code, which uses the
    whole range [-2^(bits-1), 2^(bits-1)) and loses less than scaling to the positive end (the choice of GGUF's Q4_0 and
    of ONNX Runtime's symmetric quantiser). Where scales must be positive, it is the least that reaches both ends. With
    zero points the codes reach from the least to the largest value, or to 0 where that lies beyond, since 0 has a code
    of its own. Scales that are stored as float16 are rounded first, and codes made for what they became. E4M3 and
    E2M1: the largest magnitude becomes the largest number. A block of zeros has the codes of zero.

    largest: magnitude of the whole tensor, which formats with a scale of the tensor need: it becomes 448 * 6, as in
    NVIDIA's NVFP4 recipe (arXiv:2509.25149).
    """
    assert not format.offsets, f"{format.name} is for weights that come quantised"
    columns = rows.shape[1]
    padded = np.pad(rows, ((0, 0), (0, format.padded(columns) - columns))) if format.padded(columns) > columns else rows
    blocks = padded.reshape(len(rows), format.blocks(columns), -1)
    # NaN and infinity make scales that are not finite, which the writer looks for; no warning is needed on the way.
    with np.errstate(invalid="ignore", over="ignore"):
        return above_zero(_rounded(blocks, format) if format.coding == "int" else _floats(blocks, format, largest))


def _rounded(blocks: Float32, format: Format) -> Blocks:
    zero = 2 ** (format.bits - 1)
    largest, smallest = blocks.max(axis=-1), blocks.min(axis=-1)
    if format.zeros:
        smallest = np.minimum(smallest, np.float32(0))
        scales = (np.maximum(largest, np.float32(0)) - smallest) / np.float32(2 * zero - 1)
    elif format.positive:
        scales = np.maximum(largest / np.float32(zero - 1), smallest / np.float32(-zero))
    else:
        scales = np.where(largest > -smallest, largest, smallest) / np.float32(-zero)
    if format.half:
        halves = half_scales(scales)
        scales = np.where(np.isfinite(halves), halves, scales)  # the writer tells of what does not fit
    inverse = _inverse(scales)
    points = np.clip(np.rint(-smallest * inverse), 0, 2 * zero - 1) if format.zeros else None
    codes = blocks * inverse[..., None]
    np.rint(codes, out=codes)
    codes += np.float32(zero) if points is None else points[..., None]
    np.clip(codes, 0, 2 * zero - 1, out=codes)
    zeros = None if points is None else points.astype(np.uint8)
    return Blocks(format, codes.astype(np.uint8).reshape(len(blocks), -1), scales, zeros)


_LEAST_NORMAL = np.float32(2.0**-14)


def half_scales(scales: Float32) -> Float32:
    """Scales as float16 holds them: to nearest, and away from 0 below its normal range, so that none becomes 0 and the
    codes still reach as far; infinite above 65504.
    """
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    short = (np.abs(scales) < _LEAST_NORMAL) & (np.abs(halves.astype(np.float32)) < np.abs(scales))
    if short.any():
        halves = np.where(
            short, np.nextafter(halves, np.copysign(np.float16(np.inf), scales).astype(np.float16)), halves
        )
    return halves.astype(np.float32)


def _floats(blocks: Float32, format: Format, largest: float) -> Blocks:
    most, dtype = np.float32(MOST[format.coding]), np.dtype(_CODED[format.coding])
    scales, unit = np.maximum(blocks.max(axis=-1), -blocks.min(axis=-1)) / most, np.float32(1)
    if format.tensor_scale:
        unit = np.float32(largest / (MOST["fp8"] * MOST["fp4"])) or unit
        units = np.where(np.isfinite(scales), np.minimum(scales / unit, np.float32(MOST["fp8"])), np.float32(np.nan))
        scales = units.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = blocks * _inverse(scales * unit)[..., None]
    np.clip(values, -most, most, out=values)
    codes = values.astype(dtype).view(np.uint8).reshape(len(blocks), -1)
    return Blocks(format, codes, scales, unit=float(unit))


def _inverse(scales: Float32) -> Float32:
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


def above_zero(blocks: Blocks) -> Blocks:
    """The same values where a scale of 0 may not be: the codes of zero, scaled by 1."""
    none = blocks.scales == 0
    if not blocks.format.positive or not none.any():
        return blocks
    zero = 2 ** (blocks.format.bits - 1) if blocks.format.coding == "int" else 0
    codes = blocks.codes.reshape(*none.shape, -1)
    codes = np.where(none[..., None], np.uint8(zero), codes).reshape(blocks.codes.shape)
    return replace(blocks, codes=codes, scales=np.where(none, np.float32(1), blocks.scales))


def dequantise(blocks: Blocks, columns: int) -> Float32:
    """The float32 values [n, columns] that `blocks` stand for; padding at the end of a row is cut off."""
    n, count = blocks.scales.shape
    codes = blocks.codes.reshape(n, count, -1)
    if blocks.format.coding == "int":
        values = codes.astype(np.float32)
        values -= np.float32(2 ** (blocks.format.bits - 1)) if blocks.zeros is None else blocks.zeros[..., None]
    else:
        values = _NUMBERS[blocks.format.coding][codes]
    values *= (blocks.scales * np.float32(blocks.unit))[..., None]
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
    """The same codes with scales and offsets as they survive being stored: in float16 where the format says so, else in
    `dtype`, that of the activations; scales of a format that has a type of its own for them stay.
    """
    half = blocks.format.half
    if (np.dtype(dtype) == np.float32 and not half) or blocks.format.tensor_scale:
        return blocks

    def rounded(values: Float32) -> Float32:
        with np.errstate(over="ignore"):  # the writer looks for infinity
            return values.astype(np.float16 if half else dtype).astype(np.float32)

    offsets = None if blocks.offsets is None else rounded(blocks.offsets)
    scales = half_scales(blocks.scales) if half else rounded(blocks.scales)
    return above_zero(replace(blocks, scales=scales, offsets=offsets))


def converted(blocks: Blocks, format: Format) -> Blocks:
    """The same values in a format that takes these codes: zero points become offsets, and negative scales positive.

    w = s * (c - z) + o is s * (c - m) + (o + s * (m - z)), m the middle code; and for s < 0, with the codes mirrored,
    c' = 2m - 1 - c, it is -s * (c' - m) + (o - s). Without offsets the mirror is c' = 2m - c, which has no code for
    c = 0: such blocks are counted as rounded.
    """
    middle = 2 ** (format.bits - 1)
    codes, scales, offsets, rounded = blocks.codes, blocks.scales, blocks.offsets, blocks.rounded
    if offsets is None and format.offsets:
        offsets = np.zeros_like(scales)
    zeros = blocks.zeros
    if zeros is not None and not format.zeros:
        assert offsets is not None
        offsets, zeros = offsets + scales * (np.float32(middle) - zeros.astype(np.float32)), None
    mirrored = scales < 0
    if format.positive and mirrored.any():
        assert zeros is None
        by_block = codes.reshape(*scales.shape, -1)
        if offsets is None:
            rounded += int(np.count_nonzero(mirrored & (by_block == 0).any(axis=-1)))
            mirror = np.minimum(2 * middle - by_block.astype(np.int16), 2 * middle - 1).astype(np.uint8)
        else:
            offsets = np.where(mirrored, offsets - scales, offsets)
            mirror = np.uint8(2 * middle - 1) - by_block
        codes = np.where(mirrored[..., None], mirror, by_block).reshape(codes.shape)
        scales = np.abs(scales)
    return above_zero(Blocks(format, codes, scales, zeros, offsets, rounded))


def blocks_of(tensor: SourceTensor, format: Format, rows: Float32 | None = None) -> Reader:
    """How rows of `tensor` become blocks of `format`: the checkpoint's own codes where it has them, else
    round-to-nearest. rows: those that will be asked for, where they have been read.
    """
    if tensor.blocks is None or not tensor.keeps_own(format):
        largest = tensor.largest if format.tensor_scale else 0.0
        return lambda start, stop: quantise(tensor.read(start, stop) if rows is None else rows, format, largest)
    own = tensor.blocks
    return own if format == tensor.format else lambda start, stop: converted(own(start, stop), format)


def stored_values(
    tensor: SourceTensor,
    format: Format,
    start: int,
    stop: int,
    scale_dtype: npt.DTypeLike,
    rows: Float32 | None = None,
) -> Float32:
    """Rows [start, stop) as float32, columns in their natural order, exactly as a bundle that stores them in `format`
    computes with them. rows: `tensor.read(start, stop)`, where that has been done; left as they are.
    """
    if format.quantised:
        blocks = round_scales(blocks_of(tensor, format, rows)(start, stop), scale_dtype)
        values = dequantise(blocks, tensor.shape[1])
        order = tensor.order_in(format)
        return values if order is None else values[:, np.argsort(order)]
    rows = tensor.read(start, stop) if rows is None else rows
    return rows if format == FP32 else to_dense(rows, format).astype(np.float32)


_CODED: Mapping[Coding, npt.DTypeLike] = {"fp8": ml_dtypes.float8_e4m3fn, "fp4": ml_dtypes.float4_e2m1fn}
MOST: Mapping[Coding, float] = {coding: float(ml_dtypes.finfo(dtype).max) for coding, dtype in _CODED.items()}
"""The largest number that a code of each kind stands for."""

_NUMBERS: Mapping[Coding, Float32] = {
    "fp8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "fp4": np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32),
}

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
