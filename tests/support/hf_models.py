"""Random Llama checkpoints in Hugging Face's format: small, quick to write, with a real tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from llama_export.export.config import expected_tensors
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, TURN = "<|begin|>", "<|end|>", "<|turn|>"
"""Special tokens, in the order of their ids 0, 1 and 2: start of a text, its end, end of a turn of a conversation."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind in the least.",
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her ball.",
    "What is the capital of France? The capital of France is Paris. What is the capital of Italy? It is Rome.",
    "In 1998 there were 365 days, 12 months and 52 weeks; 7 * 8 = 56, and 100 / 4 = 25.",
    "user: hello assistant: hello, how are you today? system: you are a helpful assistant.",
    "Größe, café, naïve, 東京, Привет, 🙂: not all text is ASCII.",
]

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_llama_folder(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 96,
    vocab: int = 320,
    max_positions: int = 256,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    shards: int = 1,
    add_bos: bool = True,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of a LlamaForCausalLM with random weights to the new folder `path`, and return it.

    vocab: at least 262, since the tokenizer has all 256 bytes and the special tokens; it may use fewer ids than that.
    rope: keys laid over config.json, in the old spelling (rope_theta, rope_scaling) or the new one (rope_parameters).
    dtype: float32, float16 or bfloat16, of the stored tensors. shards: number of safetensors files.
    add_bos: whether the tokenizer puts BOS before a text.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": dtype,
    } | dict(rope or {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    path.mkdir(parents=True)
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [1, 2]})
    write_tokenizer(path, vocab=vocab, add_bos=add_bos)
    write_weights(path, random_weights(config, seed=seed), dtype=dtype, shards=shards)
    (path / "LICENSE").write_text("Random weights, free for any use.\n")
    return path


def random_weights(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 weights that keep activations near 1 and tell tokens apart; norms near 1, biases near 0."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_tensors(config).items():
        values = generator.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values = 0.1 * values
        else:
            values = values * min(0.2, 1.2 / shape[1] ** 0.5)
        weights[name] = values.astype(np.float32)
    return weights


def write_weights(path: Path, weights: Mapping[str, np.ndarray], *, dtype: str = "float32", shards: int = 1) -> None:
    """Write model.safetensors, or that many shards of nearly equal tensor count and their index."""
    stored = {name: np.ascontiguousarray(values.astype(_DTYPES[dtype])) for name, values in weights.items()}
    if shards == 1:
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
        return
    names, index = list(stored), {}
    for number, group in enumerate(np.array_split(np.arange(len(names)), shards), start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({names[i]: stored[names[i]] for i in group}, path / file, metadata={"format": "pt"})
        index.update({names[i]: file for i in group})
    size = sum(values.nbytes for values in stored.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def write_tokenizer(path: Path, *, vocab: int = 320, add_bos: bool = True) -> None:
    """Write a byte-level BPE tokenizer of at most `vocab` ids, trained on a few sentences, and its settings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, TURN)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    write_json(path / "tokenizer_config.json", settings)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
