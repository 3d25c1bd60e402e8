"""Checkpoints written and read by compressed-tensors itself, and loaded by transformers: the same values here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.export.source import open_source
from safetensors.torch import save_file
from support.hf_models import random_weights, write_json, write_llama_folder

compressed_tensors = pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402

SIZES = {"layers": 2, "hidden": 96, "heads": 4, "kv_heads": 2, "head_dim": 24, "ffn": 192}


def scheme_of(bits: int, strategy: str, symmetric: bool, activations: bool) -> QuantizationScheme:
    group = {"group_size": 32} if strategy == "group" else {}
    weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, **group)
    dynamic = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if activations else None
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=dynamic)


def parameters(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """Scales and zero points by least and largest value, as an observer of theirs finds them."""
    args, (rows, columns) = scheme.weights, weight.shape
    shape = {"group": (rows, columns // 32, 32), "channel": (rows, 1, columns), "tensor": (1, 1, rows * columns)}
    parts = weight.reshape(shape[args.strategy])
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    most, middle = 2**args.num_bits - 1, 2 ** (args.num_bits - 1)
    if args.symmetric:
        scale = 2 * torch.maximum(-low, high) / most
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / most
        zero = torch.round(-low / scale) - middle
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    return {
        "weight": weight,
        "weight_scale": scale,
        "weight_zero_point": zero.clamp(-middle, middle - 1).to(torch.int8),
    }


def write(path: Path, format: str, scheme: QuantizationScheme) -> dict[str, np.ndarray]:
    """A checkpoint whose projections their compressor wrote; returns what it reads back."""
    write_llama_folder(path, **SIZES)
    config = json.loads((path / "config.json").read_text())
    compressor: Any = BaseCompressor.get_value_from_registry(format)
    stored: dict[str, torch.Tensor] = {}
    expected: dict[str, np.ndarray] = {}
    for name, values in random_weights(config).items():
        weight = torch.from_numpy(values)
        if "_proj" not in name:
            stored[name], expected[name] = weight, values
            continue
        parts = compressor.compress(parameters(weight, scheme), scheme)
        stored |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        expected[name] = compressor.decompress(parts, scheme)["weight"].numpy()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme.model_dump(mode="json"), "format": format}},
        "ignore": ["lm_head"],
    }
    write_json(path / "config.json", {**config, "quantization_config": settings})
    return expected


CASES = [
    *[("pack-quantized", bits, strategy) for bits in (2, 3, 4, 6, 8) for strategy in ("group", "channel")],
    *[("int-quantized", 8, strategy) for strategy in ("group", "channel", "tensor")],
    ("naive-quantized", 4, "channel"),
]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("format", "bits", "strategy"), CASES)
def test_their_compressor(format: str, bits: int, strategy: str, symmetric: bool, tmp_path: Path) -> None:
    expected = write(tmp_path / "m", format, scheme_of(bits, strategy, symmetric, format == "int-quantized"))
    source = open_source(str(tmp_path / "m"))
    assert source.tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(source.tensors[name].read(0, len(values)), values, err_msg=name)
    weight = source.tensors["model.layers.1.mlp.down_proj.weight"]
    assert weight.format.bits == (4 if bits <= 4 else 8)
    assert weight.format.zeros != symmetric


@pytest.mark.parametrize(("format", "bits"), [("pack-quantized", 4), ("int-quantized", 8)])
def test_transformers_loads_the_same(format: str, bits: int, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig, LlamaForCausalLM

    write(tmp_path / "m", format, scheme_of(bits, "channel", False, False))
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    source = open_source(str(tmp_path / "m"))
    state = model.state_dict()
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(tensor.read(0, tensor.shape[0]), state[name].numpy(), err_msg=name)
