"""Every GGUF block type, decoded: the values are the gguf package's, and the stored blocks have the same values."""

from __future__ import annotations

import re
import time
import tracemalloc
from pathlib import Path

import gguf
import llama_export
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from llama_export.export.gguf.blocks import ENCODINGS, FORMATS, decode_blocks, decode_values
from llama_export.export.gguf.encoding import NotFiniteError
from llama_export.optimize.formats import BLOCKS, format_named, stored_bytes
from llama_export.optimize.quantise import dequantise
from llama_export.optimize.tensors import UInt8

ROWS, COLUMNS = 37, 1536
SHIFTED = ("Q4_1", "Q4_K")
"""Types whose offset is a sum, which float32 may have to round."""
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
}
"""Where a block has its numbers of half precision."""
INFINITE = {**HALVES, "IQ1_M": (48,), "MXFP4": (0,)}


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype == np.float32 and np.array_equal(left.view(np.uint32), right.view(np.uint32))


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def any_halves(generator: np.random.Generator, count: int, largest: float = 65504.0) -> np.ndarray:
    """Return fp16 numbers of all magnitudes up to `largest`, subnormal ones too, of both signs."""
    numbers = generator.integers(0, 1 << 16, count, dtype=np.uint16)
    numbers[: count // 8] &= 0x83FF  # subnormal
    numbers[numbers & 0x7C00 == 0x7C00] &= 0x83FF  # not infinite, not NaN
    halves = numbers.view(np.float16)
    return np.where(np.abs(halves) <= largest, halves, np.fmod(halves, np.float16(largest))).astype("<f2")


def any_blocks(
    name: str, *, largest: float = 65504.0, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0
) -> UInt8:
    """Return rows of random blocks of every magnitude: uint8 [rows, bytes]."""
    block, size = gguf.GGML_QUANT_SIZES[kind_of(name)]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        blocks[:, at : at + 2] = any_halves(generator, len(blocks), largest)[:, None].view(np.uint8)
    if name == "IQ1_M":
        blocks[:, 55] &= 0xAF  # the top digit of the half
    if name == "MXFP4":
        blocks[:, 0] = generator.integers(0, 253, len(blocks))
    return blocks.reshape(rows, -1)


def test_every_type_that_the_gguf_package_knows_is_known() -> None:
    known = {kind.name for kind in gguf.GGMLQuantizationType if can_dequantise(kind)}
    assert set(FORMATS) == known
    assert set(ENCODINGS) == known - {"F32", "F16", "BF16"}


def can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1] * 8), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("name", ENCODINGS)
def test_layouts_have_the_size_of_ggml(name: str) -> None:
    columns, size = gguf.GGML_QUANT_SIZES[kind_of(name)]
    encoding = ENCODINGS[name]
    assert encoding.layout.itemsize == size
    assert encoding.format.block in BLOCKS
    assert columns % encoding.format.block == 0
    assert format_named(encoding.format.name) == encoding.format


@pytest.mark.parametrize("name", ENCODINGS)
def test_values_are_those_of_the_gguf_package_bit_for_bit(name: str) -> None:
    rows = any_blocks(name)
    stored = dequantize(rows, kind_of(name)).astype(np.float32)
    assert np.isfinite(stored).all()
    assert same_bits(decode_values(name, rows), stored)


@pytest.mark.parametrize("name", ENCODINGS)
def test_blocks_have_the_same_values(name: str) -> None:
    # Offsets of at most about 1, as in every trained model, are exact.
    rows = any_blocks(name, largest=2.0**-11 if name in SHIFTED else 65504.0, seed=1)
    stored = dequantize(rows, kind_of(name)).astype(np.float32)
    blocks = decode_blocks(name, rows)
    format = FORMATS[name]
    assert blocks.format == format
    assert blocks.codes.shape == (ROWS, COLUMNS)
    assert blocks.codes.dtype == np.uint8
    assert blocks.codes.max() < 2**format.bits
    assert blocks.scales.shape == (ROWS, COLUMNS // format.block)
    assert blocks.scales.dtype == np.float32
    assert (blocks.offsets is not None) == format.offsets
    assert blocks.zeros is None
    assert blocks.rounded == 0
    assert np.array_equal(dequantise(blocks, COLUMNS), stored)


@pytest.mark.parametrize("name", SHIFTED)
def test_blocks_whose_offset_is_rounded_are_counted(name: str) -> None:
    rows = any_blocks(name, rows=4000, columns=256, seed=2)
    stored = dequantize(rows, kind_of(name)).astype(np.float32)
    blocks = decode_blocks(name, rows)
    assert blocks.offsets is not None
    values = dequantise(blocks, 256)
    differs = (values != stored).reshape(*blocks.offsets.shape, -1).any(axis=-1)
    near = np.abs(blocks.offsets) <= 1
    assert not differs[near].any()
    assert near.sum() > 1000
    assert 0 < differs.sum() <= blocks.rounded < near.size  # a rounding may fall on weights that are rounded alike
    assert decode_blocks(name, rows[7:90]).rounded >= differs[7:90].sum()
    unit = np.spacing(np.maximum(np.abs(stored), np.abs(np.repeat(blocks.offsets, 32, axis=1))))
    assert (np.abs(values - stored) <= unit).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"])
def test_quantised_weights_come_back(name: str) -> None:
    weights = (np.random.default_rng(3).standard_normal((5, 512)) / 20).astype(np.float32)
    rows = quantize(weights, kind_of(name))
    assert same_bits(decode_values(name, rows), dequantize(rows, kind_of(name)).astype(np.float32))
    assert np.array_equal(dequantise(decode_blocks(name, rows), 512), decode_values(name, rows))


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, places in INFINITE.items() for at in places])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_scales_that_are_not_finite_are_refused(name: str, at: int, value: float) -> None:
    rows = any_blocks(name, rows=1, seed=4)
    blocks = rows.reshape(-1, gguf.GGML_QUANT_SIZES[kind_of(name)][1])
    half = np.float16(value).view(np.uint16)
    if name == "IQ1_M":
        words = blocks[1, 48:].view("<u2")
        words[:] = words & 0x0FFF | np.array([(half >> 4 * digit & 15) << 12 for digit in range(4)], np.uint16)
    elif name == "MXFP4":
        blocks[1, at] = 255
    else:
        blocks[1, at : at + 2] = half[None].view(np.uint8)
    for decode in (decode_values, decode_blocks):
        with pytest.raises(NotFiniteError):
            decode(name, rows)


@pytest.mark.parametrize("name", ENCODINGS)
def test_any_bytes_are_decoded_or_refused(name: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind_of(name)]
    generator = np.random.default_rng(5)
    for _ in range(20):
        rows = generator.integers(0, 256, (2, 2 * size), dtype=np.uint8)
        try:
            values, blocks = decode_values(name, rows), decode_blocks(name, rows)
        except NotFiniteError:
            continue
        assert np.isfinite(values).all()
        assert np.isfinite(blocks.scales).all()
        assert values.shape == blocks.codes.shape == (2, 2 * block)


@pytest.mark.parametrize("name", ENCODINGS)
def test_decoding_takes_little_memory_and_time(name: str) -> None:
    rows = any_blocks(name, rows=64, columns=4096, seed=6)  # as many weights as are decoded at a time
    tracemalloc.start()
    begin = time.perf_counter()
    decode_blocks(name, rows)
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20
    assert seconds < 1


def test_the_document_tells_what_each_type_becomes() -> None:
    page = Path(llama_export.__file__).parent / "docs" / "models.md"
    rows = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| `([\w-]+)` \| ([\d.]+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    told = {name: (float(in_file), format, float(stored)) for name, in_file, format, stored in rows}
    sizes = {name: gguf.GGML_QUANT_SIZES[kind_of(name)] for name in FORMATS}
    assert told == {
        name: (size * 8 / block, FORMATS[name].name, stored_bytes((1, 256), FORMATS[name]) * 8 / 256)
        for name, (block, size) in sizes.items()
    }
