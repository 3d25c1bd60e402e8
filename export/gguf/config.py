"""config.json and generation_config.json out of a GGUF file's metadata."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import LlamaExportError
from ...optimize.tensors import Float32
from ..config import check_config
from .file import GgufFile

ARCHITECTURE = "llama"
GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"

_MOST = 2**31 - 1
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}
_UNSUPPORTED = {
    "llama.expert_count": "it is a mixture of experts",
    "llama.attention.sliding_window": "its attention has a sliding window",
}
"""Keys that, when they are there and not 0, make another network of the same tensors."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_FACTORS = (8.0, 32.0)
"""What Meta chose for Llama 3.1 (8) and for 3.2 1B and 3B (32)."""

_SCALING = "llama.rope.scaling."
_YARN_BETAS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_YARN_KEYS = ("type", "factor", "original_context_length", "finetuned", "attn_factor", *_YARN_BETAS)

_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""What llama.cpp assumes for sentencepiece vocabularies whose metadata do not say."""

_ENDS_OF_TURN = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>")
"""Tokens that end a generation in Llama 3 and ChatML models also where the metadata name only one of them."""


def check_architecture(file: GgufFile) -> None:
    """Raise LlamaExportError, naming what the file holds, unless it is a plain Llama."""
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise LlamaExportError(
            f"The GGUF file {file.path} holds a model of the architecture {found!r}, and only {ARCHITECTURE!r} is "
            "supported; choose a Llama model."
        )
    for key, why in _UNSUPPORTED.items():
        if file.metadata.get(key):
            raise LlamaExportError(
                f"The GGUF file {file.path} cannot be exported: {why} ({key}); choose another model."
            )


def model_config(file: GgufFile, rope_factors: Float32 | None) -> dict[str, Any]:
    """Return the content of config.json (LlamaForCausalLM) for a file that passed `check_architecture`.

    rope_factors: `rope_freqs.weight`, float32 [head_dim / 2], where the file has it.
    Raises LlamaExportError for missing, impossible or contradicting metadata.
    """
    heads = count(file, "llama.attention.head_count")
    hidden = count(file, "llama.embedding_length")
    head_dim = _head_dim(file, hidden // heads)
    if GGUF_EMBEDDING not in file.tensors:
        raise _bad(file, f"has no tensor {GGUF_EMBEDDING}")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": count(file, "llama.feed_forward_length"),
        "num_hidden_layers": count(file, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": count(file, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": count(file, "llama.context_length"),
        "rms_norm_eps": _number(file, "llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(file, head_dim, rope_factors),
        "vocab_size": file.tensors[GGUF_EMBEDDING].shape[0],
        "tie_word_embeddings": GGUF_HEAD not in file.tensors,
        "attention_bias": _has_bias(file, "attn_"),
        "mlp_bias": _has_bias(file, "ffn_"),
        **token_ids(file),
        "dtype": _dtype(file),
    }
    try:
        check_config(config)
    except LlamaExportError as error:
        raise _bad(file, f"has metadata that make no valid config.json: {error}") from error
    return config


def token_id(file: GgufFile, role: str) -> int | None:
    """Return the id of the token that is `bos`, `eos`, `eot`, `eom`, `unknown` or `padding`; None when there is none.

    Raises LlamaExportError for an id outside of the vocabulary, except for padding, which early Llamas set to -1.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    defaults = _SENTENCEPIECE_IDS if file.metadata.get("tokenizer.ggml.model") == "llama" else {}
    index = file.metadata.get(key, defaults.get(role))
    if index is None:
        return None
    rows = len(_tokens(file)) or file.tensors[GGUF_EMBEDDING].shape[0]
    if isinstance(index, int) and 0 <= index < rows:
        return int(index)
    if role == "padding":
        return None
    raise _bad(file, f"says {key} is {index!r}, but its vocabulary has the ids 0 to {rows - 1}")


def token_ids(file: GgufFile) -> dict[str, int | list[int] | None]:
    """Return bos_token_id, eos_token_id (a list when several tokens end a generation) and pad_token_id.

    None stands for "there is none": transformers would take its own defaults for keys that are absent.
    """
    tokens = _tokens(file)
    by_name = (tokens.index(text) for text in _ENDS_OF_TURN if text in tokens)
    ends = (*(token_id(file, role) for role in ("eos", "eot", "eom")), *by_name)
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": token_id(file, "bos"),
        "eos_token_id": unique if len(unique) > 1 else next(iter(unique), None),
        "pad_token_id": token_id(file, "padding"),
    }


def _tokens(file: GgufFile) -> tuple[Any, ...]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, tuple) else ()


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of generation_config.json for the config.json of a GGUF file."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config[key] is not None}


def _bad(file: GgufFile, why: str) -> LlamaExportError:
    return LlamaExportError(f"The GGUF file {file.path} {why}; it is damaged or was converted wrongly, fetch it again.")


def count(file: GgufFile, key: str, default: int | None = None) -> int:
    """Return a whole number of the metadata; a list with one entry a layer counts when all its entries are equal."""
    value = file.metadata.get(key, default)
    if isinstance(value, tuple):
        values = set(value)
        if len(values) != 1:
            raise LlamaExportError(
                f"The GGUF file {file.path} cannot be exported: {key} differs between layers, which LlamaForCausalLM "
                "cannot express; choose a plain Llama model."
            )
        value = values.pop()
    if type(value) is not int or not 1 <= value <= _MOST:
        raise _bad(file, f"says {key} is {value!r} instead of a whole number from 1 to {_MOST}")
    return value


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    """Return a positive number of the metadata: the shortest decimal that rounds to the float32 in the file."""
    value = file.metadata.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise _bad(file, f"says {key} is {value!r} instead of a positive number")
    return float(str(np.float32(value)))


def _head_dim(file: GgufFile, default: int) -> int:
    head_dim = count(file, "llama.attention.key_length", default)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        found = count(file, key, head_dim)
        if found != head_dim:
            raise LlamaExportError(
                f"The GGUF file {file.path} cannot be exported: {key} is {found} where LlamaForCausalLM has the head "
                f"size {head_dim}; choose a plain Llama model."
            )
    return head_dim


def _has_bias(file: GgufFile, part: str) -> bool:
    return any(part in name and name.endswith(".bias") for name in file.tensors)


def _dtype(file: GgufFile) -> str:
    """Return the 16-bit type that most matrices have, else float32."""
    kinds = Counter(tensor.type for tensor in file.tensors.values() if len(tensor.shape) == 2)
    return _DTYPES.get(kinds.most_common(1)[0][0], "float32")


def _rope_parameters(file: GgufFile, head_dim: int, factors: Float32 | None) -> dict[str, Any]:
    theta = _number(file, "llama.rope.freq_base", 10000.0)
    scaling = _rope_scaling(file)
    if factors is None or np.all(factors == 1.0):
        return {**scaling, "rope_theta": theta}
    if scaling["rope_type"] != "default":
        raise LlamaExportError(
            f"The GGUF file {file.path} cannot be exported: it has both rope_freqs.weight and "
            f"{scaling['rope_type']} scaling; choose a model with one of them."
        )
    return {"rope_type": "llama3", "rope_theta": theta, **_llama3_parameters(file, head_dim, theta, factors)}


def _rope_scaling(file: GgufFile) -> dict[str, Any]:
    """Return the rope type and its parameters, from llama.rope.scaling.* (ggml's docs/gguf.md)."""
    legacy = "llama.rope.scale_linear"
    kind = file.metadata.get(_SCALING + "type", "linear" if legacy in file.metadata else "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise LlamaExportError(
            f"The GGUF file {file.path} cannot be exported: its rope scaling type is {kind!r}, and only linear, yarn "
            "and llama3 are supported; choose another model."
        )
    factor = _number(file, legacy if legacy in file.metadata else _SCALING + "factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return {"rope_type": "yarn", "factor": factor, **_yarn_parameters(file, factor)}


def _yarn_parameters(file: GgufFile, factor: float) -> dict[str, Any]:
    for key in file.metadata:
        if key.startswith(_SCALING) and key.removeprefix(_SCALING) not in _YARN_KEYS:
            raise LlamaExportError(
                f"The GGUF file {file.path} cannot be exported: transformers has nothing like its {key}; choose "
                "another model."
            )
    context = count(file, "llama.context_length")
    parameters: dict[str, Any] = {
        "original_max_position_embeddings": count(file, _SCALING + "original_context_length", context)
    }
    for theirs, ours in _YARN_BETAS.items():
        if _SCALING + theirs in file.metadata:
            parameters[ours] = _number(file, _SCALING + theirs)
    attention = _number(file, _SCALING + "attn_factor", 1.0)
    if attention != 1.0:
        # llama.cpp multiplies its own 1 + 0.1 ln(factor) by it; transformers takes the product.
        parameters["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return parameters


def _llama3_parameters(file: GgufFile, head_dim: int, theta: float, factors: Float32) -> dict[str, Any]:
    """Find the parameters of Llama 3.1's rope scaling that give `factors`, which llama.cpp stores instead of them."""
    if factors.shape == (head_dim // 2,):
        for factor in dict.fromkeys((*_LLAMA3_FACTORS, float(str(factors.max())))):
            if np.allclose(llama3_factors(head_dim, theta, factor), factors, rtol=1e-4, atol=0):
                return {"factor": factor, **_LLAMA3}
    raise LlamaExportError(
        f"The GGUF file {file.path} cannot be exported: its rope_freqs.weight is not what Llama 3's formula gives for "
        f"rope_theta {theta:g} and head size {head_dim}, so config.json cannot express it; choose a Llama 3 model."
    )


def llama3_factors(head_dim: int, theta: float, factor: float) -> Float32:
    """Return what divides each rotary frequency in Llama 3.1 and later: float32 [head_dim / 2].

    The formula of transformers' `_compute_llama3_parameters`, with low_freq_factor 1, high_freq_factor 4 and an
    original context of 8192.
    """
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    original = _LLAMA3["original_max_position_embeddings"]
    turns = original / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth), np.float32)
