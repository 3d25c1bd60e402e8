"""A reference for the bundles of `tiny_tensorrt`: what the model in NumPy computes, in place of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from llama_export.runtime.reference import (
    SCHEMA_VERSION,
    Index,
    Logits,
    Prompt,
    Reference,
    WeightRecord,
    compress,
    fingerprint,
    save_reference,
)
from support.tiny_bundle import Array, TinyLlama

PROMPTS, PROMPT_TOKENS, CONTINUATION = 3, 9, 6
_FORMATS = {"float32": "fp32", "float16": "fp16"}


def write_reference(folder: Path, llama: TinyLlama, weights: Mapping[str, Array]) -> Reference:
    """Write the reference of a bundle that is being made. weights: as its data file holds them, by name."""
    rng = np.random.default_rng(21)
    prompts, logits = [], []
    for number in range(PROMPTS):
        ids = [int(token) for token in rng.integers(0, llama.vocab, PROMPT_TOKENS)]
        for _ in range(CONTINUATION):
            ids.append(int(llama.logits(ids)[-1].argmax()))
        prompts.append(Prompt(f"text {number}", "", tuple(ids), PROMPT_TOKENS, CONTINUATION))
        logits.append(compress(llama.logits(ids).astype(np.float32)))
    records = tuple(_record(name, array) for name, array in weights.items())
    index = Index(SCHEMA_VERSION, "tests/tiny", None, llama.vocab, tuple(prompts), records, (), {})
    reference = Reference(index, Logits.joined(logits))
    save_reference(reference, folder)
    return reference


def _record(name: str, array: Array) -> WeightRecord:
    sha256, norm = fingerprint(iter([array.astype(np.float32)]))
    return WeightRecord(name, _FORMATS[array.dtype.name], array.shape, 0, {"values": name}, sha256, norm)
