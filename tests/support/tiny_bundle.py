"""A whole `ort` bundle with a random two-layer Llama, made in milliseconds, and the same model in NumPy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_export.runtime.bundle import Bundle, Limits, Manifest, ModelRecord, Shape, Tokens, open_bundle, seal
from support import onnx_bytes as onnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Array = npt.NDArray[Any]

BOS, EOS, TURN_END = 256, 257, 258
SPECIAL = ("<s>", "</s>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass(frozen=True)
class TinyLlama:
    """Weights of a random Llama. Sizes are odd on purpose where GroupQueryAttention allows it."""

    weights: dict[str, Array]
    layers: int = 2
    hidden: int = 36
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 52
    vocab: int = 261
    positions: int = 64

    def logits(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """Return float64 [len(ids), vocab]: the logits after every token, by the book."""
        w = {name: array.astype(np.float64) for name, array in self.weights.items()}
        count, size, groups = len(ids), self.head_dim, self.heads // self.kv_heads
        causal = np.triu(np.full((count, count), -np.inf), 1)
        x = w["embed"][ids]
        for layer in range(self.layers):
            qkv = _norm(x, w[f"{layer}.norm1"]) @ w[f"{layer}.qkv"]
            q, k, v = np.split(qkv.reshape(count, -1, size), [self.heads, self.heads + self.kv_heads], axis=1)
            q, k = self._rotate(q), self._rotate(k)
            out = np.empty_like(q)
            for head in range(self.heads):
                scores = q[:, head] @ k[:, head // groups].T / np.sqrt(size) + causal
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // groups]
            x = x + out.reshape(count, -1) @ w[f"{layer}.o"]
            y = _norm(x, w[f"{layer}.norm2"])
            gate = y @ w[f"{layer}.gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w[f"{layer}.up"])) @ w[f"{layer}.down"]
        return np.asarray(_norm(x, w["norm"]) @ w["head"], np.float64)

    def rope(self) -> tuple[Array, Array]:
        """Return cos and sin, float32 [positions, head_dim / 2]."""
        angles = np.arange(self.positions)[:, None] / 10000.0 ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _rotate(self, x: Array) -> Array:
        cos, sin = (table[: len(x), None, :].astype(np.float64) for table in self.rope())
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _norm(x: Array, weight: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight)


def random_llama(seed: int = 0, **sizes: int) -> TinyLlama:
    """Return a model whose weights depend on `seed` alone; `sizes` replaces fields of TinyLlama."""
    shape = TinyLlama({}, **sizes)
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Array:
        return (rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(rows)).astype(np.float32)

    def gain() -> Array:
        return rng.uniform(0.5, 1.5, shape.hidden).astype(np.float32)

    inner = shape.heads * shape.head_dim
    weights: dict[str, Array] = {"embed": rng.standard_normal((shape.vocab, shape.hidden)).astype(np.float32)}
    for layer in range(shape.layers):
        weights |= {
            f"{layer}.norm1": gain(),
            f"{layer}.qkv": matrix(shape.hidden, inner + 2 * shape.kv_heads * shape.head_dim),
            f"{layer}.o": matrix(inner, shape.hidden),
            f"{layer}.norm2": gain(),
            f"{layer}.gate": matrix(shape.hidden, shape.ffn),
            f"{layer}.up": matrix(shape.hidden, shape.ffn),
            f"{layer}.down": matrix(shape.ffn, shape.hidden),
        }
    weights |= {"norm": gain(), "head": matrix(shape.hidden, shape.vocab) * 3}
    return TinyLlama(weights, **sizes)


def onnx_files(llama: TinyLlama) -> tuple[bytes, bytes]:
    """Return model.onnx and model.onnx.data: inputs and outputs as in the bundles that `build` writes."""
    cos, sin = llama.rope()
    external = {**llama.weights, "cos": cos, "sin": sin}
    data, tensors = bytearray(), []
    for name, array in external.items():
        tensors.append(onnx.tensor(name, array, ("model.onnx.data", len(data))))
        data += array.tobytes()
    constants = {"one": [1], "last_axis": [-1], "logits_to_keep": [1], "index_zero": 0, "index_one": 1}
    tensors += [onnx.tensor(name, np.array(value, np.int64)) for name, value in constants.items()]
    cache = [f"{layer}.{kind}" for layer in range(llama.layers) for kind in ("key", "value")]
    shape = ["batch", llama.kv_heads, "past", llama.head_dim]
    inputs = [onnx.value_info(name, "int64", ["batch", name]) for name in ("input_ids", "attention_mask")]
    inputs.append(onnx.value_info("logits_to_keep", "int64", [1]))
    inputs += [onnx.value_info(f"past_key_values.{name}", "float32", shape) for name in cache]
    outputs = [onnx.value_info("logits", "float32", ["batch", 1, llama.vocab])]
    outputs += [onnx.value_info(f"present.{name}", "float32", [*shape[:2], "total", shape[3]]) for name in cache]
    return onnx.model(_nodes(llama), tensors, inputs, outputs), bytes(data)


def grouped_nodes(llama: TinyLlama) -> list[bytes]:
    """From input_ids, attention_mask and the cache to x2 (of two layers) and the cache, with GroupQueryAttention."""
    attention = {"num_heads": llama.heads, "kv_num_heads": llama.kv_heads, "do_rotary": 1}
    epsilon: dict[str, int | float] = {"axis": -1, "epsilon": 1e-5}
    nodes = [
        onnx.node("ReduceSum", ["attention_mask", "one"], ["valid"]),
        onnx.node("Sub", ["valid", "one"], ["last_valid"]),
        onnx.node("Cast", ["last_valid"], ["seqlens"], attributes={"to": 6}),
        onnx.node("Shape", ["attention_mask"], ["mask_shape"]),
        onnx.node("Gather", ["mask_shape", "index_one"], ["total"], attributes={"axis": 0}),
        onnx.node("Cast", ["total"], ["total32"], attributes={"to": 6}),
        onnx.node("Gather", ["embed", "input_ids"], ["x0"], attributes={"axis": 0}),
    ]
    for i in range(llama.layers):
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        nodes += [
            onnx.node("SimplifiedLayerNormalization", [f"x{i}", f"{i}.norm1"], [f"a{i}"], attributes=epsilon),
            onnx.node("MatMul", [f"a{i}", f"{i}.qkv"], [f"qkv{i}"]),
            onnx.node(
                "GroupQueryAttention",
                [f"qkv{i}", "", "", *past, "seqlens", "total32", "cos", "sin"],
                [f"attn{i}", f"present.{i}.key", f"present.{i}.value"],
                domain="com.microsoft",
                attributes=attention,
            ),
            onnx.node("MatMul", [f"attn{i}", f"{i}.o"], [f"o{i}"]),
            onnx.node("Add", [f"x{i}", f"o{i}"], [f"y{i}"]),
            onnx.node("SimplifiedLayerNormalization", [f"y{i}", f"{i}.norm2"], [f"b{i}"], attributes=epsilon),
            onnx.node("MatMul", [f"b{i}", f"{i}.gate"], [f"gate{i}"]),
            onnx.node("Sigmoid", [f"gate{i}"], [f"sigmoid{i}"]),
            onnx.node("Mul", [f"gate{i}", f"sigmoid{i}"], [f"silu{i}"]),
            onnx.node("MatMul", [f"b{i}", f"{i}.up"], [f"up{i}"]),
            onnx.node("Mul", [f"silu{i}", f"up{i}"], [f"inner{i}"]),
            onnx.node("MatMul", [f"inner{i}", f"{i}.down"], [f"down{i}"]),
            onnx.node("Add", [f"y{i}", f"down{i}"], [f"x{i + 1}"]),
        ]
    return nodes


def _nodes(llama: TinyLlama) -> list[bytes]:
    epsilon: dict[str, int | float] = {"axis": -1, "epsilon": 1e-5}
    return [
        *grouped_nodes(llama),
        *_last_positions(f"x{llama.layers}"),
        onnx.node("SimplifiedLayerNormalization", ["kept_x", "norm"], ["normed"], attributes=epsilon),
        onnx.node("MatMul", ["normed", "head"], ["logits"]),
    ]


def _last_positions(hidden: str) -> list[bytes]:
    """`kept_x`: of each row of `hidden`, the last `logits_to_keep` positions that are no padding, none below 0."""
    return [
        onnx.node("Shape", ["input_ids"], ["ids_shape"]),
        onnx.node("Gather", ["ids_shape", "index_one"], ["sequence"], attributes={"axis": 0}),
        onnx.node("Sub", ["total", "sequence"], ["before"]),
        onnx.node("Sub", ["valid", "before"], ["valid_new"]),
        onnx.node("Max", ["valid_new", "index_one"], ["at_least_one"]),
        onnx.node("Min", ["at_least_one", "sequence"], ["stop"]),
        onnx.node("Sub", ["stop", "logits_to_keep"], ["start"]),
        onnx.node("Squeeze", ["logits_to_keep"], ["keep"]),
        onnx.node("Range", ["index_zero", "keep", "index_one"], ["steps"]),
        onnx.node("Add", ["start", "steps"], ["places"]),
        onnx.node("Max", ["places", "index_zero"], ["kept_places"]),
        onnx.node("Unsqueeze", ["kept_places", "last_axis"], ["kept_index"]),
        onnx.node("GatherND", [hidden, "kept_index"], ["kept_x"], attributes={"batch_dims": 1}),
    ]


def byte_tokenizer(*, bos: bool = True) -> Tokenizer:
    """Return a byte-level tokenizer without merges: ids 0 to 255 are bytes, then the special tokens; it may add BOS."""
    from tokenizers import processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def manifest_for(llama: TinyLlama, *, context: int = 64, prefill_chunk: int = 7, **changes: Any) -> Manifest:
    shape = Shape(
        llama.layers, llama.hidden, llama.heads, llama.kv_heads, llama.head_dim, llama.ffn, llama.vocab, "float32"
    )
    fields: dict[str, Any] = {
        "model": ModelRecord("tests/tiny", "folder", None, "MIT"),
        "target": "cpu",
        "dialect": "ort",
        "precision": "fp32",
        "shape": shape,
        "limits": Limits(context, 1, prefill_chunk),
        "tokens": Tokens(BOS, (EOS, TURN_END), None, add_bos=True),
        "minimum": {"onnxruntime": "1.23.2", "python": "3.10"},
        "providers": ("CPUExecutionProvider",),
    }
    return Manifest(**fields | changes)


def write_bundle(
    folder: Path,
    llama: TinyLlama | None = None,
    *,
    template: str | None = CHAT_TEMPLATE,
    extra: Mapping[str, bytes] | None = None,
    **changes: Any,
) -> Bundle:
    """Write a complete bundle into `folder` and open it.

    extra: more files, or other contents for these; changes: arguments of `manifest_for`.
    """
    llama = llama or random_llama()
    folder.mkdir(parents=True, exist_ok=True)
    graph, data = onnx_files(llama)
    (folder / "model.onnx").write_bytes(graph)
    (folder / "model.onnx.data").write_bytes(data)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    for name, content in (extra or {}).items():
        (folder / name).write_bytes(content)
    seal(folder, manifest_for(llama, **changes))
    return open_bundle(folder)
