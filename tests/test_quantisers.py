"""The quantisers on one matrix: what they lose, what they keep, and what they do with odd numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from llama_export.optimize.equivalence import Seam
from llama_export.optimize.formats import BLOCKS, Format, int_format
from llama_export.optimize.quantise import dequantise, quantise
from llama_export.optimize.quantisers.equalise import Sizes, column_sizes, equalised, read_sizes
from llama_export.optimize.quantisers.gptq import correction, gptq, inputs_of
from llama_export.optimize.quantisers.search import search
from llama_export.optimize.tensors import Blocks, Float32

FORMATS = [
    *(
        int_format(4, block, zeros=zeros, half=half)
        for block in (16, 32, 128)
        for zeros in (False, True)
        for half in (False, True)
    ),
    *(replace(int_format(bits), positive=True) for bits in (4, 8)),
    int_format(8, 64, zeros=True, half=True),
]
COLUMNS = (64, 100, 256)


def matrix(rows: int, columns: int, seed: int = 0) -> Float32:
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((rows, columns)) * np.exp(draw.standard_normal(columns))).astype(np.float32)


def inputs(columns: int, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """Correlated, some channels much larger than others: [tokens, columns]."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    return mixed * torch.exp(torch.randn(columns, generator=draw))


def check_blocks(blocks: Blocks, format: Format, rows: int, columns: int) -> None:
    """The numbers are such as the writer takes."""
    assert blocks.format == format
    assert blocks.codes.shape == (rows, format.padded(columns))
    assert blocks.codes.dtype == np.uint8
    assert blocks.codes.max() < 2**format.bits
    assert blocks.scales.shape == (rows, format.blocks(columns))
    assert (blocks.zeros is not None) == format.zeros
    assert np.isfinite(blocks.scales).all()
    if format.positive:
        assert (blocks.scales > 0).all()
    if format.half:
        assert (blocks.scales == blocks.scales.astype(np.float16)).all()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}{'+' * format.positive}")
def test_search_loses_less_than_rounding_to_nearest(format: Format, columns: int) -> None:
    rows = matrix(37, columns)
    importance = inputs(columns).square().mean(0).numpy()

    def lost(blocks: Blocks, counts: Float32) -> float:
        return float((counts * (dequantise(blocks, columns).astype(np.float64) - rows) ** 2).sum())

    nearest = quantise(rows, format)
    for counts, found in (
        (np.ones(columns, np.float32), search(rows, format)),
        (importance, search(rows, format, importance)),
    ):
        check_blocks(found, format, 37, columns)
        assert lost(found, counts) < (0.97 if format.bits == 4 else 1.0) * lost(nearest, counts)
    assert lost(search(rows, format, importance), importance) < lost(search(rows, format), importance)


def test_no_scale_nearby_is_better_for_the_codes_that_were_found() -> None:
    rows, format = matrix(40, 128), int_format(4, zeros=True)
    found = search(rows, format)

    def lost(blocks: Blocks) -> float:
        return float(((dequantise(blocks, 128) - rows) ** 2).sum())

    for factor in (0.95, 0.98, 1.02, 1.05):
        assert lost(replace(found, scales=found.scales * np.float32(factor))) > lost(found)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}{'+' * format.positive}")
def test_odd_blocks_become_what_rounding_makes_of_them(format: Format) -> None:
    rows = matrix(6, 256)
    rows[0] = 0
    rows[1, : format.block] = 0
    rows[2] = 3.0
    rows[3] = -2.5
    rows[4] = 1e-30
    found = search(rows, format, np.zeros(256, np.float32))  # nothing counts: nothing can be searched for
    check_blocks(found, format, 6, 256)
    assert (dequantise(found, 256) == dequantise(quantise(rows, format), 256)).all()
    found = search(rows, format)
    check_blocks(found, format, 6, 256)
    values = dequantise(found, 256)
    assert (values[0] == 0).all()
    assert (values[1, : format.block] == 0).all()
    assert np.allclose(values[2:4], rows[2:4], rtol=0.01)


def test_what_is_no_block_of_integers_is_rounded_to_nearest() -> None:
    rows, format = matrix(3, 64), int_format(8)
    whole = Format("int8-row", 8, whole=True, positive=True)
    assert (search(rows, whole).codes == quantise(rows, whole).codes).all()
    rows[1, 5] = np.nan
    assert not np.isfinite(dequantise(search(rows, format), 64)).all(), "the writer has to see it"


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}{'+' * format.positive}")
def test_gptq_changes_the_product_less_than_search(format: Format, columns: int) -> None:
    weight, read = torch.from_numpy(matrix(29, columns)), inputs(columns)
    hessian = read.T @ read / len(read)
    before = weight.clone()
    found = gptq(weight, inputs_of(hessian, format.padded(columns)), format)
    check_blocks(found, format, 29, columns)
    assert torch.equal(weight, before)

    def lost(blocks: Blocks) -> float:
        return float(((torch.from_numpy(dequantise(blocks, columns)) - weight) @ read.T).square().sum())

    assert lost(found) < 0.9 * lost(search(weight.numpy(), format, hessian.diagonal().numpy()))


def test_more_rounds_lose_no_more() -> None:
    weight, read, format = torch.from_numpy(matrix(29, 96)), inputs(96), int_format(4, zeros=True)
    given = inputs_of(read.T @ read / len(read), 96)

    def lost(rounds: int) -> float:
        change = torch.from_numpy(dequantise(gptq(weight, given, format, rounds=rounds), 96)) - weight
        return float(((change @ given.hessian) * change).sum())

    found = [lost(rounds) for rounds in (0, 1, 2)]
    assert found[0] > found[1] >= found[2] * (1 - 1e-6)


@pytest.mark.parametrize(
    "hessian", [torch.zeros(64, 64), torch.ones(64, 64), torch.eye(64) * 1e-30], ids=["zero", "one", "tiny"]
)
def test_inputs_that_tell_little_are_no_obstacle(hessian: torch.Tensor) -> None:
    format = int_format(4, zeros=True)
    found = gptq(torch.from_numpy(matrix(5, 64)), inputs_of(hessian, 64), format)
    check_blocks(found, format, 5, 64)
    lost = np.abs(dequantise(found, 64) - matrix(5, 64)).max()
    assert lost < 2 * np.abs(dequantise(quantise(matrix(5, 64), format), 64) - matrix(5, 64)).max()


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}{'+' * format.positive}")
def test_blocks_of_zeros_stay_zeros_and_disturb_no_other(format: Format) -> None:
    columns = 3 * format.block + 5
    values, read = matrix(7, columns), inputs(columns)
    dead = [*range(format.block, 2 * format.block), *range(3 * format.block, columns)]
    values[:, dead], read[:, dead], values[4] = 0, 0, 0
    found = gptq(torch.from_numpy(values), inputs_of(read.T @ read / len(read), format.padded(columns)), format)
    check_blocks(found, format, 7, columns)
    stored = dequantise(found, columns)
    assert (stored[:, dead] == 0).all()
    assert (stored[4] == 0).all()

    def lost(blocks: Blocks) -> float:
        return float(((torch.from_numpy(dequantise(blocks, columns) - values)) @ read.T).square().sum())

    assert lost(found) < lost(quantise(values, format))


def test_the_correction_makes_up_for_wrong_inputs() -> None:
    original = inputs(48)
    read = original + 0.3 * torch.randn(original.shape, generator=torch.Generator().manual_seed(5)) * original.std(0)
    hessian, cross = read.T @ read / len(read), read.T @ original / len(read)
    weight = torch.from_numpy(matrix(7, 48))

    def lost(share: float) -> float:
        return float((read @ (weight @ correction(hessian, cross, share)).T - original @ weight.T).square().mean())

    assert lost(1.0) < lost(0.5) < lost(0.0)
    assert torch.allclose(correction(hessian, hessian), torch.eye(48), atol=1e-3), "right inputs ask for no correction"


def sizes_after(seam: Seam, weights: dict[str, torch.Tensor], read: torch.Tensor, factors: Float32) -> Sizes:
    columns = torch.from_numpy(seam.columns(factors))
    moved = {name: weight * columns for name, weight in weights.items()}
    return Sizes(column_sizes(seam, moved), read_sizes(seam, (read / columns).square().mean(0)))


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_equalised_columns_are_alike(times: int, bits: int) -> None:
    seam = Seam(("v",), ("o", "p"), 8, 4, times)
    weights = {"o": torch.from_numpy(matrix(20, 8 * times)), "p": torch.from_numpy(matrix(9, 8 * times, 4))}
    read = inputs(8 * times)
    unused = [2 + 4 * time for time in range(times)]
    for weight in weights.values():
        weight[:, unused] = 0
    sizes = Sizes(column_sizes(seam, weights), read_sizes(seam, read.square().mean(0)))
    factors = equalised(sizes, [int_format(8), int_format(bits)])
    assert factors.shape == (8,)
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    assert factors[2] == 1
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-5)
    after = sizes_after(seam, weights, read, factors)
    used = sizes.columns > 0
    alike = after.columns if bits == 4 else after.columns / after.read
    assert torch.allclose(alike[used], alike[used].mean(), rtol=1e-4)


def test_channels_are_moved_only_so_far() -> None:
    sizes = Sizes(torch.tensor([1e-9, 1.0, 1.0, 1e9], dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    factors = equalised(sizes, [int_format(4)])
    assert factors.max() / factors.min() <= 2.0**20
    assert (equalised(Sizes(torch.zeros(4), torch.zeros(4)), [int_format(4)]) == 1).all()


def test_blocks_of_every_size() -> None:
    for block in BLOCKS:
        check_blocks(search(matrix(3, 300), int_format(4, block, zeros=True)), int_format(4, block, zeros=True), 3, 300)
