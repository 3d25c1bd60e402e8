"""Quantises a Hugging Face folder by nvidia-modelopt, and writes it with the weights that come of it, in float32.

    modelopt_quantise.py FOLDER OUTPUT CONFIG --text FILE [--tokens 20000]

CONFIG is the name of one of modelopt's configs of quantised weights (INT4_AWQ_CFG). Scales that it puts before a
projection are multiplied into the weights, which changes no result but for float32's roundings. The bytes that its
format would take lie beside: half a byte a weight, and in float16 a scale for each block, one for each column where
inputs are scaled, and whatever is not quantised.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

LENGTH = 512
COUNTED = "counted_bytes.json"
"""As frontier_tools.COUNTED, whose imports this environment need not have."""


def calibrated(model: Any, config: dict[str, Any], ids: list[int]) -> Any:
    """The model with quantisers, after windows of the text went through it."""

    def forward(given: Any) -> None:
        with torch.inference_mode():
            for start in range(0, len(ids), LENGTH):
                given(torch.tensor([ids[start : start + LENGTH]]))

    return mtq.quantize(model, copy.deepcopy(config), forward)


def weight_bytes(module: Any) -> int:
    """The bytes of a quantised projection: codes, scales of blocks, scales of its inputs."""
    rows, columns = module.weight.shape
    block = module.weight_quantizer.block_sizes[-1]
    scaled = getattr(module.input_quantizer, "_pre_quant_scale", None) is not None
    return int(rows * columns * module.weight_quantizer.num_bits // 8 + 2 * rows * math.ceil(columns / block)) + (
        2 * columns if scaled else 0
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("config")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20000)
    job = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(job.folder / "tokenizer.json"))
    ids = tokenizer.encode(job.text.read_text(encoding="utf-8"), add_special_tokens=False).ids[: job.tokens]
    plain = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32).eval()
    names = {name: tensor.numel() for name, tensor in plain.named_parameters()}  # a tied head once
    model = calibrated(plain, getattr(mtq, job.config), ids)
    quantised = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }
    sizes = {name: 2 * count for name, count in names.items()}
    sizes |= {f"{name}.weight": weight_bytes(module) for name, module in quantised.items()}
    mtq.fold_weight(model, keep_attrs=True)
    with torch.no_grad():
        for module in quantised.values():
            scales = getattr(module.input_quantizer, "_pre_quant_scale", None)
            if scales is not None:
                module.weight.mul_(scales.reshape(1, -1))
    job.output.mkdir(parents=True)
    parameters = dict(model.named_parameters())
    tensors = {name: parameters[name].detach().contiguous() for name in names}
    save_file(tensors, job.output / "model.safetensors", {"format": "pt"})
    beside = [path for path in job.folder.iterdir() if path.suffix != ".safetensors"]
    for path in beside:
        shutil.copy(path, job.output / path.name)
    total = sum(sizes.values()) + sum(path.stat().st_size for path in beside)
    (job.output / COUNTED).write_text(json.dumps({"bytes": total}), encoding="utf-8")
    print(f"{len(quantised)} projections quantised")


if __name__ == "__main__":
    main()
