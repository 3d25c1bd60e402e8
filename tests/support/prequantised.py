"""Quantised checkpoints, written by the definition of each format: number by number, with Python's own integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from support.hf_models import random_weights, write_json, write_llama_folder

FLOATS: Mapping[str, Any] = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
Parts = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix of small numbers. codes: [rows, columns]; zeros, scales: [rows, groups]; groups: [columns], of each."""

    bits: int
    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    def values(self) -> np.ndarray:
        """The weight, in float32."""
        scales = self.scales.astype(np.float32)[:, self.groups]
        return scales * (self.codes - self.zeros[:, self.groups]).astype(np.float32)


def quantised(
    weight: np.ndarray, bits: int, group: int, *, symmetric: bool, shuffled: bool = False, scales: str = "F16"
) -> Quantised:
    """Round to nearest. group: -1 for one a row; shuffled: columns of a group are anywhere, the same for equal widths.

    The largest and the smallest zero points occur, and the scale 0.
    """
    rows, columns = weight.shape
    size = columns if group == -1 else group
    groups = np.arange(columns) // size
    if shuffled:
        groups = np.random.default_rng(columns).permutation(groups)
    low, high = np.zeros((2, rows, groups.max() + 1), np.float32)
    for index in range(groups.max() + 1):
        part = weight[:, groups == index]
        low[:, index], high[:, index] = part.min(axis=1), part.max(axis=1)
    most = 2**bits - 1
    if symmetric:
        high = np.maximum(-low, high)
        zeros, scale = np.full(low.shape, 2 ** (bits - 1)), 2 * high / most
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        low[0], high[1], low[2], high[2] = 0, 0, 0, 0
        scale = (high - low) / most
        zeros = np.rint(-low / np.maximum(scale, 1e-9)).astype(int)
    scale = scale.astype(FLOATS[scales])
    divisor = np.maximum(scale.astype(np.float32), 1e-9)[:, groups]
    codes = np.clip(np.rint(weight / divisor) + zeros[:, groups], 0, most).astype(int)
    return Quantised(bits, codes, zeros, scale, groups)


def packed(numbers: Sequence[int] | np.ndarray, bits: int) -> np.ndarray:
    """The numbers as one stream of bits in int32 words, the first in the lowest bits."""
    stream = sum(int(number) << (bits * place) for place, number in enumerate(numbers))
    words = -(-len(numbers) * bits // 32)
    return np.frombuffer(stream.to_bytes(words * 4, "little"), "<i4")


def gptq_parts(matrix: Quantised, *, v2: bool = False, g_idx: bool = True) -> Parts:
    """As AutoGPTQ stores them; of version 1 with zero points less one, which GPTQModel subtracts from whole words."""
    if v2 or matrix.bits == 3:
        points = matrix.zeros.T if v2 else (matrix.zeros.T - 1) % 8
        zeros = np.stack([packed(row, matrix.bits) for row in points])
    else:
        ones = sum(1 << place for place in range(0, 32, matrix.bits))
        words = np.stack([packed(row, matrix.bits) for row in matrix.zeros.T]).astype(np.int64)
        zeros = ((words - ones) % 2**32).astype(np.uint32).view(np.int32)
    parts = {
        "qweight": np.stack([packed(row, matrix.bits) for row in matrix.codes], axis=1),
        "qzeros": zeros,
        "scales": matrix.scales.T,
        "g_idx": matrix.groups.astype(np.int32),
    }
    return parts if g_idx else {name: part for name, part in parts.items() if name != "g_idx"}


def _awq_words(numbers: np.ndarray) -> np.ndarray:
    """Eight by eight, shuffled as AutoAWQ does."""
    return np.concatenate(
        [
            packed([numbers[start + place] for place in (0, 2, 4, 6, 1, 3, 5, 7)], 4)
            for start in range(0, len(numbers), 8)
        ]
    )


def awq_parts(matrix: Quantised) -> Parts:
    """As `WQLinear_GEMM` stores them."""
    return {
        "qweight": np.stack([_awq_words(column) for column in matrix.codes.T]),
        "qzeros": np.stack([_awq_words(group) for group in matrix.zeros.T]),
        "scales": matrix.scales.T,
    }


def awq_gemv_parts(matrix: Quantised) -> Parts:
    """As `WQLinear_GEMV` stores them: rows of zero points and scales padded, the more the smaller the group is."""
    rows, groups = matrix.zeros.shape
    size = int((matrix.groups == 0).sum())
    multiple = {64: 2, 32: 4}.get(size, 1)
    words = -(-groups // 8 // multiple) * multiple or multiple
    points = np.zeros((rows, words * 8), int)
    points[:, :groups] = matrix.zeros
    scales = np.zeros((rows, words * 8), matrix.scales.dtype)
    scales[:, :groups] = matrix.scales
    return {
        "qweight": np.stack([packed(row, 4) for row in matrix.codes]),
        "qzeros": np.stack([packed(row, 4) for row in points]),
        "scales": scales,
    }


def compressed_parts(matrix: Quantised, *, symmetric: bool, g_idx: bool = False) -> Parts:
    """As compressed-tensors' pack-quantized stores them."""
    parts = {
        "weight_packed": np.stack([packed(row, matrix.bits) for row in matrix.codes]),
        "weight_scale": matrix.scales,
        "weight_shape": np.array(matrix.codes.shape, np.int64),
    }
    if not symmetric:
        parts["weight_zero_point"] = np.stack([packed(column, matrix.bits) for column in matrix.zeros.T], axis=1)
    if g_idx:
        parts["weight_g_idx"] = matrix.groups.astype(np.int32)
    return parts


def byte_parts(matrix: Quantised, *, symmetric: bool) -> Parts:
    """As compressed-tensors' int-quantized stores them."""
    middle = 2 ** (matrix.bits - 1)
    parts = {"weight": (matrix.codes - middle).astype(np.int8), "weight_scale": matrix.scales}
    return parts if symmetric else {**parts, "weight_zero_point": (matrix.zeros - middle).astype(np.int8)}


def write_prequantised(
    path: Path,
    settings: Mapping[str, Any],
    quantise: Callable[[str, np.ndarray], Quantised],
    parts_of: Callable[[Quantised], Parts],
    *,
    dense: str = "F16",
    keep: Sequence[str] = (),
    extra: Mapping[str, np.ndarray] | None = None,
    **llama: Any,
) -> dict[str, Quantised | np.ndarray]:
    """Write a checkpoint whose projections are quantised, but for those with a name in `keep`; the rest is `dense`.

    Returns what was stored by the weight's name: a Quantised, or the dense values in float32.
    """
    write_llama_folder(path, **llama)
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "quantization_config": dict(settings)})
    stored: Parts = {}
    contents: dict[str, Quantised | np.ndarray] = {}
    for name, values in random_weights(config).items():
        if "_proj.weight" in name and not any(kept in name for kept in keep):
            matrix = quantise(name, values)
            contents[name] = matrix
            stored |= {name.removesuffix("weight") + part: found for part, found in parts_of(matrix).items()}
        else:
            stored[name] = values.astype(FLOATS[dense])
            contents[name] = stored[name].astype(np.float32)
    stored |= extra or {}
    save_file({name: np.ascontiguousarray(part) for name, part in stored.items()}, path / "model.safetensors")
    return contents


def values_of(content: Quantised | np.ndarray) -> np.ndarray:
    """The float32 values of what `write_prequantised` stored."""
    return content.values() if isinstance(content, Quantised) else content
