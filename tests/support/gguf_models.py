"""Random Llamas as GGUF files: small, quick to write, of any tensor type, with a real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from support.hf_models import BOS, CHAT_TEMPLATE, EOS, TURN, random_weights
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

_CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind in the least.",
    "What is the capital of France? The capital of France is Paris. What is the capital of Italy? It is Rome.",
    "There once was a whale in the deep, who sang to the ships in her sleep; the sailors below sang back to and fro.",
    "In 1998 there were 365 days, 12 months and 52 weeks; 7 * 8 = 56, and 100 / 4 = 25.",
    "user: hello assistant: hello, how are you today? system: you are a helpful assistant.",
]
_ALL_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())

_PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_llama_gguf(
    path: Path,
    *,
    types: str | Mapping[str, str] = "F32",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 96,
    vocab: int = 320,
    max_positions: int = 256,
    tied: bool = True,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tokenizer: str = "gpt2",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    seed: int = 0,
) -> Path:
    """Write a GGUF file of the architecture llama with random weights to `path`, and return it.

    types: any ggml type of all matrices, or of parts by name ({"attn_q": "Q4_0"}), F32 for the others; block types need
    rows of a multiple of 32 columns, most of 256. Where the gguf package cannot quantise, blocks are random.
    tokenizer: gpt2 (byte-level BPE, with all bytes from 259 ids on) or llama (sentencepiece, at least 300 ids).
    metadata: keys laid over the file's; None leaves a key out. tensors: the same for tensors in GGUF order, as float32.
    """
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
    }
    values = {
        "general.architecture": "llama",
        "general.name": "Random Llama",
        "general.license": "apache-2.0",
        "llama.block_count": layers,
        "llama.context_length": max_positions,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": 10000.0,
        **(sentencepiece(vocab) if tokenizer == "llama" else byte_level(vocab)),
        "tokenizer.chat_template": CHAT_TEMPLATE,
        **(metadata or {}),
    }
    weights = {
        _gguf_name(name): _interleaved(name, rows, config) for name, rows in random_weights(config, seed=seed).items()
    }
    weights |= tensors or {}
    _write(path, values, {name: rows for name, rows in weights.items() if rows is not None}, types)
    return path


def reference_weights(path: Path, *, head_dim: int) -> dict[str, np.ndarray]:
    """Return all weights of a GGUF file as float32 under their Hugging Face names, read by the gguf package."""
    names = {ours: theirs for theirs, ours in _PARTS.items()}
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        *layer, part, kind = tensor.name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        rows = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part in ("attn_q", "attn_k"):
            rows = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        weights[f"{prefix}{names[part]}.{kind}"] = rows
    return weights


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]]) -> Path:
    """Write any GGUF file: metadata by Python type (int as uint32, float as float32), tensors with their ggml types."""
    path.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(path, str(metadata.get("general.architecture", "llama")))
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, (values, type_name) in tensors.items():
        kind = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(name, stored_rows(np.ascontiguousarray(values, np.float32), type_name), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_HALVES: Mapping[str, tuple[tuple[int, float], ...]] = {
    "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
    **{"IQ1_M": (), "NVFP4": ()},
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), ((0, 1.0),)),
}
"""Types that the gguf package cannot quantise -> where a block has its scales of half precision, and their relation:
the minimum's is such that weights are around 0."""


def stored_rows(values: np.ndarray, type_name: str) -> np.ndarray:
    """Return what a GGUF file holds of `values`, float32 [rows, columns], or random blocks of their shape and size."""
    if type_name not in _HALVES:
        return quantize(values, gguf.GGMLQuantizationType[type_name])
    return random_blocks(type_name, values.shape, float(values.std()), seed=values.shape[0])


def random_blocks(type_name: str, shape: tuple[int, int], size: float, *, seed: int = 0) -> np.ndarray:
    """Return rows (uint8 [rows, bytes]) of random blocks whose weights have about the standard deviation `size`."""
    kind, generator = gguf.GGMLQuantizationType[type_name], np.random.default_rng(seed)
    columns, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0] * shape[1] // columns, block_bytes), dtype=np.uint8)
    _set_scales(type_name, blocks, np.full(len(blocks), 2.0**-8))
    measured = float(dequantize(blocks, kind).std())
    _set_scales(type_name, blocks, 2.0**-8 * size / measured * generator.uniform(0.5, 1.5, len(blocks)))
    return blocks.reshape(shape[0], -1)


def _set_scales(type_name: str, blocks: np.ndarray, scales: np.ndarray) -> None:
    if type_name == "IQ1_M":  # a digit of four bits on top of each of its last four words
        half, words = scales.astype(np.float16).view(np.uint16), blocks[:, 48:].copy().view(np.uint16)
        for index in range(4):
            words[:, index] = words[:, index] & 0x0FFF | (half >> 4 * index & 15) << 12
        blocks[:, 48:] = words.view(np.uint8)
    if type_name == "NVFP4":  # four bytes of E4M3, here from 2**-6 to 2**-5
        blocks[:, :4] = blocks[:, :4] & 7 | 8
    for at, share in _HALVES[type_name]:
        blocks[:, at : at + 2] = (share * scales).astype("<f2")[:, None].view(np.uint8)


def _write(
    path: Path, metadata: Mapping[str, Any], weights: Mapping[str, np.ndarray], types: str | Mapping[str, str]
) -> None:
    def type_of(name: str, rows: np.ndarray) -> str:
        if rows.ndim == 1:
            return "F32"
        return types if isinstance(types, str) else types.get(name.split(".")[-2], "F32")

    present = {key: value for key, value in metadata.items() if value is not None}
    write_gguf(path, present, {name: (rows, type_of(name, rows)) for name, rows in weights.items()})


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _gguf_name(name: str) -> str:
    part, _, kind = name.rpartition(".")
    if part in _PARTS:
        return f"{_PARTS[part]}.{kind}"
    _, _, layer, part = part.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def _interleaved(name: str, rows: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Bring the rows of query and key projections into GGUF's order, as llama.cpp's converter does."""
    if "q_proj" not in name and "k_proj" not in name:
        return rows
    halves = rows.reshape(-1, 2, config["head_dim"] // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def byte_level(vocab: int) -> dict[str, Any]:
    """Return the metadata of a byte-level BPE with at most `vocab` ids; it has all bytes from 259 ids on."""
    model = _trained([BOS, EOS, TURN], pre_tokenizers.ByteLevel(add_prefix_space=False), vocab, _ALL_BYTES[: vocab - 3])
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def sentencepiece(vocab: int) -> dict[str, Any]:
    """Return the metadata of a sentencepiece BPE with at most `vocab` ids (at least 300), laid out as Llama 2's:
    <unk>, <s>, </s>, 256 bytes, merged pieces with falling scores, then single characters."""
    model = _trained([], pre_tokenizers.Metaspace(), vocab - 259, [])
    pieces = sorted(model["vocab"], key=lambda piece: (len(piece) == 1, model["vocab"][piece]))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def _trained(special: list[str], words: Any, vocab: int, alphabet: list[str]) -> dict[str, Any]:
    """Train a BPE on a few sentences and return the `model` of its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=max(min(vocab - len(special) - 8, 256), 1),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model
