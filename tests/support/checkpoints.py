"""The tiny checkpoints behind the `built` bundles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from support.gguf_models import write_llama_gguf
from support.hf_models import random_weights, write_llama_folder, write_weights

PRECISIONS = ("fp32", "fp16", "int8", "int4")
GGUF_TYPES = ("Q4_0", "Q4_1", "Q8_0", "mixed")

_MIXED = {
    "token_embd": "Q8_0",
    "attn_q": "Q4_0",
    "attn_k": "Q4_1",
    "attn_v": "Q8_0",
    "attn_output": "F16",
    "ffn_gate": "BF16",
    "ffn_up": "Q4_1",
    "ffn_down": "F32",
    "output": "Q4_0",
}


def write_checkpoint(folder: Path, stored: str) -> tuple[str, str | None]:
    """Write the checkpoint of `built(stored)` into `folder`; return its path and the --precision that it is for."""
    if stored in PRECISIONS:
        path = write_llama_folder(folder / "llama", attention_bias=True)
        write_weights_of_trained_size(path)
        return str(path), stored
    types = _MIXED if stored == "mixed" else stored
    return str(write_llama_gguf(folder / "llama.gguf", types=types, tied=stored != "mixed")), None


def write_weights_of_trained_size(path: Path) -> None:
    """Give a checkpoint an embedding as small as in trained models, where the norms' epsilon matters."""
    weights = random_weights(json.loads((path / "config.json").read_text()))
    weights["model.embed_tokens.weight"] *= np.float32(0.1)
    write_weights(path, weights)
