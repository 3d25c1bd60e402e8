"""The model of `tiny_bundle` as optimum writes one (standard operators, position_ids, a cache that is appended to), and
as onnxruntime-genai does (GroupQueryAttention, weights in a file beside the graph).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from support import onnx_bytes as onnx
from support.tiny_bundle import TinyLlama, byte_tokenizer, grouped_nodes

CONTEXT = 48


def write_concatenated(
    folder: Path,
    llama: TinyLlama,
    *,
    positions: bool = True,
    numbers: str = "int64",
    last_only: bool = False,
    merged: bool = False,
) -> Path:
    """A folder with config.json, model.onnx (its weights inside) and tokenizer.json.

    positions: with the input position_ids; without, positions are the slots of the cache. numbers: dtype of ids, mask
    and positions. last_only: logits of the last token alone. merged: as older optimum merged two graphs, with an input
    that tells whether there is a cache.
    """
    folder.mkdir(parents=True)
    content = concatenated(llama, positions, numbers, last_only, merged)
    (folder / ("decoder_model_merged.onnx" if merged else "model.onnx")).write_bytes(content)
    config = {
        "model_type": "llama",
        "hidden_size": llama.hidden,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "num_hidden_layers": llama.layers,
        "vocab_size": llama.vocab,
        "max_position_embeddings": CONTEXT,
    }
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_grouped(folder: Path, llama: TinyLlama, *, last_only: bool = False, eights: bool = False) -> Path:
    """A folder with genai_config.json, model.onnx, model.onnx.data and tokenizer.json. eights: the head in 8 bits."""
    folder.mkdir(parents=True)
    cos, sin = llama.rope()
    data, tensors = bytearray(), []
    stored = {**llama.weights, "cos": cos, "sin": sin}
    nodes = grouped_nodes(llama)
    if eights:
        scale = np.abs(stored["head"]).max() / 127
        stored["head_codes"] = np.round(stored.pop("head") / scale).astype(np.int8)
        stored["head_scale"] = np.array(scale, np.float32)
        nodes.append(onnx.node("DequantizeLinear", ["head_codes", "head_scale"], ["head"]))
    for name, array in stored.items():
        tensors.append(onnx.tensor(name, array, ("model.onnx.data", len(data))))
        data += array.tobytes()
    constants = {"one": [1], "last": -1, "index_one": 1, "axis1": [1]}
    tensors += [onnx.tensor(name, np.array(value, np.int64)) for name, value in constants.items()]
    final = f"x{llama.layers}"
    if last_only:  # as prune_lm_head does
        nodes.append(onnx.node("Gather", [final, "last"], ["row"], attributes={"axis": 1}))
        nodes.append(onnx.node("Unsqueeze", ["row", "axis1"], ["kept"]))
        final = "kept"
    epsilon: dict[str, int | float] = {"axis": -1, "epsilon": 1e-5}
    nodes.append(onnx.node("SimplifiedLayerNormalization", [final, "norm"], ["normed"], attributes=epsilon))
    nodes.append(onnx.node("MatMul", ["normed", "head"], ["logits"]))
    ports = _ports(llama, ["input_ids", "attention_mask"], "int64", last_only)
    (folder / "model.onnx").write_bytes(onnx.model(nodes, tensors, *ports))
    (folder / "model.onnx.data").write_bytes(bytes(data))
    decoder = {
        "filename": "model.onnx",
        "head_size": llama.head_dim,
        "hidden_size": llama.hidden,
        "num_attention_heads": llama.heads,
        "num_hidden_layers": llama.layers,
        "num_key_value_heads": llama.kv_heads,
        "inputs": {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key"},
    }
    model = {"type": "llama", "vocab_size": llama.vocab, "context_length": CONTEXT, "decoder": decoder}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _ports(llama: TinyLlama, names: list[str], numbers: str, last_only: bool) -> tuple[list[bytes], list[bytes]]:
    """Inputs and outputs."""
    cache = [f"{layer}.{kind}" for layer in range(llama.layers) for kind in ("key", "value")]
    shape = ["batch", llama.kv_heads, "past", llama.head_dim]
    inputs = [onnx.value_info(name, numbers, ["batch", name]) for name in names]
    inputs += [onnx.value_info(f"past_key_values.{name}", "float32", shape) for name in cache]
    outputs = [onnx.value_info("logits", "float32", ["batch", 1 if last_only else "tokens", llama.vocab])]
    outputs += [onnx.value_info(f"present.{name}", "float32", [*shape[:2], "total", shape[3]]) for name in cache]
    return inputs, outputs


def concatenated(llama: TinyLlama, positions: bool, numbers: str, last_only: bool, merged: bool) -> bytes:
    """The model's bytes."""
    cos, sin = llama.rope()
    arrays = {
        **llama.weights,
        "cos": cos,
        "sin": sin,
        "head_shape": np.array([0, 0, -1, llama.head_dim], np.int64),
        "flat_shape": np.array([0, 0, -1], np.int64),
        "split": np.array([llama.heads, llama.kv_heads, llama.kv_heads], np.int64),
        "halves": np.array([llama.head_dim // 2] * 2, np.int64),
        "scale": np.array(llama.head_dim**-0.5, np.float32),
        "never": np.array(-1e9, np.float32),
        "none": np.array(0, np.float32),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "axis1": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
        "none_at": np.array([0], np.int64),
        "axes12": np.array([1, 2], np.int64),
        "last": np.array([-1], np.int64),
        "end": np.array([2**62], np.int64),
        "group": np.array([1, 1, llama.heads // llama.kv_heads, 1, 1], np.int64),
        "query_heads": np.array([0, llama.heads, -1, llama.head_dim], np.int64),
        "epsilon": np.array(1e-5, np.float32),
    }
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]
    tensors = [onnx.tensor(name, array) for name, array in arrays.items()]
    inputs, outputs = _ports(llama, names, numbers, last_only)
    nodes = [*_used_cache(llama, merged), *_nodes(llama, positions, last_only)]
    branch = [onnx.value_info("use_cache_branch", "bool", [1])] if merged else []
    return onnx.model(nodes, tensors, [*inputs, *branch], outputs)


def _used_cache(llama: TinyLlama, merged: bool) -> list[bytes]:
    """The cache as the layers read it; nothing of it where a merged graph is told that there is none."""
    nodes = []
    for name in (f"{layer}.{part}" for layer in range(llama.layers) for part in ("key", "value")):
        past, used = f"past_key_values.{name}", f"used.{name}"
        if not merged:
            nodes.append(onnx.node("Identity", [past], [used]))
            continue
        shape = onnx.value_info(f"{used}.branch", "float32", ["batch", llama.kv_heads, "past", llama.head_dim])
        none = onnx.node("Slice", [past, "none_at", "none_at", "axis2"], [f"{used}.branch"])
        all_ = onnx.node("Identity", [past], [f"{used}.branch"])
        branches = b"".join(
            onnx.block(5, onnx.block(1, f"{kind}_branch") + onnx.block(6, _graph(node, shape)) + onnx.number(20, 5))
            for kind, node in (("then", all_), ("else", none))
        )
        nodes.append(onnx.node("If", ["use_cache_branch"], [used]) + branches)
    return nodes


def _graph(node: bytes, output: bytes) -> bytes:
    return onnx.block(1, node) + onnx.block(2, "branch") + onnx.block(12, output)


def _nodes(llama: TinyLlama, positions: bool, last_only: bool) -> list[bytes]:
    nodes = [
        onnx.node("Cast", ["input_ids"], ["ids"], attributes={"to": 7}),
        onnx.node("Gather", ["embed", "ids"], ["x0"], attributes={"axis": 0}),
        onnx.node("Shape", ["used.0.key"], ["before"], attributes={"start": 2, "end": 3}),
        onnx.node("Shape", ["ids"], ["new"], attributes={"start": 1, "end": 2}),
        onnx.node("Add", ["before", "new"], ["total"]),
        onnx.node("Squeeze", ["total"], ["total0"]),
        onnx.node("Squeeze", ["before"], ["before0"]),
        onnx.node("Range", ["zero", "total0", "one"], ["slots"]),
        onnx.node("Range", ["before0", "total0", "one"], ["new_slots"]),
        onnx.node("Unsqueeze", ["new_slots", "axis1"], ["queries"]),
        onnx.node("LessOrEqual", ["slots", "queries"], ["causal"]),
        onnx.node("Cast", ["attention_mask"], ["counts"], attributes={"to": 9}),
        onnx.node("Unsqueeze", ["counts", "axes12"], ["counts4"]),
        onnx.node("And", ["counts4", "causal"], ["seen"]),
        onnx.node("Where", ["seen", "none", "never"], ["bias"]),
        onnx.node("Cast", ["position_ids" if positions else "new_slots"], ["places"], attributes={"to": 7}),
    ]
    for table in ("cos", "sin"):
        nodes.append(onnx.node("Gather", [table, "places"], [f"{table}_rows"], attributes={"axis": 0}))
        axis = "axis1" if positions else "axes01"
        nodes.append(onnx.node("Unsqueeze", [f"{table}_rows", axis], [f"{table}4"]))
    if not positions:
        nodes.insert(0, onnx.node("Sub", ["axes12", "axis1"], ["axes01"]))
    for layer in range(llama.layers):
        nodes += _layer(llama, layer)
    final = f"x{llama.layers}"
    if last_only:
        nodes.append(onnx.node("Slice", [final, "last", "end", "axis1"], ["kept"]))
        final = "kept"
    return [*nodes, *_norm(final, "norm", "normed"), onnx.node("MatMul", ["normed", "head"], ["logits"])]


def _layer(llama: TinyLlama, i: int) -> list[bytes]:
    nodes = [
        *_norm(f"x{i}", f"{i}.norm1", f"a{i}"),
        onnx.node("MatMul", [f"a{i}", f"{i}.qkv"], [f"qkv{i}"]),
        onnx.node("Reshape", [f"qkv{i}", "head_shape"], [f"heads{i}"]),
        onnx.node("Transpose", [f"heads{i}"], [f"turned{i}"], attributes={"perm": [0, 2, 1, 3]}),
        onnx.node("Split", [f"turned{i}", "split"], [f"{part}{i}" for part in "qkv"], attributes={"axis": 1}),
        *_rotated(f"q{i}"),
        *_rotated(f"k{i}"),
    ]
    for part, new in (("key", f"k{i}r"), ("value", f"v{i}")):
        present, every = f"present.{i}.{part}", f"{part}{i}"
        nodes += [
            onnx.node("Concat", [f"used.{i}.{part}", new], [present], attributes={"axis": 2}),
            onnx.node("Unsqueeze", [present, "axis2"], [f"{every}5"]),
            onnx.node("Tile", [f"{every}5", "group"], [f"{every}t"]),
            onnx.node("Reshape", [f"{every}t", "query_heads"], [every], attributes={"allowzero": 0}),
        ]
    return [
        *nodes,
        onnx.node("Transpose", [f"key{i}"], [f"keys{i}"], attributes={"perm": [0, 1, 3, 2]}),
        onnx.node("MatMul", [f"q{i}r", f"keys{i}"], [f"products{i}"]),
        onnx.node("Mul", [f"products{i}", "scale"], [f"scaled{i}"]),
        onnx.node("Add", [f"scaled{i}", "bias"], [f"scores{i}"]),
        onnx.node("Softmax", [f"scores{i}"], [f"shares{i}"], attributes={"axis": -1}),
        onnx.node("MatMul", [f"shares{i}", f"value{i}"], [f"mixed{i}"]),
        onnx.node("Transpose", [f"mixed{i}"], [f"back{i}"], attributes={"perm": [0, 2, 1, 3]}),
        onnx.node("Reshape", [f"back{i}", "flat_shape"], [f"attn{i}"]),
        onnx.node("MatMul", [f"attn{i}", f"{i}.o"], [f"o{i}"]),
        onnx.node("Add", [f"x{i}", f"o{i}"], [f"y{i}"]),
        *_norm(f"y{i}", f"{i}.norm2", f"b{i}"),
        onnx.node("MatMul", [f"b{i}", f"{i}.gate"], [f"gate{i}"]),
        onnx.node("Sigmoid", [f"gate{i}"], [f"sigmoid{i}"]),
        onnx.node("Mul", [f"gate{i}", f"sigmoid{i}"], [f"silu{i}"]),
        onnx.node("MatMul", [f"b{i}", f"{i}.up"], [f"up{i}"]),
        onnx.node("Mul", [f"silu{i}", f"up{i}"], [f"inner{i}"]),
        onnx.node("MatMul", [f"inner{i}", f"{i}.down"], [f"down{i}"]),
        onnx.node("Add", [f"y{i}", f"down{i}"], [f"x{i + 1}"]),
    ]


def _rotated(x: str) -> list[bytes]:
    return [
        onnx.node("Split", [x, "halves"], [f"{x}l", f"{x}h"], attributes={"axis": -1}),
        onnx.node("Mul", [f"{x}l", "cos4"], [f"{x}lc"]),
        onnx.node("Mul", [f"{x}h", "sin4"], [f"{x}hs"]),
        onnx.node("Mul", [f"{x}h", "cos4"], [f"{x}hc"]),
        onnx.node("Mul", [f"{x}l", "sin4"], [f"{x}ls"]),
        onnx.node("Sub", [f"{x}lc", f"{x}hs"], [f"{x}low"]),
        onnx.node("Add", [f"{x}hc", f"{x}ls"], [f"{x}high"]),
        onnx.node("Concat", [f"{x}low", f"{x}high"], [f"{x}r"], attributes={"axis": -1}),
    ]


def _norm(x: str, weight: str, result: str) -> list[bytes]:
    return [
        onnx.node("Mul", [x, x], [f"{result}s"]),
        onnx.node("ReduceMean", [f"{result}s", "last"], [f"{result}m"]),
        onnx.node("Add", [f"{result}m", "epsilon"], [f"{result}e"]),
        onnx.node("Sqrt", [f"{result}e"], [f"{result}r"]),
        onnx.node("Div", [x, f"{result}r"], [f"{result}d"]),
        onnx.node("Mul", [f"{result}d", weight], [result]),
    ]
