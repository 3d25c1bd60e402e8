"""References for the bundles of `tiny_tensorrt` and `tiny_bundle`: what the model in NumPy computes, in place of
PyTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from llama_export.runtime.bundle import reference_file
from llama_export.runtime.proof.reference import (
    EXACT,
    ORIGINAL,
    SCHEMA_VERSION,
    Identity,
    Index,
    Logits,
    Prompt,
    Reference,
    WeightRecord,
    compress,
    fingerprint,
)
from llama_export.runtime.proof.reference_file import save
from support.tiny_bundle import Array, TinyLlama, byte_tokenizer

PROMPTS, CONTINUATION = (9, 5, 7), 6
"""Tokens of each prompt, and after it."""
MODEL_SHA256 = hashlib.sha256(b"tests/tiny").hexdigest()
_FORMATS = {"float32": "fp32", "float16": "fp16"}


def write_reference(folder: Path, llama: TinyLlama, weights: Mapping[str, Array]) -> Reference:
    """Write both references of a bundle that is being made, which are alike; return the exact one. weights: as its data
    file holds them, by name.
    """
    exact = tiny_reference(llama, weights)
    save(exact, folder / reference_file(EXACT))
    original = replace(exact.index, kind=ORIGINAL, precision=None, weights=(), tables=())
    save(replace(exact, index=original), folder / reference_file(ORIGINAL))
    return exact


def tiny_reference(llama: TinyLlama, weights: Mapping[str, Array]) -> Reference:
    """The exact reference."""
    rng = np.random.default_rng(21)
    prompts, logits = [], []
    for number, length in enumerate(PROMPTS):
        ids = [int(token) for token in rng.integers(0, llama.vocab, length)]
        for _ in range(CONTINUATION):
            ids.append(int(llama.logits(ids)[-1].argmax()))
        prompts.append(Prompt(f"text {number}", "", tuple(ids), length, CONTINUATION))
        logits.append(compress(llama.logits(ids).astype(np.float32)))
    index = Index(
        schema_version=SCHEMA_VERSION,
        kind=EXACT,
        model_id="tests/tiny",
        revision=None,
        dtype="F32",
        precision="fp32",
        adapter=None,
        identity=_identity(llama),
        prompts=tuple(prompts),
        weights=tuple(_record(name, array) for name, array in weights.items()),
        tables=(),
        layers=(),
        full=False,
        tools={},
    )
    return Reference(index, Logits.joined(logits), None)


def _identity(llama: TinyLlama) -> Identity:
    """tokenizer_sha256: of the tokenizer.json that `write_bundle` writes."""
    return Identity(
        MODEL_SHA256,
        hashlib.sha256(byte_tokenizer().to_str(pretty=True).encode()).hexdigest(),
        llama.layers,
        llama.hidden,
        llama.heads,
        llama.kv_heads,
        llama.head_dim,
        llama.vocab,
    )


def _record(name: str, array: Array) -> WeightRecord:
    sha256, norm = fingerprint(iter([array.astype(np.float32)]))
    return WeightRecord(name, _FORMATS[array.dtype.name], array.shape, 0, {"values": name}, sha256, norm)
