"""Codes of quantised matrices as they lie in a work folder, and the tensors that are read from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...optimize.formats import Format
from ...optimize.quantise import dequantise, pack
from ...optimize.tensors import Blocks, Float32, SourceTensor, UInt8
from ..safetensors_file import StoredTensor
from .work import Arrays

CODES, SCALES, ZEROS = "codes", "scales", "zeros"


def arrays_of(name: str, blocks: Blocks) -> Arrays:
    """What is kept of a matrix: codes packed as kernels read them, scales float32, and zero points one a byte."""
    assert blocks.offsets is None
    arrays: Arrays = {f"{name}.{CODES}": pack(blocks.codes, blocks.format.bits), f"{name}.{SCALES}": blocks.scales}
    return arrays if blocks.zeros is None else {**arrays, f"{name}.{ZEROS}": blocks.zeros}


def fits(kept: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], format: Format) -> bool:
    """Whether there are codes of a matrix of this shape in this format."""
    rows, columns = shape
    wanted = {
        CODES: ("U8", (rows, format.padded(columns) * format.bits // 8)),
        SCALES: ("F32", (rows, format.blocks(columns))),
        **({ZEROS: ("U8", (rows, format.blocks(columns)))} if format.zeros else {}),
    }
    found = {part: kept.get(f"{name}.{part}") for part in wanted}
    return all(one is not None and (one.dtype, one.shape) == wanted[part] for part, one in found.items())


def kept_blocks(kept: Mapping[str, StoredTensor], name: str, format: Format, start: int, stop: int) -> Blocks:
    """Rows [start, stop) of a matrix."""
    codes = _unpacked(kept[f"{name}.{CODES}"].array(start, stop), format.bits)
    zeros = kept[f"{name}.{ZEROS}"].array(start, stop) if format.zeros else None
    return Blocks(format, codes, kept[f"{name}.{SCALES}"].array(start, stop), zeros)


def kept_tensor(
    kept: Mapping[str, StoredTensor], tensor: SourceTensor, format: Format, told: str, scaled: SourceTensor | None
) -> SourceTensor:
    """A tensor of the same name whose codes are those that were kept. told: its type, for people; scaled: see
    `SourceTensor`.
    """

    def blocks(start: int, stop: int) -> Blocks:
        return kept_blocks(kept, tensor.name, format, start, stop)

    def read(start: int, stop: int) -> Float32:
        return dequantise(blocks(start, stop), tensor.shape[1])

    return replace(tensor, dtype=told, format=format, read=read, blocks=blocks, order=None, scaled=scaled)


def _unpacked(packed: UInt8, bits: int) -> UInt8:
    """The inverse of `quantise.pack`, where rows have an even number of codes."""
    if bits == 8:
        return packed
    codes = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes
