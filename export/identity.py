"""Which checkpoint a bundle or a reference is of: one hash that takes no longer for a large model than for a small."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import LlamaExportError
from ..optimize.tensors import SourceTensor
from ..runtime.bundle import Bundle
from ..runtime.proof.reference import Identity
from .config import known_facts
from .lora.peft_folder import Adapter, LowRank
from .safetensors_file import StoredTensor
from .source import Source

TOKENIZER = "tokenizer.json"


def model_sha256(source: Source, adapters: Sequence[Adapter] = ()) -> str:
    """SHA-256 over what a model computes with, as far as a few rows tell: the facts of its config, and of every tensor
    its name, shape, stored type, and first and last row (of a vector all).

    source: before `adapters` are merged into it. adapters: those that are part of the weights, of which rows count in
    the same way. Training touches every matrix, so that a fine-tune has another hash.
    """
    digest = hashlib.sha256()

    def add(*facts: Any) -> None:
        digest.update(json.dumps(facts, sort_keys=True).encode() + b"\n")

    add("config", known_facts(source.config))
    for name in sorted(source.tensors):
        tensor = source.tensors[name]
        add(name, tensor.shape, tensor.dtype)
        for start, stop in _looked_at(tensor.shape):
            digest.update(np.ascontiguousarray(tensor.read(start, stop), "<f4").data)
    for adapter in adapters:
        add("adapter", adapter.weight)
        thin = {f"{name}.{half}": matrix for name, part in adapter.parts.items() for half, matrix in _halves(part)}
        for name, matrix in sorted({**thin, **adapter.whole}.items()):
            add(name, matrix.shape)
            for start, stop in _looked_at(matrix.shape):
                digest.update(np.ascontiguousarray(matrix.floats(start, stop), "<f4").data)
        add([(name, part.scale) for name, part in sorted(adapter.parts.items())])
    return digest.hexdigest()


def _looked_at(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Rows of a tensor: the first and the last of a matrix, all of a vector."""
    return ((0, shape[0]),) if len(shape) == 1 else ((0, 1), (shape[0] - 1, shape[0]))


def _halves(part: LowRank) -> tuple[tuple[str, StoredTensor], ...]:
    return (("a", part.a), ("b", part.b))


def check_same_model(bundle: Bundle, source: Source, sha256: str) -> None:
    """Raise LlamaExportError unless `source`, whose `model_sha256` this is, is what a bundle was made of."""
    manifest, shape = bundle.manifest, source.shape
    what = f"The bundle {bundle.path} was made of {manifest.model.id}, and {source.model_id} is another model"
    sizes = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")
    different = [name for name in sizes if getattr(manifest.shape, name) != getattr(shape, name)]
    if different:
        raise LlamaExportError(f"{what}, with other {different[0]}; name the checkpoint that the bundle was made of.")
    if manifest.model.sha256 not in (None, sha256):
        merged = [adapter.name for adapter in manifest.adapters if adapter.file is None]
        advice = f"the same --adapter ({', '.join(merged)})" if merged else "without --adapter"
        raise LlamaExportError(
            f"{what}, by the hash of its weights and config; name the checkpoint that the bundle was made of, {advice}."
        )
    tokenizer = hashlib.sha256(source.content(TOKENIZER)).hexdigest()
    if TOKENIZER in manifest.files and manifest.files[TOKENIZER].sha256 != tokenizer:
        raise LlamaExportError(f"{what}, with another {TOKENIZER}; name the checkpoint that the bundle was made of.")


def identity_of(source: Source, sha256: str) -> Identity:
    """What a reference says of its model. sha256: as `model_sha256` gives it."""
    shape = source.shape
    return Identity(
        model_sha256=sha256,
        tokenizer_sha256=hashlib.sha256(source.content(TOKENIZER)).hexdigest(),
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab=shape.vocab,
    )


def stored_type(source: Source) -> str:
    """The type that most of the checkpoint's numbers are stored in, such as BF16 or Q4_1."""
    sizes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.dtype] += _numbers(tensor)
    return max(sorted(sizes), key=lambda dtype: sizes[dtype])


def _numbers(tensor: SourceTensor) -> int:
    return int(np.prod(tensor.shape))
