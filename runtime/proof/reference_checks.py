"""What cannot be in a reference, although its file is whole: each a few words for the sentence that refuses it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np

from .reference import EXACT, KINDS, Identity, Index, Layers, Logits, Prompt, Reference

MOST_POSITIONS = 1 << 17
"""Tokens of all prompts; 200 MB in memory."""
_MOST_VOCAB = 1 << 24
_MOST_LAYERS, _MOST_WIDTH = 1 << 12, 1 << 20
_MAX_RANK, _MAX_SIZE = 4, 1 << 31
"""Of a weight, or of a table that a graph has."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SLACK = 1e-6
"""What the log of a sum may lie below its largest term, relative to it: float32 rounds the one and not the other."""


def index_problems(index: Index) -> Iterator[str]:
    """What is wrong with the facts."""
    yield from _identity_problems(index.identity)
    if index.kind not in KINDS:
        yield f"a kind {index.kind!r}, which is neither of {' and '.join(KINDS)}"
    if not index.prompts:
        yield "no prompts"
    if len({prompt.name for prompt in index.prompts}) != len(index.prompts):
        yield "two prompts of one name"
    for prompt in index.prompts:
        if not _possible(prompt, index.vocab):
            yield f"a prompt {prompt.name!r} out of range"
    if index.positions > MOST_POSITIONS:
        yield f"{index.positions} tokens, more than the {MOST_POSITIONS} that are read"
    if list(index.layers) != sorted({layer for layer in index.layers if 0 <= layer < index.identity.layers}):
        yield "samples of layers that the model does not have, or not in order"
    if index.kind == EXACT and not index.weights:
        yield "no weights"
    yield from _weight_problems(index)
    yield from _input_problems(index)


def _identity_problems(identity: Identity) -> Iterator[str]:
    for digest in (identity.model_sha256, identity.tokenizer_sha256):
        if not _SHA256.fullmatch(digest):
            yield "a model or tokenizer that is named by no SHA-256"
    sizes = (
        ("vocabulary", identity.vocab, _MOST_VOCAB),
        ("number of layers", identity.layers, _MOST_LAYERS),
        *((name, getattr(identity, name), _MOST_WIDTH) for name in ("hidden", "heads", "kv_heads", "head_dim")),
    )
    for name, size, most in sizes:
        if not 0 < size <= most:
            yield f"a {name} of {size}, which is out of range"
    if identity.kv_heads * identity.head_dim > _MOST_WIDTH:
        yield "more channels in its cache than any model"


def _possible(prompt: Prompt, vocab: int) -> bool:
    continuation = len(prompt.ids) - prompt.prompt_tokens
    return (
        prompt.prompt_tokens > 0
        and 0 <= prompt.proven <= continuation
        and all(0 <= token < vocab for token in prompt.ids)
    )


def _weight_problems(index: Index) -> Iterator[str]:
    for weight in (*index.weights, *index.tables):
        if not 1 <= len(weight.shape) <= _MAX_RANK or not all(1 <= size <= _MAX_SIZE for size in weight.shape):
            yield f"a weight {weight.name!r} of an impossible shape"
        if not 0 <= weight.row <= _MAX_SIZE or not weight.norm >= 0 or not _SHA256.fullmatch(weight.sha256):
            yield f"a weight {weight.name!r} out of range"


def _input_problems(index: Index) -> Iterator[str]:
    if len({record.name for record in index.inputs}) != len(index.inputs):
        yield "two scales for the input of one weight"
    for record in index.inputs:
        if not 0 < record.scale < math.inf:
            yield f"a scale of the input of {record.name!r} out of range"


def number_problems(reference: Reference) -> Iterator[str]:
    """What is wrong with the arrays, which have the dtypes and shapes that the index says."""
    index, logits = reference.index, reference.logits
    yield from _logit_problems(logits, index.vocab)
    for number, prompt in enumerate(index.prompts):
        chosen = reference.of_prompt(number).top_ids[prompt.prompt_tokens - 1 :, 0][: prompt.proven]
        if tuple(chosen.tolist()) != prompt.ids[prompt.prompt_tokens :][: prompt.proven]:
            yield f"a continuation of {prompt.name!r} that its own logits would not choose"
    if reference.layers is not None:
        yield from _layer_problems(reference.layers, index.identity)


def _logit_problems(logits: Logits, vocab: int) -> Iterator[str]:
    for name in ("top_logits", "logsumexp", "sampled"):
        if not np.isfinite(getattr(logits, name)).all():
            yield f"{name} that are not finite"
            return
    for name in ("top_ids", "sample_ids"):
        ids = getattr(logits, name)
        if not 0 <= ids.min() <= ids.max() < vocab:
            yield f"{name} that name tokens outside of the vocabulary"
    if (np.diff(np.sort(logits.top_ids, axis=1), axis=1) == 0).any() or (np.diff(logits.sample_ids) <= 0).any():
        yield "a token twice among those that it keeps"
    best = logits.top_logits[:, 0].astype(np.float64)
    if (np.diff(logits.top_logits, axis=1) > 0).any():
        yield "top_logits that do not fall"
    if (logits.logsumexp < best - _SLACK * np.abs(best)).any():
        yield "a log of a sum below its largest part"
    if (logits.logsumexp > best + math.log(vocab) + _SLACK * (1 + np.abs(best))).any():
        yield "a log of a sum beyond all of its parts"


def _layer_problems(layers: Layers, identity: Identity) -> Iterator[str]:
    for name in ("hidden", "keys", "values"):
        if not np.isfinite(getattr(layers, name)).all():
            yield f"samples of {name} that are not finite"
    sizes = (("hidden_ids", identity.hidden), ("cache_ids", identity.kv_heads * identity.head_dim))
    for name, size in sizes:
        ids = getattr(layers, name)
        if not 0 <= ids.min() <= ids.max() < size or (np.diff(ids) <= 0).any():
            yield f"{name} that name channels which are not there"
