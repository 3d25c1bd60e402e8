"""Schemes of quantisation: what their formats mean, which graphs hold them, and what a target cannot run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from llama_export.export.rotary import rotary_tables
from llama_export.export.write import lay_out, refer, write_data
from llama_export.optimize.formats import EMBEDDING, Format, format_named, int_format, with_half
from llama_export.optimize.ort import OrtOptions, lower
from llama_export.optimize.quantise import dequantise, half_scales, quantise, round_scales, stored_values
from llama_export.optimize.tensors import Blocks
from llama_export.progress import Silent
from support.graphs import (
    VARIANTS,
    llama,
    logits_of,
    run_ort,
    session,
    source_tensors,
    traced_once,
    with_stored_weights,
)
from transformers import PreTrainedModel

CONTEXT = 64
INT4_ZEROS_HALF = int_format(4, zeros=True, half=True)


def rows(n: int, columns: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, columns)).astype(np.float32) + np.float32(shift)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("columns", [1, 31, 77, 128])
@pytest.mark.parametrize("block", [16, 32, 256])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [0.0, 3.0, -30.0])
def test_zero_points_round_within_half_a_step(shift: float, bits: int, block: int, columns: int, half: bool) -> None:
    values = rows(6, columns, shift=shift)
    format = int_format(bits, block, zeros=True, half=half)
    blocks = quantise(values, format)
    assert blocks.zeros is not None and blocks.zeros.dtype == np.uint8
    assert max(blocks.codes.max(), blocks.zeros.max()) < 2**bits
    error = np.abs(dequantise(blocks, columns) - values)
    steps = np.repeat(blocks.scales, block, axis=1)[:, :columns]
    # Both ends may lie half a step beyond the codes, as the zero point is rounded; float16 takes 2**-11 of the range.
    assert (error <= steps * (1.001 + half * 2 ** (bits - 11))).all()
    assert (error <= steps * 0.5001).mean() > (0.6 if columns == 1 or half else 0.9)


def test_zero_points_lose_less_than_a_middle_where_blocks_lie_aside() -> None:
    values = rows(50, 64, shift=1.0)

    def loss(format: Format) -> float:
        return float(np.square(dequantise(quantise(values, format), 64) - values).mean())

    assert loss(int_format(4, zeros=True)) < 0.8 * loss(int_format(4))


def test_zero_is_exact_and_blocks_of_zeros_stay_so() -> None:
    values = rows(20, 64, shift=2.0)
    values[:, ::3] = 0
    for format in (int_format(4, zeros=True), INT4_ZEROS_HALF, int_format(8, 16, zeros=True, half=True)):
        assert (dequantise(quantise(values, format), 64)[:, ::3] == 0).all()
        assert (dequantise(quantise(np.zeros((3, 64), np.float32), format), 64) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int4-zeros", "int4-zeros-f16", "int8-b16-f16", "int8-zeros-f16"])
@pytest.mark.filterwarnings("error")
def test_no_numbers_make_scales_that_are_none(name: str, bad: float) -> None:
    format = format_named(name)
    assert format is not None
    values = rows(2, 64)
    values[1, 40] = bad
    scales = quantise(values, format).scales
    assert not np.isfinite(scales[1, 40 // format.block])
    assert np.isfinite(scales).sum() == scales.size - 1


@pytest.mark.parametrize(
    "name", ["int4-zeros-f16", "int4-b64-zeros-f16", "int8-b128-f16", "int4-f16", "int4-offset-f16"]
)
def test_half_scales_are_a_part_of_the_name(name: str) -> None:
    format = format_named(name)
    assert format is not None and format.half
    assert format.name == name
    assert with_half(format, False).name == name.removesuffix("-f16")
    assert with_half(with_half(format, False)) == format


@pytest.mark.parametrize("name", ["fp16-f16", "int4-f16-zeros", "nvfp4-f16", "int8-row-f16", "int4-f32"])
def test_names_of_no_half_format(name: str) -> None:
    assert format_named(name) is None


def test_codes_are_made_for_the_scales_that_are_stored() -> None:
    values = rows(30, 64) * 1e-3
    for format in (int_format(4, half=True), INT4_ZEROS_HALF, int_format(8, 16, half=True)):
        blocks = quantise(values, format)
        assert (blocks.scales == blocks.scales.astype(np.float16)).all()
        assert round_scales(blocks, np.float32).scales is not blocks.scales
        np.testing.assert_array_equal(round_scales(blocks, np.float32).scales, blocks.scales)


def test_scales_below_the_normal_range_of_float16_reach_as_far() -> None:
    """2**-14 is its smallest normal number and 2**-24 the smallest of all: scales between have few digits."""
    tiny = np.float32([3e-5, -3e-5, 1e-6, 6e-8, 1e-8, -1e-8, 1e-30, 0.0, 2.0**-14, 0.1])
    found = half_scales(tiny)
    assert (found == found.astype(np.float16)).all()
    assert ((found == 0) == (tiny == 0)).all()
    assert (np.sign(found) == np.sign(tiny)).all()
    assert (np.abs(found[:8]) >= np.abs(tiny[:8])).all()
    assert (np.abs(found - tiny)[:8] <= 2.0**-24).all()
    assert (found[8:] == tiny[8:].astype(np.float16)).all()


@pytest.mark.parametrize("size", [1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("name", ["int4-f16", "int4-zeros-f16", "int8-f16"])
def test_blocks_of_tiny_numbers_are_kept(name: str, size: float) -> None:
    format, full = format_named(name), format_named(name.removesuffix("-f16"))
    assert format is not None and full is not None
    values = rows(40, 64) * np.float32(size)

    def loss(format: Format) -> float:
        blocks = round_scales(quantise(values, format), np.float32)
        assert (blocks.scales != 0).all()
        return float(np.abs(dequantise(blocks, 64) - values).max())

    assert loss(format) <= 1.1 * loss(full) + 2.0**-25


def test_scales_of_either_sign_that_another_quantiser_made_are_rounded_as_they_are_stored() -> None:
    blocks = Blocks(int_format(4, half=True), np.zeros((1, 64), np.uint8), np.float32([[1 / 3, -1e-9]]))
    stored = round_scales(blocks, np.float32)
    assert stored.scales.tolist() == [[float(np.float16(1 / 3)), -(2.0**-24)]]


def written(model: PreTrainedModel, formats: dict[str, Format], folder: Path) -> None:
    graph, tensors = traced_once(model.config), source_tensors(model)
    lower(graph, OrtOptions(formats, rotary_tables(model.config, CONTEXT), 0))
    layout = lay_out(graph)
    write_data(graph, layout, tensors, folder, Silent(), threads=2)
    refer(graph, layout, folder)


def all_in(model: PreTrainedModel, format: Format) -> dict[str, Format]:
    """Every matrix in one format; vectors as they are."""
    plain = format_named("fp32")
    assert plain is not None
    return {name: format if len(tensor.shape) > 1 else plain for name, tensor in source_tensors(model).items()}


@pytest.mark.parametrize("name", ["int4-zeros-f16", "int4-f16", "int8-f16", "int8-b16-zeros-f16", "int4-b64-zeros"])
@pytest.mark.parametrize("variant", ["grouped", "untied", "odd-sizes"])
def test_ort_graphs_compute_with_the_scales_in_the_file(variant: str, name: str, tmp_path: Path) -> None:
    model, format = llama(**VARIANTS[variant]), format_named(name)
    assert format is not None
    formats = all_in(model, format)
    written(model, formats, tmp_path)
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 9))
    expected = logits_of(with_stored_weights(model, source_tensors(model), formats), ids)
    found = run_ort(session(tmp_path / "model.onnx"), ids, (8, 9))
    assert np.abs(found - expected).max() < 1e-4
    kinds = {one.name: one.data_type for one in onnx.load(tmp_path / "model.onnx").graph.initializer}
    half = onnx.TensorProto.FLOAT16 if format.half else onnx.TensorProto.FLOAT
    assert {kind for one, kind in kinds.items() if one.endswith(".scales")} == {half}


def test_a_tied_embedding_and_head_share_one_cast(tmp_path: Path) -> None:
    model = llama()
    written(model, all_in(model, INT4_ZEROS_HALF), tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    casts = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Cast"}
    scales = f"{EMBEDDING.removesuffix('.weight')}.scales"
    readers = [node.op_type for node in nodes if any(casts.get(name) == scales for name in node.input)]
    assert readers == ["GatherBlockQuantized", "MatMulNBits"]


def test_the_reference_reads_what_is_stored() -> None:
    tensor = source_tensors(llama())["model.layers.0.mlp.up_proj.weight"]
    values = stored_values(tensor, INT4_ZEROS_HALF, 0, 8, np.float32)
    blocks = quantise(tensor.read(0, 8), INT4_ZEROS_HALF)
    np.testing.assert_array_equal(values, dequantise(blocks, tensor.shape[1]))
