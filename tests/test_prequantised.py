"""Checkpoints in the formats of quantisers: every code and scale arrives, in whichever form it was stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.export.folder import open_folder
from llama_export.export.prequantised import stripes
from llama_export.export.source import Source, open_source
from llama_export.optimize.formats import EMBEDDING, FP16, HEAD
from llama_export.optimize.plan import has_wide_head, head_of, plan_formats
from llama_export.optimize.schemes import DEFAULT_INT8
from llama_export.optimize.tensors import SourceTensor
from support.hf_models import write_json
from support.prequantised import (
    Parts,
    Quantised,
    awq_gemv_parts,
    awq_parts,
    byte_parts,
    compressed_parts,
    gptq_parts,
    quantised,
    values_of,
    write_prequantised,
)

Contents = Mapping[str, Quantised | np.ndarray]

# Rows that are no multiple of 32, and columns that are no multiple of most groups: 40 keys, 160 inside the MLP.
SIZES = {"layers": 1, "hidden": 128, "heads": 4, "kv_heads": 1, "head_dim": 40, "ffn": 160}
WHOLE_WORDS = {**SIZES, "head_dim": 32}


def compressed_settings(bits: int, group: int, symmetric: bool, format: str = "pack-quantized") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    if group == -1:
        weights |= {"strategy": "channel", "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def gptq_settings(bits: int, group: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False, **more}


def awq_settings(group: int, version: str) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}


def write(
    path: Path,
    settings: Mapping[str, Any],
    parts_of: Callable[[Quantised], Parts],
    *,
    symmetric: bool = False,
    shuffled: bool = False,
    bits: int = 4,
    group: int = 32,
    scales: str = "F16",
    **more: Any,
) -> Contents:
    def quantise(name: str, weight: np.ndarray) -> Quantised:
        return quantised(weight, bits, group, symmetric=symmetric, shuffled=shuffled, scales=scales)

    return write_prequantised(path, settings, quantise, parts_of, **{**SIZES, **more})


def check(path: Path, contents: Contents) -> Source:
    """Open it, and compare codes, zero points and values with what was stored: whole, and in odd steps."""
    source = open_source(str(path))
    assert source.tensors.keys() == contents.keys()
    for name, content in contents.items():
        tensor = source.tensors[name]
        assert tensor.shape == values_of(content).shape
        for start, stop in pieces(tensor.shape[0]):
            np.testing.assert_array_equal(tensor.read(start, stop), values_of(content)[start:stop], err_msg=name)
        if isinstance(content, Quantised):
            check_blocks(tensor, content)
        else:
            assert tensor.blocks is None
    return source


def pieces(rows: int) -> list[tuple[int, int]]:
    return [(0, rows), *((start, min(rows, start + 7)) for start in range(0, rows, 7))]


def check_blocks(tensor: SourceTensor, content: Quantised) -> None:
    assert tensor.blocks is not None
    for start, stop in pieces(tensor.shape[0]):
        blocks = tensor.blocks(start, stop)
        format, columns = blocks.format, tensor.shape[1]
        shift = 2 ** (format.bits - 1) - 2 ** (content.bits - 1)
        order = np.arange(columns) if tensor.order is None else tensor.order
        assert blocks.codes.dtype == np.uint8
        assert blocks.codes.shape == (stop - start, format.blocks(columns) * format.block)
        np.testing.assert_array_equal(blocks.codes[:, :columns], content.codes[start:stop, order] + shift)
        places = content.groups[order][np.minimum(np.arange(format.blocks(columns)) * format.block, columns - 1)]
        np.testing.assert_array_equal(blocks.scales, content.scales[start:stop, places].astype(np.float32))
        assert (blocks.zeros is not None) == format.zeros
        points = content.zeros[start:stop, places] + shift
        np.testing.assert_array_equal(2 ** (format.bits - 1) if blocks.zeros is None else blocks.zeros, points)


def down(source: Source) -> SourceTensor:
    return source.tensors["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, symmetric: bool, v2: bool, tmp_path: Path) -> None:
    settings = gptq_settings(bits, 32, symmetric, **({"checkpoint_format": "gptq_v2"} if v2 else {}))
    sizes = WHOLE_WORDS if bits < 4 else SIZES
    contents = write(
        tmp_path / "m", settings, lambda matrix: gptq_parts(matrix, v2=v2), symmetric=symmetric, bits=bits, **sizes
    )
    source = check(tmp_path / "m", contents)
    assert source.native_precision == "gptq"
    assert down(source).format.name == f"int{8 if bits == 8 else 4}" + ("" if symmetric else "-zeros")
    assert down(source).dtype == "GPTQ"
    assert source.tensors["lm_head.weight"].format.name == "fp16"


@pytest.mark.parametrize(("group", "block"), [(16, 16), (32, 32), (48, 16), (64, 64), (128, 128), (-1, 32), (1024, 32)])
@pytest.mark.parametrize("shuffled", [True, False], ids=["sorted", "in place"])
def test_gptq_groups(group: int, block: int, shuffled: bool, tmp_path: Path) -> None:
    """160 columns: groups that do not fill the last one, and one for all; also with columns by importance."""
    settings = gptq_settings(4, group, False, desc_act=shuffled)
    contents = write(tmp_path / "m", settings, gptq_parts, group=group, shuffled=shuffled)
    source = check(tmp_path / "m", contents)
    assert down(source).format.block == block
    assert (down(source).order is not None) == (shuffled and group not in (-1, 1024))


def test_groups_wider_than_any_block(tmp_path: Path) -> None:
    contents = write(tmp_path / "m", gptq_settings(4, 512, False), gptq_parts, group=512, ffn=1024, layers=1)
    source = check(tmp_path / "m", contents)
    assert down(source).format.block == 256


def test_one_group_a_row_of_odd_length(tmp_path: Path) -> None:
    """8-bit rows of 100 columns: no block divides them, the last is padded."""
    contents = write(tmp_path / "m", gptq_settings(8, -1, False), gptq_parts, bits=8, group=-1, ffn=100, head_dim=4)
    assert down(check(tmp_path / "m", contents)).format.name == "int8-zeros"


@pytest.mark.parametrize("scales", ["F16", "BF16", "F32"])
def test_scales_of_any_type_and_dense_tensors_too(scales: str, tmp_path: Path) -> None:
    contents = write(tmp_path / "m", gptq_settings(4, 32, False), gptq_parts, scales=scales, dense=scales)
    check(tmp_path / "m", contents)


def test_gptq_without_g_idx_and_with_modules_left_out(tmp_path: Path) -> None:
    def parts_of(matrix: Quantised) -> Parts:
        return gptq_parts(matrix, g_idx=False)

    check(tmp_path / "m", write(tmp_path / "m", gptq_settings(4, 32, True), parts_of, symmetric=True, keep=["v_proj"]))


def test_modules_of_different_bits_and_groups(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: what a module has is read off its tensors."""

    def quantise(name: str, weight: np.ndarray) -> Quantised:
        return quantised(weight, 8, 64, symmetric=False) if "down" in name else quantised(weight, 4, 32, symmetric=True)

    settings = gptq_settings(4, 32, True, dynamic={"+:.*down_proj": {"bits": 8, "group_size": 64, "sym": False}})
    contents = write_prequantised(tmp_path / "m", settings, quantise, gptq_parts, **{**SIZES, "ffn": 128})
    source = check(tmp_path / "m", contents)
    assert down(source).format.name == "int8-b64-zeros"
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].format.name == "int4"


def test_biases_of_zeros_are_dropped(tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(160, np.float16)}
    contents = write(tmp_path / "m", gptq_settings(4, 32, False), gptq_parts, extra=bias)
    check(tmp_path / "m", contents)


def test_real_biases_are_kept_and_unexpected_ones_told(tmp_path: Path) -> None:
    contents = write(tmp_path / "m", gptq_settings(4, 32, False), gptq_parts, attention_bias=True)
    check(tmp_path / "m", contents)
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(160, np.float16)}
    write(tmp_path / "n", gptq_settings(4, 32, False), gptq_parts, extra=bias)
    with pytest.raises(Exception, match=r"config\.json does not say attention_bias: true"):
        open_source(str(tmp_path / "n"))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_in_a_file_of_their_own(name: str, tmp_path: Path) -> None:
    """As AutoGPTQ and AutoAWQ wrote them before config.json held them."""
    if name == "quant_config.json":
        settings: dict[str, Any] = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        contents = write(tmp_path / "m", settings, awq_parts)
    else:
        settings = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}
        contents = write(tmp_path / "m", settings, gptq_parts)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    write_json(tmp_path / "m" / "config.json", {key: config[key] for key in config if key != "quantization_config"})
    write_json(tmp_path / "m" / name, settings)
    check(tmp_path / "m", contents)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("version", ["gemm", "GEMV"])
def test_awq(version: str, group: int, tmp_path: Path) -> None:
    parts_of = awq_parts if version == "gemm" else awq_gemv_parts
    contents = write(tmp_path / "m", awq_settings(group, version), parts_of, group=group, ffn=256, hidden=128)
    source = check(tmp_path / "m", contents)
    assert source.native_precision == "awq"
    block = {32: "", -1: "-b256"}.get(group, f"-b{group}")
    assert down(source).format.name == f"int4{block}-zeros"


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq"])
def test_autoround_in_the_packing_of_others(packing: str, tmp_path: Path) -> None:
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "packing_format": packing}
    parts_of = gptq_parts if packing.endswith("gptq") else awq_parts
    check(tmp_path / "m", write(tmp_path / "m", settings, parts_of))


@pytest.mark.parametrize("group", [16, 32, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_compressed_tensors_packed(bits: int, symmetric: bool, group: int, tmp_path: Path) -> None:
    contents = write(
        tmp_path / "m",
        compressed_settings(bits, group, symmetric),
        lambda matrix: compressed_parts(matrix, symmetric=symmetric),
        bits=bits,
        group=group,
        symmetric=symmetric,
        scales="BF16",
        ffn=192,
    )
    source = check(tmp_path / "m", contents)
    assert source.native_precision == "compressed-tensors"
    assert source.notes == ()


def test_compressed_tensors_with_sorted_columns(tmp_path: Path) -> None:
    contents = write(
        tmp_path / "m",
        compressed_settings(4, 32, True),
        lambda matrix: compressed_parts(matrix, symmetric=True, g_idx=True),
        symmetric=True,
        shuffled=True,
    )
    assert down(check(tmp_path / "m", contents)).order is not None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [-1, 32])
def test_compressed_tensors_in_bytes(group: int, symmetric: bool, bits: int, tmp_path: Path) -> None:
    settings = compressed_settings(bits, group, symmetric, "int-quantized")
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    settings["kv_cache_scheme"] = {"num_bits": 8}
    extra = {
        "model.layers.0.self_attn.k_scale": np.ones(1, np.float32),
        "model.layers.0.mlp.down_proj.input_scale": np.ones(1, np.float32),
    }
    contents = write(
        tmp_path / "m",
        settings,
        lambda matrix: byte_parts(matrix, symmetric=symmetric),
        bits=bits,
        group=group,
        symmetric=symmetric,
        extra=extra,
    )
    source = check(tmp_path / "m", contents)
    assert down(source).format.bits == bits
    assert len(source.notes) == 2
    assert "quantisation of activations" in source.notes[0]
    assert "quantisation of the cache" in source.notes[1]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_one_scale_for_a_whole_matrix(symmetric: bool, tmp_path: Path) -> None:
    settings = compressed_settings(8, -1, symmetric, "naive-quantized")
    settings["config_groups"]["group_0"]["weights"] |= {"strategy": "tensor", "group_size": None}

    def quantise(name: str, weight: np.ndarray) -> Quantised:
        one = quantised(weight.reshape(1, -1).repeat(4, axis=0), 8, -1, symmetric=symmetric)
        spread = np.ones((len(weight), 1), int)
        return Quantised(
            8,
            one.codes[3].reshape(weight.shape),
            one.zeros[3] * spread,
            (one.scales[3] * spread).astype(np.float16),
            np.zeros(weight.shape[1], int),
        )

    def parts_of(matrix: Quantised) -> Parts:
        parts = byte_parts(matrix, symmetric=symmetric)
        return {name: part[:1, 0] if part.shape[1] == 1 else part for name, part in parts.items()}

    check(tmp_path / "m", write_prequantised(tmp_path / "m", settings, quantise, parts_of, **SIZES))


def test_a_quantised_embedding_has_offsets_instead_of_zero_points(tmp_path: Path) -> None:
    path = tmp_path / "m"
    contents = dict(write(path, gptq_settings(4, 32, False), gptq_parts, hidden=128, vocab=320))
    name = "model.embed_tokens.weight"
    matrix = quantised(np.asarray(contents[name]), 4, 32, symmetric=False)
    parts = {f"model.embed_tokens.{part}": values for part, values in gptq_parts(matrix).items()}
    replace_tensors(path, {name: None, **parts})
    tensor = open_folder(path, model_id="m").tensors[name]
    assert tensor.format.name == "int4-offset"
    np.testing.assert_array_equal(tensor.read(0, 320), matrix.values())


def replace_tensors(path: Path, changes: Mapping[str, np.ndarray | None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = {**load_file(path / "model.safetensors"), **changes}
    save_file(
        {name: np.ascontiguousarray(part) for name, part in tensors.items() if part is not None},
        path / "model.safetensors",
    )


def test_narrow_stripes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stripes of few columns, of which few are kept: pieces that begin in one and end in another."""
    monkeypatch.setattr(stripes.Stripes.__init__, "__kwdefaults__", {"stripe": 3 * 128 * 4, "kept": 4000})
    check(tmp_path / "g", write(tmp_path / "g", gptq_settings(4, 32, False), gptq_parts, shuffled=True))
    check(tmp_path / "a", write(tmp_path / "a", awq_settings(32, "gemm"), awq_parts))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_left_in_floating_point_may_be_narrowed(tied: bool, tmp_path: Path) -> None:
    """It is read whole for each token; an embedding of its own is not."""
    write(tmp_path / "m", awq_settings(32, "gemm"), awq_parts, tied=tied)
    tensors = open_source(str(tmp_path / "m")).tensors
    head = EMBEDDING if tied else HEAD
    assert head_of(tensors) == head
    kept, narrowed = plan_formats(tensors, None), plan_formats(tensors, None, "int8")
    assert (kept[head], has_wide_head(tensors, kept)) == (FP16, True)
    assert (narrowed, has_wide_head(tensors, narrowed)) == ({**kept, head: DEFAULT_INT8}, False)
    dense = {name: replace(tensor, format=FP16) for name, tensor in tensors.items()}
    assert not has_wide_head(dense, plan_formats(dense, None))
    assert plan_formats(dense, "int4", "int8")[head] == DEFAULT_INT8
