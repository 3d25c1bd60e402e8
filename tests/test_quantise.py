"""Codes and scales: what rounding loses, what packing means, and which weight gets which format."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from llama_export.errors import UsageError
from llama_export.optimize.formats import BF16, FP16, FP32, INT4, INT4_OFFSET, INT8, plan_formats, stored_bytes
from llama_export.optimize.quantise import (
    blocks_of,
    dequantise,
    pack,
    quantise,
    round_scales,
    stored_values,
)
from llama_export.optimize.tensors import Blocks, SourceTensor
from onnx import TensorProto, helper, numpy_helper


def rows(n: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, columns)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 96, 77, 1, 33])
def test_rounding_is_within_half_a_step(bits: int, columns: int) -> None:
    values = rows(5, columns)
    blocks = quantise(values, bits)
    assert blocks.codes.max() < 2**bits
    error = np.abs(dequantise(blocks, columns) - values)
    # The end opposite to the largest value saturates one code early: there a whole step is lost at most.
    steps = np.repeat(np.abs(blocks.scales), 32, axis=1)[:, :columns]
    assert (error <= steps * 1.0001).all()
    assert (error <= steps * 0.5001).mean() > 0.9


def test_the_largest_value_of_a_block_is_exact() -> None:
    values = rows(40, 64)
    restored = dequantise(quantise(values, 4), 64)
    at = np.abs(values.reshape(40, 2, 32)).argmax(axis=-1)
    picked = [np.take_along_axis(array.reshape(40, 2, 32), at[..., None], -1) for array in (values, restored)]
    assert np.allclose(*picked, rtol=1e-6)


def test_zeros_and_grid_values_come_back_as_they_were() -> None:
    assert (dequantise(quantise(np.zeros((3, 64), np.float32), 4), 64) == 0).all()
    grid = (np.arange(-8, 8, dtype=np.float32) * 0.25).repeat(2)[None]
    assert (dequantise(quantise(grid, 4), 32) == grid).all()


def matmul_nbits(blocks: Blocks, x: np.ndarray, columns: int) -> np.ndarray:
    n = blocks.codes.shape[0]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=n,
        bits=blocks.bits,
        block_size=32,
        accuracy_level=0,
    )
    stored = {"codes": pack(blocks).reshape(n, -1, 4 * blocks.bits), "scales": blocks.scales}
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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 77])
def test_packing_is_what_the_kernel_reads(bits: int, columns: int) -> None:
    blocks = quantise(rows(6, columns), bits)
    x = rows(3, columns, seed=1)
    assert np.abs(matmul_nbits(blocks, x, columns) - x @ dequantise(blocks, columns).T).max() < 1e-4


def tensor(name: str, values: np.ndarray, dtype: str = "F32", blocks: Blocks | None = None) -> SourceTensor:
    def part(start: int, stop: int) -> Blocks:
        assert blocks is not None
        offsets = None if blocks.offsets is None else blocks.offsets[start:stop]
        return Blocks(blocks.bits, blocks.codes[start:stop], blocks.scales[start:stop], offsets)

    return SourceTensor(
        name, values.shape, dtype, lambda start, stop: values[start:stop], part if blocks is not None else None
    )


def test_own_codes_are_taken_only_for_their_own_format() -> None:
    own = Blocks(4, np.full((2, 32), 3, np.uint8), np.ones((2, 1), np.float32))
    source = tensor("w", dequantise(own, 32), "Q4_0", own)
    assert (blocks_of(source, INT4)(0, 2).codes == 3).all()
    assert blocks_of(source, INT8)(0, 2).bits == 8
    assert (stored_values(source, INT4, 1, 2, np.float32) == -5).all()


def test_scales_are_rounded_where_they_are_stored_in_half_precision() -> None:
    blocks = round_scales(
        Blocks(4, np.zeros((1, 32), np.uint8), np.float32([[1 / 3]]), np.float32([[0.1]])), np.float16
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
    assert plan_formats(checkpoint(tied=True), "int4")[EMBEDDING] == INT4
    untied = plan_formats(checkpoint(tied=False), "int4")
    assert (untied[EMBEDDING], untied[HEAD], untied[PROJECTION]) == (INT8, INT4, INT4)
    assert untied[NORM] == FP32


def test_an_embedding_whose_rows_end_within_a_block_is_not_quantised() -> None:
    planned = plan_formats(checkpoint(tied=True, hidden=40), "int4")
    assert (planned[EMBEDDING], planned[PROJECTION]) == (FP16, INT4)


def test_own_formats_are_kept() -> None:
    tensors = checkpoint(tied=False)
    kept = {EMBEDDING: "Q8_0", HEAD: "F16", PROJECTION: "Q4_1", NORM: "F32"}
    tensors = {name: tensor(name, np.zeros(one.shape, np.float32), kept[name]) for name, one in tensors.items()}
    planned = plan_formats(tensors, None)
    assert planned == {EMBEDDING: INT8, HEAD: FP16, PROJECTION: INT4_OFFSET, NORM: FP32}


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
    ],
)
def test_stored_bytes(format: object, expected: int, halved: int) -> None:
    assert stored_bytes((3, 40), format) == expected  # 40 columns are two blocks
    assert stored_bytes((3, 40), format, 2) == halved
