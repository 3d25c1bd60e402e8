"""LoRA adapters made by peft, and what they make of a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM


def write_adapter(model: Path, folder: Path, *, seed: int = 0, size: float = 0.1, **settings: Any) -> Path:
    """Train nothing: give the checkpoint `model` a random adapter by peft, save it to `folder`, and return that.

    size: deviation of the numbers in lora_B, which peft begins with zeros. settings: of peft's LoraConfig.
    """
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.normal_(std=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return folder


def merged_by_peft(model: Path, *adapters: Path) -> torch.nn.Module:
    """The checkpoint with the adapters merged in, one after another, by peft."""
    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for adapter in adapters:
        merged = peft.PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    return merged.eval()
