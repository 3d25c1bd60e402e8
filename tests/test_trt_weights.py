"""Weights of the TensorRT dialects: what is written, what the device decodes, and what ONNX makes of it are one."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export import columns as panels
from llama_export.export.encode import Part
from llama_export.export.write import lay_out, placements, refer, write_data
from llama_export.optimize.formats import (
    EMBEDDING,
    FP8,
    FP16,
    HEAD,
    INT4,
    INT8,
    INT8_ROW,
    NVFP4,
    Format,
    format_named,
    int_format,
    stored_bytes,
)
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.policy import ORT, ORT_CUDA, TENSORRT, TENSORRT_8, TENSORRT_RTX
from llama_export.optimize.quantise import converted, dequantise, quantise, round_scales, stored_values
from llama_export.optimize.schemes import DEFAULT_INT4, DEFAULT_INT8
from llama_export.optimize.shared.pack_linears import pack_linears
from llama_export.optimize.tensors import Blocks, SourceTensor
from llama_export.optimize.trt.embedding import lower_embedding
from llama_export.optimize.trt.linear import InputScale, lower_linears
from llama_export.progress import Silent
from llama_export.runtime.proof.reference import WeightRecord, fingerprint
from llama_export.runtime.proof.weights import compare_weights
from onnx.reference import ReferenceEvaluator
from support import faults

WEIGHT = "model.layers.0.mlp.up_proj.weight"
POSITIVE4, POSITIVE8 = replace(INT4, positive=True), replace(INT8, positive=True)


def source(name: str, values: np.ndarray, own: Blocks | None = None) -> SourceTensor:
    """A checkpoint's tensor; with `own` blocks one that comes quantised."""

    def part(start: int, stop: int) -> Blocks:
        assert own is not None
        cut = {key: getattr(own, key) for key in ("codes", "scales", "zeros", "offsets")}
        return Blocks(own.format, **{key: None if one is None else one[start:stop] for key, one in cut.items()})

    blocks = part if own is not None else None
    format = own.format if own is not None else FP16
    return SourceTensor(name, values.shape, format.name, format, lambda a, b: values[a:b], blocks)


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) / 8
    values[rows // 2] = 0
    return values


def canonical(weights: Sequence[SourceTensor], dtype: ir.DataType, *, embedding: bool = False) -> ir.Model:
    """x @ transpose(weight) for each weight, or the embedding's rows; the second output is of the same type."""
    kind = ir.TensorType(dtype)
    x = ir.Value(name="x", shape=ir.Shape([1, "n", weights[0].shape[1]]), type=kind)
    ids = ir.Value(name="ids", shape=ir.Shape([1, "n"]), type=ir.TensorType(ir.DataType.INT64))
    nodes, outputs, initializers = [], [], []
    for weight in weights:
        value = ir.Value(name=weight.name, shape=ir.Shape(weight.shape), type=kind)
        initializers.append(value)
        name = weight.name.removesuffix(".weight")
        if embedding and weight.name == EMBEDDING:
            nodes.append(ir.node("Gather", [value, ids], {"axis": 0}, name=f"{name}/Gather"))
        else:
            nodes.append(ir.node("Transpose", [value], {"perm": [1, 0]}, name=f"{name}/Transpose"))
            nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]], name=f"{name}/MatMul"))
        nodes.append(ir.node("Identity", [nodes[-1].outputs[0]], name=f"{name}/result"))
        outputs.append(nodes[-1].outputs[0])
        outputs[-1].name, outputs[-1].type = nodes[-1].name, kind
        outputs[-1].shape = ir.Shape([1, "n", weight.shape[1 if embedding and weight.name == EMBEDDING else 0]])
    nodes.append(ir.node("Identity", [x], name="same"))
    outputs.append(nodes[-1].outputs[0])
    outputs[-1].name, outputs[-1].type, outputs[-1].shape = "same", kind, x.shape
    inputs = [x, ids] if embedding else [x]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=12)


def written(
    folder: Path,
    weights: Sequence[SourceTensor],
    formats: Mapping[str, Format],
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
    opset: int = 24,
    embedding: bool = False,
    together: bool = False,
    inputs: Mapping[str, InputScale] | None = None,
) -> ir.Model:
    """The lowered model in `folder`, with its weights, stacked into one where they are `together`."""
    model = canonical(weights, dtype, embedding=embedding)
    if together:
        pack_linears(model, formats)
    lower_linears(model, formats, opset=opset, inputs=inputs or {})
    if embedding:
        lower_embedding(model, formats)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.TopologicalSortPass()(model)
    model.graph.opset_imports[""] = opset
    model.ir_version = {17: 8, 19: 9, 21: 10, 24: 12}[opset]
    layout = lay_out(model)
    write_data(model, layout, {weight.name: weight for weight in weights}, folder, Silent(), threads=2)
    refer(model, layout, folder)
    return model


def run(folder: Path, feeds: Mapping[str, np.ndarray], *, by_reference: bool = False) -> list[np.ndarray]:
    path = str(folder / "model.onnx")
    if by_reference:
        return list(ReferenceEvaluator(onnx.load(path)).run(None, dict(feeds)))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return list(onnxruntime.InferenceSession(path, options).run(None, dict(feeds)))


def records(model: ir.Model, weights: Sequence[SourceTensor], dtype: str = "float32") -> tuple[WeightRecord, ...]:
    tensors = {weight.name: weight for weight in weights}
    found = []
    for name, place in placements(model, tensors).items():
        values = stored_values(tensors[name], place.format, 0, tensors[name].shape[0], dtype)
        digest, norm = fingerprint(iter([np.ascontiguousarray(values)]))
        found += [
            WeightRecord(name, one.format.name, values.shape, one.row, one.initializers, digest, norm, one.transposed)
            for one in (place, *place.copies)
        ]
    return tuple(found)


def differing(folder: Path, recorded: tuple[WeightRecord, ...]) -> list[str]:
    bundle: Any = SimpleNamespace(path=folder, file=lambda name: folder / name)
    return [one.name for one in compare_weights(bundle, recorded, lambda done, total: None, threads=2)]


def own_blocks(rows: int, columns: int, format: Format, seed: int = 3) -> Blocks:
    """Blocks as checkpoints have them: scales of both signs, one of 0, all exact in half precision."""
    rng = np.random.default_rng(seed)
    shape = (rows, format.blocks(columns))
    scales = (rng.standard_normal(shape) / 64).astype(np.float16).astype(np.float32)
    scales[0, 0] = 0
    codes = rng.integers(1, 2**format.bits, (rows, columns)).astype(np.uint8)
    if format.bits == 4:
        codes[1] = 0  # the lowest code, beside scales of both signs
    zeros = rng.integers(0, 2**format.bits, shape).astype(np.uint8) if format.zeros else None
    offsets = rng.standard_normal(shape).astype(np.float16).astype(np.float32) if format.offsets else None
    return Blocks(format, codes, scales, zeros, offsets)


ROUNDED = [FP16, INT4, POSITIVE4, INT8, POSITIVE8, int_format(4, 128), INT8_ROW, FP8, NVFP4]


@pytest.mark.parametrize("format", ROUNDED, ids=lambda format: f"{format.name}-{format.positive}")
@pytest.mark.parametrize("rows", [48, 37])
def test_writer_decoder_and_onnx_agree(format: Format, rows: int, tmp_path: Path) -> None:
    """With the identity as its input, a product is the weight itself."""
    weight = source(WEIGHT, matrix(rows, 256))
    model = written(tmp_path, [weight], {WEIGHT: format})
    expected = stored_values(weight, format, 0, rows, np.float32)
    eye = np.eye(256, dtype=np.float32)[None]
    (product, _) = run(tmp_path, {"x": eye}, by_reference=format == NVFP4)
    assert product.shape == (1, 256, rows)
    assert np.array_equal(product[0].T, expected)
    assert differing(tmp_path, records(model, [weight])) == []


OWN = [int_format(4), int_format(4, zeros=True), int_format(4, 16, offsets=True), INT8, int_format(8, 64, zeros=True)]


@pytest.mark.parametrize("own", OWN, ids=lambda format: format.name)
@pytest.mark.parametrize("policy", [TENSORRT_RTX, TENSORRT], ids=lambda policy: policy.name)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_own_blocks_keep_their_values(own: Format, policy: Any, dtype: str, tmp_path: Path) -> None:
    blocks = own_blocks(21, 128, own)
    weight = source(WEIGHT, dequantise(blocks, 128), blocks)
    format = plan_formats({WEIGHT: weight, EMBEDDING: source(EMBEDDING, matrix(8, 128))}, None, policy=policy)[WEIGHT]
    if own.bits not in policy.blocked:
        assert format == FP16
        return
    assert weight.keeps_own(format)
    assert not format.zeros
    kind = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}[dtype]
    model = written(tmp_path, [weight], {WEIGHT: format}, dtype=kind)
    kept = stored_values(weight, format, 0, 21, dtype)
    step = np.abs(weight.read(0, 21)).max()
    assert np.abs(kept - weight.read(0, 21)).max() <= step * (1e-6 if dtype == "float32" else 2**-11)
    (product, _) = run(tmp_path, {"x": np.eye(128, dtype=dtype)[None]})
    assert np.abs(product[0].T.astype(np.float32) - kept).max() <= step * (1e-6 if dtype == "float32" else 2**-9)
    recorded = records(model, [weight], dtype)
    assert differing(tmp_path, recorded) == []
    stored = stored_scales(tmp_path, recorded[0])
    assert (stored > 0).all() or format.bits in policy.signed


@pytest.mark.parametrize(("dtype", "lost"), [(np.float32, False), (np.float16, True)])
def test_zero_points_that_become_offsets_tell_what_half_precision_loses(dtype: Any, lost: bool) -> None:
    own = int_format(4, zeros=True)
    blocks = own_blocks(21, 128, own)
    weight = source(WEIGHT, dequantise(blocks, 128), blocks)
    _, loss = Part(weight, int_format(4, offsets=True), np.dtype(dtype), 0, 21).encoded()
    assert (loss is not None) == lost
    if loss is not None:
        assert loss.format == "int4-offset"
        assert 0 < loss.relative < 2**-10


@pytest.mark.parametrize("rows", [(37, 21), (38, 20)])
def test_stacked_weights_share_a_byte_where_they_meet(rows: tuple[int, int], tmp_path: Path) -> None:
    other = WEIGHT.replace("up", "gate")
    weights = [source(WEIGHT, matrix(rows[0], 64)), source(other, matrix(rows[1], 64, seed=1))]
    formats = {WEIGHT: INT4, other: INT4}
    model = written(tmp_path, weights, formats, together=True)
    results = run(tmp_path, {"x": np.eye(64, dtype=np.float32)[None]})
    for weight, result in zip(weights, results, strict=False):
        assert np.array_equal(result[0].T, stored_values(weight, INT4, 0, weight.shape[0], np.float32))
    recorded = records(model, weights)
    assert differing(tmp_path, recorded) == []
    with pytest.raises(LlamaExportError, match="does not say what all of"):
        differing(tmp_path, recorded[:1])
    line = (sum(rows) + 1) // 2 * 8
    flip_bit(tmp_path, recorded[0].initializers["codes"], 5 * line + rows[0] * 4)  # the second one's first row
    assert differing(tmp_path, recorded) == [other]


def test_weights_with_a_scale_of_their_own_stay_apart() -> None:
    other = WEIGHT.replace("up", "gate")
    for format, joined in ((INT4, 1), (NVFP4, 2)):
        model = canonical([source(WEIGHT, matrix(4, 16)), source(other, matrix(4, 16))], ir.DataType.FLOAT)
        pack_linears(model, {WEIGHT: format, other: format})
        assert sum(node.op_type == "MatMul" for node in model.graph) == joined


def stored_scales(folder: Path, record: WeightRecord) -> np.ndarray:
    proto = onnx.load(folder / "model.onnx")
    found = next(one for one in proto.graph.initializer if one.name == record.initializers["scales"])
    return np.asarray(onnx.numpy_helper.to_array(found))


def test_a_mirrored_code_that_does_not_exist_is_counted() -> None:
    blocks = own_blocks(4, 64, INT8)
    blocks.codes[2, 3], blocks.scales[2, 0] = 0, -0.5
    assert converted(blocks, POSITIVE8).rounded == 1
    blocks.scales[2, 0] = 0.5
    assert converted(blocks, POSITIVE8).rounded == 0


@pytest.mark.parametrize("format", [POSITIVE4, POSITIVE8, INT8_ROW, FP8], ids=lambda format: format.name)
@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0])
def test_scales_are_above_zero_where_they_must_be(format: Format, size: float) -> None:
    values = matrix(4, 64) * np.float32(size)
    blocks = round_scales(quantise(values, format), np.float16)
    assert (blocks.scales > 0).all()
    assert np.abs(dequantise(blocks, 64) - values).max() <= max(np.abs(values).max() / 6, 1e-8)


def test_the_least_positive_scale_reaches_both_ends() -> None:
    values = np.float32([[-8, 7, 0, 1] * 8, [-7, 7, 0, 1] * 8, [-4, 7, 0, 1] * 8])
    blocks = quantise(values, POSITIVE4)
    assert (blocks.scales == 1).all()
    assert (dequantise(blocks, 32) == values).all()


@pytest.mark.parametrize(("format", "most"), [(FP8, 448.0), (NVFP4, 6.0 * 448.0)], ids=str)
def test_the_largest_number_of_floats_is_kept(format: Format, most: float) -> None:
    values = np.zeros((3, 32), np.float32)
    values[0, 5], values[1, 7] = -most, most / 1000
    weight = source(WEIGHT, values)
    kept = stored_values(weight, format, 0, 3, np.float32)
    assert kept[0, 5] == -most
    assert abs(kept[1, 7] / values[1, 7] - 1) < 0.13
    assert (kept[2] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("format", [INT8_ROW, FP8, NVFP4], ids=lambda format: format.name)
def test_numbers_that_are_none_are_told(format: Format, bad: float, tmp_path: Path) -> None:
    values = matrix(4, 64)
    values[2, 3] = bad
    with pytest.raises(LlamaExportError, match=f"{WEIGHT} holds NaN or infinite"):
        written(tmp_path, [source(WEIGHT, values)], {WEIGHT: format})


@pytest.mark.parametrize("format", [INT4, POSITIVE8, INT8_ROW, NVFP4], ids=lambda format: format.name)
@pytest.mark.parametrize("rows", [130, 131])
def test_panels_and_steps_join(format: Format, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "_PANEL", 64 * 64)
    monkeypatch.setattr("llama_export.export.write._STEP", 64 * 7)
    monkeypatch.setattr("llama_export.runtime.proof.weights._PANEL", 64 * 64)
    monkeypatch.setattr("llama_export.runtime.proof.weights._STEP_VALUES", 64 * 9)
    weight = source(WEIGHT, matrix(rows, 64))
    model = written(tmp_path, [weight], {WEIGHT: format})
    recorded = records(model, [weight])
    assert differing(tmp_path, recorded) == []
    last = faults.flip(recorded[0].initializers["scales"], 2, at=rows - 1)
    last(tmp_path)
    assert differing(tmp_path, recorded) == [WEIGHT]


def flip_bit(folder: Path, name: str, bit: int) -> None:
    """Flip one bit of the bytes of a stored tensor, counted from its first one."""
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(one for one in proto.graph.initializer if one.name == name)
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(offset + bit // 8)
        (byte,) = file.read(1)
        file.seek(offset + bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize(
    ("format", "role"),
    [
        *((format, role) for format in (INT4, POSITIVE8, INT8_ROW, FP8, NVFP4) for role in ("codes", "scales")),
        (NVFP4, "global"),
    ],
    ids=lambda item: getattr(item, "name", item),
)
def test_a_wrong_bit_is_found(format: Format, role: str, tmp_path: Path) -> None:
    weight = source(WEIGHT, np.abs(matrix(6, 64)) + np.float32(0.1))
    model = written(tmp_path, [weight], {WEIGHT: format})
    recorded = records(model, [weight])
    for bit in (0, 5, 23):
        flip_bit(tmp_path, recorded[0].initializers[role], bit)
        assert differing(tmp_path, recorded) == [WEIGHT]
        flip_bit(tmp_path, recorded[0].initializers[role], bit)
    assert differing(tmp_path, recorded) == []


def test_columns_without_a_record_are_refused(tmp_path: Path) -> None:
    weight = source(WEIGHT, matrix(6, 64))
    (record,) = records(written(tmp_path, [weight], {WEIGHT: POSITIVE8}), [weight])
    with pytest.raises(LlamaExportError, match="does not say what all of"):
        differing(tmp_path, (replace(record, shape=(5, 64)),))
    with pytest.raises(LlamaExportError, match=r"has no .* with the rows of"):
        differing(tmp_path, (replace(record, row=1),))
    with pytest.raises(LlamaExportError, match=r"does not store|has no"):
        differing(tmp_path, (replace(record, transposed=False),))


@pytest.mark.parametrize(
    "format",
    [INT4, POSITIVE4, POSITIVE8, int_format(4, 16, offsets=True), FP16],
    ids=lambda format: f"{format.name}-{format.positive}",
)
def test_a_tied_embedding_has_a_copy_by_rows(format: Format, tmp_path: Path) -> None:
    table = source(EMBEDDING, matrix(33, 64))
    if format.offsets:
        blocks = own_blocks(33, 64, format)
        table = source(EMBEDDING, dequantise(blocks, 64), blocks)
    head = source(HEAD, matrix(5, 64, seed=1))
    weights = {EMBEDDING: format, HEAD: INT8_ROW}
    model = written(tmp_path, [table, head], weights, embedding=True)
    ids = np.array([[0, 32, 7]])
    (rows, _, _) = run(tmp_path, {"x": np.zeros((1, 1, 64), np.float32), "ids": ids})
    assert (rows[0] == stored_values(table, format, 0, 33, np.float32)[ids[0]]).all()
    assert differing(tmp_path, records(model, [table, head])) == []


@pytest.mark.parametrize(("opset", "dtype"), [(17, "float16"), (19, "float16"), (24, "float32")])
@pytest.mark.parametrize("kind", [ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN], ids=str)
def test_inputs_are_rounded_once_for_all_who_read_them(
    opset: int, dtype: str, kind: ir.DataType, tmp_path: Path
) -> None:
    if opset == 17 and kind == ir.DataType.FLOAT8E4M3FN:
        pytest.skip("opset 17 has no E4M3")
    other = WEIGHT.replace("up", "gate")
    weights = [source(WEIGHT, matrix(6, 32)), source(other, matrix(5, 32, seed=1))]
    format = INT8_ROW if kind == ir.DataType.INT8 else FP8
    scale = InputScale(0.02, kind)
    model = written(
        tmp_path,
        weights,
        {WEIGHT: format, other: format},
        dtype={"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}[dtype],
        opset=opset,
        inputs={WEIGHT: scale, other: scale},
    )
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 1
    x = matrix(3, 32, seed=2)[None].astype(dtype)
    results = run(tmp_path, {"x": x}, by_reference=kind == ir.DataType.FLOAT8E4M3FN)
    step = np.float32(np.dtype(dtype).type(0.02)) if opset > 17 else np.float32(0.02)
    rounded = np.clip(np.rint(x.astype(np.float32) / step), -128, 127) * step
    for weight, result in zip(weights, results, strict=False):
        assert result.dtype == x.dtype
        exact = (rounded if kind == ir.DataType.INT8 else x.astype(np.float32)) @ stored_values(
            weight, format, 0, weight.shape[0], dtype
        ).T
        tolerance = 0.03 if kind == ir.DataType.FLOAT8E4M3FN else 2e-3
        assert np.abs(result - exact).max() <= tolerance * max(1, np.abs(exact).max())


def checkpoint(*, tied: bool, hidden: int = 64) -> dict[str, SourceTensor]:
    shapes = {EMBEDDING: (40, hidden), WEIGHT: (50, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes[HEAD] = (40, hidden)
    return {name: source(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("policy", "precision", "tied", "hidden", "expected"),
    [
        (TENSORRT_RTX, "int4", False, 64, {WEIGHT: INT4, HEAD: INT4, EMBEDDING: POSITIVE8}),
        (TENSORRT_RTX, "int4", True, 64, {WEIGHT: INT4, EMBEDDING: INT4}),
        (TENSORRT_RTX, "int8", True, 64, {WEIGHT: POSITIVE8, EMBEDDING: POSITIVE8}),
        (TENSORRT_RTX, "nvfp4", True, 64, {WEIGHT: NVFP4, EMBEDDING: POSITIVE8}),
        (TENSORRT_RTX, "fp8", False, 40, {WEIGHT: FP8, HEAD: FP8, EMBEDDING: FP16}),
        (TENSORRT_RTX, "int4", True, 48, {WEIGHT: int_format(4, 16), EMBEDDING: int_format(4, 16)}),
        (TENSORRT_RTX, "int4", True, 40, {WEIGHT: FP16, EMBEDDING: FP16}),
        (TENSORRT_RTX, "nvfp4", False, 40, {WEIGHT: FP16, HEAD: FP16, EMBEDDING: FP16}),
        (TENSORRT_RTX, "w8a8", False, 40, {WEIGHT: INT8_ROW, HEAD: INT8_ROW, EMBEDDING: FP16}),
        (TENSORRT, "int4", False, 64, {WEIGHT: POSITIVE4, HEAD: POSITIVE4, EMBEDDING: FP16}),
        (TENSORRT, "int4", True, 64, {WEIGHT: POSITIVE4, EMBEDDING: POSITIVE4}),
        (TENSORRT, "int8", True, 64, {WEIGHT: INT8_ROW, EMBEDDING: FP16}),
        (TENSORRT_8, "int8", False, 64, {WEIGHT: INT8_ROW, HEAD: INT8_ROW, EMBEDDING: FP16}),
        (TENSORRT, "w8a8", True, 64, {WEIGHT: INT8_ROW, EMBEDDING: FP16}),
        (TENSORRT_RTX, "int8-b16", True, 48, {WEIGHT: replace(int_format(8, 16), positive=True)}),
        (ORT, "int4", False, 48, {WEIGHT: DEFAULT_INT4, HEAD: DEFAULT_INT4, EMBEDDING: FP16}),
        (ORT, "w8a8", False, 64, {WEIGHT: DEFAULT_INT8, HEAD: DEFAULT_INT8, EMBEDDING: DEFAULT_INT8}),
        (ORT, "int4-b16", False, 48, {WEIGHT: int_format(4, 16, half=True), EMBEDDING: FP16}),
        (ORT, "int4-b16-zeros", True, 48, {WEIGHT: int_format(4, 16, zeros=True, half=True)}),
        (ORT, "int4-b16-zeros", True, 48, {EMBEDDING: int_format(4, 16, half=True)}),  # three blocks are no whole bytes
        (ORT_CUDA, "int4", False, 64, {WEIGHT: int_format(4, zeros=True), EMBEDDING: INT8}),
        (ORT_CUDA, "int8-b64-zeros", True, 64, {WEIGHT: int_format(8, 64, zeros=True)}),
    ],
)
def test_formats_of_a_backend(
    policy: Any, precision: str, tied: bool, hidden: int, expected: Mapping[str, Format]
) -> None:
    found = plan_formats(checkpoint(tied=tied, hidden=hidden), precision, policy=policy)
    assert {name: found[name] for name in expected} == expected


def test_a_precision_that_a_backend_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"TensorRT 8\.6 does not run int4 weights; choose one of fp16, int8"):
        plan_formats(checkpoint(tied=True), "int4", policy=TENSORRT_8)


@pytest.mark.parametrize("name", ["int8-row", "fp8", "nvfp4"])
def test_new_formats_have_names(name: str) -> None:
    format = format_named(name)
    assert format is not None
    assert format.name == name


@pytest.mark.parametrize(("format", "expected"), [(INT8_ROW, 3 * 66), (FP8, 3 * 66), (NVFP4, 3 * (32 + 4) + 4)])
def test_bytes_of_new_formats(format: Format, expected: int) -> None:
    assert stored_bytes((3, 64), format, 2) == expected


def test_what_is_written_is_as_large_as_planned(tmp_path: Path) -> None:
    for format in (INT4, INT8_ROW, FP8, NVFP4):
        weight = source(WEIGHT, matrix(64, 128))
        layout = lay_out(written(tmp_path, [weight], {WEIGHT: format}, dtype=ir.DataType.FLOAT16))
        assert sum(region.size for region in layout.regions.values()) == stored_bytes((64, 128), format, 2)
        assert math.prod(weight.shape) > 0


def test_blocks_of_onnx_runtime_are_what_they_were() -> None:
    """A bundle for ONNX Runtime has the same bytes as before there were others."""
    digest = hashlib.sha256()
    for bits, block, columns in itertools.product((4, 8), (16, 32, 128), (64, 77)):
        blocks = quantise(matrix(9, columns), int_format(bits, block))
        digest.update(blocks.codes.tobytes() + blocks.scales.tobytes())
    assert digest.hexdigest() == "e0c6f14b21274db809a5fa5430ae4312533522d4e1a2d4c895fedf08bf35ac77"


RTX = [(FP16, "8.0"), (INT4, "8.9"), (POSITIVE8, "8.9"), (INT8_ROW, "8.9"), (FP8, "8.9"), (NVFP4, "12.0")]


@pytest.mark.parametrize(("format", "capability"), RTX, ids=lambda item: getattr(item, "name", item))
def test_tensorrt_builds_it_with_the_weights_quantised(format: Format, capability: str, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    shape = (1023, 1024)
    written(tmp_path, [source(WEIGHT, matrix(*shape))], {WEIGHT: format}, dtype=ir.DataType.FLOAT16)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tmp_path / "model.onnx")), parser.get_error(0).desc()
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, shape[1]), (1, 8, shape[1]), (1, 8, shape[1]))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    assert plan.nbytes < stored_bytes(shape, format, 2) + 600_000
