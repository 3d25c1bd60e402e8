"""Codes and scales: what rounding loses, what packing means, and which weight gets which format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from llama_export.errors import UsageError
from llama_export.optimize.formats import (
    BF16,
    BLOCKS,
    FP16,
    FP32,
    INT4,
    INT8,
    Format,
    format_named,
    int_format,
    stored_bytes,
)
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.quantise import (
    blocks_of,
    dequantise,
    pack,
    quantise,
    round_scales,
    stored_values,
)
from llama_export.optimize.schemes import DEFAULT_EMBEDDING, DEFAULT_INT4
from llama_export.optimize.tensors import Blocks, SourceTensor
from onnx import TensorProto, helper, numpy_helper


def rows(n: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, columns)).astype(np.float32)


@pytest.mark.parametrize("format", [INT4, INT8, int_format(4, 128), int_format(8, 16)])
@pytest.mark.parametrize("columns", [32, 96, 77, 1, 33])
def test_rounding_is_within_half_a_step(format: Format, columns: int) -> None:
    values = rows(5, columns)
    blocks = quantise(values, format)
    assert blocks.codes.max() < 2**format.bits
    error = np.abs(dequantise(blocks, columns) - values)
    # The end opposite to the largest value saturates one code early: there a whole step is lost at most.
    steps = np.repeat(np.abs(blocks.scales), format.block, axis=1)[:, :columns]
    assert (error <= steps * 1.0001).all()
    assert (error <= steps * 0.5001).mean() > 0.9


def test_the_largest_value_of_a_block_is_exact() -> None:
    values = rows(40, 64)
    restored = dequantise(quantise(values, INT4), 64)
    at = np.abs(values.reshape(40, 2, 32)).argmax(axis=-1)
    picked = [np.take_along_axis(array.reshape(40, 2, 32), at[..., None], -1) for array in (values, restored)]
    assert np.allclose(*picked, rtol=1e-6)


def test_zeros_and_grid_values_come_back_as_they_were() -> None:
    assert (dequantise(quantise(np.zeros((3, 64), np.float32), INT4), 64) == 0).all()
    grid = (np.arange(-8, 8, dtype=np.float32) * 0.25).repeat(2)[None]
    assert (dequantise(quantise(grid, INT4), 32) == grid).all()


def matmul_nbits(blocks: Blocks, x: np.ndarray, columns: int) -> np.ndarray:
    n, format = blocks.codes.shape[0], blocks.format
    stored = {
        "codes": pack(blocks.codes, format.bits).reshape(n, -1, format.block * format.bits // 8),
        "scales": blocks.scales,
    }
    if blocks.zeros is not None:
        stored["zeros"] = pack(blocks.zeros, format.bits)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *stored],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=n,
        bits=format.bits,
        block_size=format.block,
        accuracy_level=0,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 77, 300])
def test_packing_is_what_the_kernel_reads(bits: int, block: int, columns: int, zeros: bool) -> None:
    blocks = quantise(rows(6, columns), int_format(bits, block))
    if zeros:
        points = np.random.default_rng(2).integers(0, 2**bits, blocks.scales.shape).astype(np.uint8)
        blocks = replace(blocks, format=int_format(bits, block, zeros=True), zeros=points)
    x = rows(3, columns, seed=1)
    expected = x @ dequantise(blocks, columns).T
    assert np.abs(matmul_nbits(blocks, x, columns) - expected).max() < 1e-5 * np.abs(expected).max() + 1e-4


@pytest.mark.parametrize("name", ["fp32", "bf16", "int4", "int8", "int8-b16", "int4-b128-zeros", "int4-b16-offset"])
def test_formats_have_names(name: str) -> None:
    format = format_named(name)
    assert format is not None
    assert format.name == name


@pytest.mark.parametrize("name", ["int4-b32", "int3", "int4-b24", "int4-b0", "int4-zeros-b64", "fp64", ""])
def test_names_of_no_format(name: str) -> None:
    assert format_named(name) is None


INT4_OFFSET = int_format(4, offsets=True)


def tensor(name: str, values: np.ndarray, format: Format = FP32, blocks: Blocks | None = None) -> SourceTensor:
    def part(start: int, stop: int) -> Blocks:
        assert blocks is not None
        return Blocks(blocks.format, blocks.codes[start:stop], blocks.scales[start:stop])

    own = part if blocks is not None else None
    return SourceTensor(name, values.shape, format.name, format, lambda start, stop: values[start:stop], own)


def test_own_codes_are_taken_only_for_their_own_format() -> None:
    own = Blocks(INT4, np.full((2, 32), 3, np.uint8), np.ones((2, 1), np.float32))
    source = tensor("w", dequantise(own, 32), INT4, own)
    assert (blocks_of(source, INT4)(0, 2).codes == 3).all()
    assert blocks_of(source, INT8)(0, 2).format == INT8
    assert (stored_values(source, INT4, 1, 2, np.float32) == -5).all()


def test_scales_are_rounded_where_they_are_stored_in_half_precision() -> None:
    blocks = round_scales(
        Blocks(INT4_OFFSET, np.zeros((1, 32), np.uint8), np.float32([[1 / 3]]), None, np.float32([[0.1]])), np.float16
    )
    assert blocks.scales[0, 0] == np.float32(np.float16(1 / 3))
    assert blocks.offsets is not None and blocks.offsets[0, 0] == np.float32(np.float16(0.1))


def test_half_precision_rounds_to_nearest() -> None:
    values = rows(4, 10)
    assert (stored_values(tensor("w", values), FP16, 0, 4, np.float32) == values.astype(np.float16)).all()
    bf16 = stored_values(tensor("w", values), BF16, 0, 4, np.float32)
    assert np.abs(bf16 / values - 1).max() <= 2**-8
    assert (stored_values(tensor("w", values), FP32, 0, 4, np.float32) == values).all()


EMBEDDING, HEAD, PROJECTION, NORM = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight",
)


def checkpoint(*, tied: bool, hidden: int = 64) -> dict[str, SourceTensor]:
    shapes = {EMBEDDING: (100, hidden), PROJECTION: (50, hidden), NORM: (hidden,)} | (
        {} if tied else {HEAD: (100, hidden)}
    )
    return {name: tensor(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()}


def test_an_embedding_of_its_own_keeps_eight_bits() -> None:
    assert plan_formats(checkpoint(tied=True), "int4")[EMBEDDING] == DEFAULT_INT4
    untied = plan_formats(checkpoint(tied=False), "int4")
    assert (untied[EMBEDDING], untied[HEAD], untied[PROJECTION]) == (DEFAULT_EMBEDDING, DEFAULT_INT4, DEFAULT_INT4)
    assert untied[NORM] == FP32


def test_an_embedding_whose_rows_end_within_a_block_is_not_quantised() -> None:
    planned = plan_formats(checkpoint(tied=True, hidden=40), "int4")
    assert (planned[EMBEDDING], planned[PROJECTION]) == (FP16, DEFAULT_INT4)


def test_own_formats_are_kept() -> None:
    tensors = checkpoint(tied=False)
    kept = {EMBEDDING: INT8, HEAD: FP16, PROJECTION: INT4_OFFSET, NORM: FP16}
    tensors = {name: tensor(name, np.zeros(one.shape, np.float32), kept[name]) for name, one in tensors.items()}
    assert plan_formats(tensors, None) == kept | {NORM: FP32}


def test_unknown_precision_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'int3'.*fp32, fp16, int8, int4.*Did you mean 'int"):
        plan_formats(checkpoint(tied=True), "int3")


@pytest.mark.parametrize(
    ("format", "expected", "halved"),
    [
        (FP32, 4 * 3 * 40, 4 * 3 * 40),
        (FP16, 2 * 3 * 40, 2 * 3 * 40),
        (INT8, 6 * 36, 6 * 34),
        (INT4, 6 * 20, 6 * 18),
        (INT4_OFFSET, 6 * 24, 6 * 20),
        (int_format(4, 16, zeros=True), 3 * (3 * 12 + 2), 3 * (3 * 10 + 2)),  # three zero points are two bytes
        (int_format(8, 64, zeros=True), 3 * 69, 3 * 67),
        (int_format(4, half=True), 6 * 18, 6 * 18),
        (int_format(4, offsets=True, half=True), 6 * 20, 6 * 20),
        (int_format(8, 64, zeros=True, half=True), 3 * 67, 3 * 67),
    ],
)
def test_stored_bytes(format: object, expected: int, halved: int) -> None:
    assert stored_bytes((3, 40), format) == expected  # 40 columns are two blocks
    assert stored_bytes((3, 40), format, 2) == halved
