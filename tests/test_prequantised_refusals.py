"""Quantised checkpoints that are not read, and damaged ones: one sentence each, and before any download if possible."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.export.folder import read_config
from llama_export.export.prequantised import check_quantisation
from llama_export.export.source import open_source
from safetensors.numpy import load_file, save_file
from support.hf_models import write_llama_folder
from support.prequantised import awq_gemv_parts, awq_parts, byte_parts, compressed_parts, gptq_parts
from test_prequantised import SIZES, awq_settings, compressed_settings, gptq_settings, write

READ = "read are GPTQ, AWQ, integers of compressed-tensors, and GGUF files"


def compressed(**changes: Any) -> dict[str, Any]:
    return compressed_settings(4, 32, True) | changes


def compressed_weights(**changes: Any) -> dict[str, Any]:
    settings = copy.deepcopy(compressed_settings(4, 32, True))
    settings["config_groups"]["group_0"]["weights"] |= changes
    return settings


METHODS: dict[str, tuple[Any, str]] = {
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, f"'bitsandbytes', which stores numbers .*; {READ}"),
    "int8 of old": ({"load_in_8bit": True}, "'bitsandbytes', which"),
    "fp8": ({"quant_method": "fp8"}, "'fp8', which stores 8-bit floating point; read are"),
    "unknown": ({"quant_method": "hqq"}, f"quantised with 'hqq'; {READ}"),
    "unnamed": ({"bits": 4}, "quantised with 'an unnamed method'"),
    "long": ({"quant_method": "x" * 1000}, f"'{'x' * 40}';"),
    "no object": ("gptq", "quantization_config is no object"),
    "marlin": (gptq_settings(4, 128, True, is_marlin_format=True), "GPTQ in the format 'marlin'; gptq and gptq_v2"),
    "bitblas": (gptq_settings(4, 128, True, checkpoint_format="bitblas"), "GPTQ in the format 'bitblas'"),
    "five bits": (gptq_settings(5, 128, True), "GPTQ in 5 bits; 2, 3, 4, 8 are read"),
    "no bits": ({"quant_method": "gptq"}, "GPTQ in None bits"),
    "bits of a list": ({"quant_method": "gptq", "bits": [4]}, r"GPTQ in \[4\] bits"),
    "gemv_fast": (awq_settings(128, "gemv_fast"), "AWQ in the version 'gemv_fast'; gemm and gemv are read"),
    "llm-awq": (awq_settings(128, "gemm") | {"backend": "llm-awq"}, "AWQ in the version 'llm-awq'"),
    "awq of 8": (awq_settings(128, "gemm") | {"bits": 8}, "AWQ in 8 bits; 4 are read"),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4},
        "AutoRound in the packing_format 'none'; auto_round:auto",
    ),
    "fp8 compressed": (compressed(format="float-quantized"), "in the format 'float-quantized'; the formats pack-"),
    "nvfp4": (compressed(format="nvfp4-pack-quantized"), "in the format 'nvfp4-pack-quantized'"),
    "marlin 24": (compressed(format="marlin-24"), "in the format 'marlin-24'"),
    "sparse": (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "with the sparsity 'sparse-24-bitmask'"),
    "frozen": (compressed(quantization_status="frozen"), "with the status 'frozen'; 'compressed' is read"),
    "transforms": (compressed(transform_config={"config_groups": {"R1": {}}}), "with a transform_config"),
    "no groups": (compressed(config_groups={}), "with config_groups that tell of no weights"),
    "groups of nothing": (compressed(config_groups=[1]), "with config_groups that tell of no weights"),
    "float weights": (compressed_weights(type="float", num_bits=8), "as 'float' of 8 bits"),
    "nine bits": (compressed_weights(num_bits=9), "in 9 bits; 1 to 8 are read"),
    "blocks": (compressed_weights(strategy="block"), "with the strategy 'block'; group, channel, tensor are read"),
    "mixed": (
        compressed(
            format="mixed-precision", config_groups={"a": {"format": "mxfp4-pack-quantized", "weights": {"x": 1}}}
        ),
        "in the format 'mxfp4-pack-quantized'",
    ),
    "weights of a word": (compressed(config_groups={"a": {"weights": "W4"}}), "with weights of 'W4'"),
}


@pytest.mark.parametrize("case", METHODS)
def test_methods_that_are_refused(case: str) -> None:
    settings, message = METHODS[case]
    with pytest.raises(LlamaExportError, match=message) as caught:
        check_quantisation(settings)
    assert "\n" not in str(caught.value)
    assert case == "no object" or "or the unquantised checkpoint" in str(caught.value)


def test_config_alone_decides(tmp_path: Path) -> None:
    """What the hub's download asks before it fetches any weight."""
    write(tmp_path / "m", METHODS["nf4"][0], gptq_parts)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(LlamaExportError, match="quantised with 'bitsandbytes'"):
        read_config(tmp_path / "m")


def test_packed_tensors_without_settings(tmp_path: Path) -> None:
    write(tmp_path / "m", {}, gptq_parts)
    with pytest.raises(LlamaExportError, match="is stored as I32, but F32, F16, BF16 are read"):
        open_source(str(tmp_path / "m"))


Change = Callable[[dict[str, np.ndarray]], object]
Q = "model.layers.0.self_attn.q_proj"
GPTQ = (gptq_settings(4, 32, False), gptq_parts)
SORTED = (gptq_settings(4, 32, False, desc_act=True), gptq_parts)
SYMMETRIC = (gptq_settings(4, 32, True), gptq_parts)
AWQ = (awq_settings(32, "gemm"), awq_parts)
GEMV = (awq_settings(32, "gemv"), awq_gemv_parts)
PACKED = (compressed_settings(4, 32, False), lambda matrix: compressed_parts(matrix, symmetric=False))
BYTES = (compressed_settings(4, 32, False, "int-quantized"), lambda matrix: byte_parts(matrix, symmetric=False))


def put(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda tensors: tensors.update({f"{Q}.{part}": change(tensors[f"{Q}.{part}"])})


def drop(part: str) -> Change:
    return lambda tensors: tensors.pop(f"{Q}.{part}")


DAMAGE: dict[str, tuple[tuple[Any, Any], Change, str]] = {
    "no scales": (GPTQ, drop("scales"), f"has no tensor {Q}.scales, which GPTQ needs beside {Q}"),
    "no zeros": (GPTQ, drop("qzeros"), f"has no tensor {Q}.qzeros"),
    "no weights": (GPTQ, drop("qweight"), f"has no tensor {Q}.qweight"),
    "twice": (
        GPTQ,
        lambda tensors: tensors.update({f"{Q}.weight": np.ones((160, 128), np.float16)}),
        f"holds {Q}.weight beside what GPTQ stores for it",
    ),
    "no order": (SORTED, drop("g_idx"), f"has no tensor {Q}.g_idx"),
    "short": (
        GPTQ,
        put("qweight", lambda x: x[1:]),
        rf"{Q}.qweight has the shape \[15, 160\], but GPTQ stores a weight",
    ),
    "scales of others": (GPTQ, put("scales", lambda x: x[:, :8]), rf"{Q}.scales has the shape .* with \[groups, 160\]"),
    "too many groups": (GPTQ, put("scales", lambda x: x[[0, 0, 0]]), f"{Q}.qzeros has the shape"),
    "zeros of others": (GPTQ, put("qzeros", lambda x: x[:, 1:]), rf"{Q}.qzeros has the shape \[4, 19\]"),
    "int16": (
        GPTQ,
        put("qweight", lambda x: x.astype(np.int16)),
        f"{Q}.qweight is stored as I16, but GPTQ stores it as",
    ),
    "integer scales": (
        GPTQ,
        put("scales", lambda x: x.astype(np.int32)),
        f"{Q}.scales is stored as I32, .* F32 or F16",
    ),
    "order beyond": (SORTED, put("g_idx", lambda x: x + 1), f"{Q}.g_idx does not put 32 columns into each group"),
    "order below": (SORTED, put("g_idx", lambda x: -x), f"{Q}.g_idx does not put 32 columns into each group"),
    "uneven order": (SORTED, put("g_idx", lambda x: np.maximum(x, 1)), "does not put 32 columns into each group"),
    "not symmetric": (
        SYMMETRIC,
        put("qzeros", lambda x: x),
        "says sym: true, but .*qzeros holds the zero point 0 instead of 8",
    ),
    "foreign": (
        GPTQ,
        lambda tensors: tensors.update({f"{Q}.qscale": np.ones(3, np.int8)}),
        f"holds the tensor {Q}.qscale as",
    ),
    "foreign float": (
        GPTQ,
        lambda tensors: tensors.update({"x.weight": np.ones(3, np.float16)}),
        "holds the tensor x.weight",
    ),
    "fifth layer": (
        GPTQ,
        lambda tensors: tensors.update({"model.layers.5.mlp.up_proj.scales": np.ones((1, 1), np.float16)}),
        "holds model.layers.5.mlp.up_proj.scales, but config.json describes no matrix model.layers.5.mlp.up_proj",
    ),
    "norm": (
        GPTQ,
        lambda tensors: tensors.update({"model.norm.scales": np.ones((1, 1), np.float16)}),
        "config.json describes no matrix model.norm.weight",
    ),
    "missing module": (
        GPTQ,
        lambda tensors: [tensors.pop(f"{Q}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")],
        f"has no tensor {Q}.weight",
    ),
    "awq as gptq": (
        (gptq_settings(4, 32, False), awq_parts),
        lambda tensors: None,
        "qweight has the shape .* but GPTQ stores a weight of",
    ),
    "awq scales": (AWQ, put("scales", lambda x: x.T), rf"{Q}.scales has the shape \[160, 4\]"),
    "awq zeros": (AWQ, put("qzeros", lambda x: x[1:]), rf"{Q}.qzeros has the shape \[3, 20\]"),
    "awq of gptq": ((awq_settings(32, "gemm"), gptq_parts), lambda tensors: None, "qweight has the shape"),
    "gemv zeros": (GEMV, put("qzeros", lambda x: x[:, :0]), rf"{Q}.qzeros has the shape \[160, 0\]"),
    "gemv scales": (GEMV, put("scales", lambda x: x[:, :1]), rf"{Q}.scales has the shape \[160, 1\]"),
    "packed": (PACKED, put("weight_packed", lambda x: x[:, 1:]), rf"{Q}.weight_packed has the shape \[160, 15\]"),
    "packed shape": (
        PACKED,
        put("weight_shape", lambda x: x[::-1]),
        rf"{Q}.weight_shape says \[128, 160\], but config",
    ),
    "packed zeros": (
        PACKED,
        put("weight_zero_point", lambda x: x.T),
        rf"{Q}.weight_zero_point has the shape \[4, 20\]",
    ),
    "packed scales": (PACKED, drop("weight_scale"), f"has no tensor {Q}.weight_scale"),
    "byte scales": (BYTES, put("weight_scale", lambda x: x[:1]), rf"{Q}.weight_scale has the shape \[1, 4\]"),
    "groups of other sizes": (BYTES, put("weight_scale", lambda x: x[:, :3]), "groups of 32 columns"),
    "floats in bytes": (
        BYTES,
        put("weight", lambda x: x.astype(np.float16)),
        f"{Q}.weight is stored as F16, but compressed-",
    ),
    "no bytes": (BYTES, drop("weight"), f"has no tensor {Q}.weight, which compressed-tensors needs beside"),
    "gibberish": (
        PACKED,
        lambda tensors: tensors.update({f"{Q}.weight_mask": np.ones(3, np.int32)}),
        "weight_mask as I32",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[Any, Any]], Path]:
    """A checkpoint by what it is made of, written once."""
    made: dict[int, Path] = {}

    def folder(kind: tuple[Any, Any]) -> Path:
        if id(kind) not in made:
            path = made[id(kind)] = tmp_path_factory.mktemp("prequantised") / "m"
            write(path, kind[0], kind[1])
        return made[id(kind)]

    return folder


def damaged(path: Path, source: Path, change: Change) -> Path:
    path.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(part) for name, part in tensors.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_by_name(case: str, folders: Callable[[tuple[Any, Any]], Path], tmp_path: Path) -> None:
    kind, change, message = DAMAGE[case]
    path = damaged(tmp_path / "m", folders(kind), change)
    with pytest.raises(LlamaExportError, match=message) as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_beyond_the_bits_of_config(folders: Callable[[tuple[Any, Any]], Path], tmp_path: Path) -> None:
    path = damaged(tmp_path / "m", folders(BYTES), put("weight", lambda x: x * 2))
    tensor = open_source(str(path)).tensors[f"{Q}.weight"]
    with pytest.raises(LlamaExportError, match=f"{Q}.weight holds numbers that do not fit the 4 bits"):
        tensor.read(0, 160)


def test_groups_that_no_block_divides(tmp_path: Path) -> None:
    write(tmp_path / "m", gptq_settings(4, 40, False), gptq_parts, group=40)
    with pytest.raises(LlamaExportError, match="in groups of 40 columns, but groups of a multiple of 16 are read"):
        open_source(str(tmp_path / "m"))


def test_version_two_said_to_be_one(tmp_path: Path) -> None:
    """Off by one everywhere: the checkpoint would compute, and badly."""
    settings: Mapping[str, Any] = gptq_settings(4, 32, True)
    write(tmp_path / "m", settings, lambda matrix: gptq_parts(matrix, v2=True), symmetric=True)
    with pytest.raises(LlamaExportError, match="holds the zero point 9 instead of 8; correct its checkpoint_format"):
        open_source(str(tmp_path / "m"))


def test_plain_checkpoints_have_no_native_precision(tmp_path: Path) -> None:
    source = open_source(str(write_llama_folder(tmp_path / "m", **SIZES)))
    assert source.native_precision is None
