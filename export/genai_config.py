"""genai_config.json: what onnxruntime-genai reads to run a bundle of the `ort` dialect.

Format: github.com/microsoft/onnxruntime-genai, src/config.cpp; checked against version 0.18.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..runtime.bundle import GRAPH_FILE
from .config import ModelShape

SAMPLING_DEFAULTS: Mapping[str, Any] = {
    "do_sample": False,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""The sampling settings of generation_config.json that onnxruntime-genai knows too, with the values it takes alone."""

_SEARCH: Mapping[str, Any] = {
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "past_present_share_buffer": True,  # GroupQueryAttention writes into the cache that it is given
}
_INPUTS: Mapping[str, str] = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
_OUTPUTS: Mapping[str, str] = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}


def genai_config(
    shape: ModelShape,
    *,
    context: int,
    bos_token_id: int | None,
    eos_token_ids: Sequence[int],
    pad_token_id: int | None,
    generation: Mapping[str, Any],
    provider: Literal["cpu", "cuda"] = "cpu",
) -> dict[str, Any]:
    """Return the content of genai_config.json for the graph beside it.

    context: most positions of the cache, prompt included; onnxruntime-genai allocates all by default.
    pad_token_id: pads the shorter rows of a batch, on the right; without one (None or negative) the first end token
        serves, as in onnxruntime-genai's own exports.
    generation: the content of generation_config.json, may be empty; its sampling settings become the search defaults.
    """
    has_pad = pad_token_id is not None and pad_token_id >= 0
    tokens = {
        "bos_token_id": bos_token_id,
        "eos_token_id": list(eos_token_ids) or None,
        "pad_token_id": pad_token_id if has_pad else next(iter(eos_token_ids), 0),
    }
    options = {
        "log_id": "onnxruntime-genai",
        "provider_options": [] if provider == "cpu" else [{provider: {}}],
    }
    decoder = {
        "session_options": options,
        "filename": GRAPH_FILE,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "inputs": dict(_INPUTS),
        "outputs": dict(_OUTPUTS),
    }
    sampling = {
        name: default if generation.get(name) is None else generation[name]
        for name, default in SAMPLING_DEFAULTS.items()
    }
    return {
        "model": {
            "type": shape.family,
            "vocab_size": shape.vocab,
            "context_length": context,
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": decoder,
        },
        "search": {**sampling, "max_length": context, **_SEARCH},
    }
