"""The random Llama of `tiny_bundle` as graphs of the dialects `trt` and `trt-primitive`, made by hand.

They have the inputs and outputs that `build` writes and are written from the contract, not from the lowering: what runs
them is tested by itself, also where only ONNX Runtime is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from llama_export.runtime.bundle import ENGINES, RECIPE_FILE, Bundle, EngineRecord, Manifest
from llama_export.runtime.recipe import Recipe, profiles_of
from support import onnx_bytes as onnx
from support.tiny_bundle import Array, TinyLlama, manifest_for, onnx_files, random_llama, write_bundle
from support.tiny_reference import write_reference

STATIC, PRIMITIVE = "trt", "trt-primitive"
OPSETS = {STATIC: 24, PRIMITIVE: 17}
_EPSILON = 1e-5


def write_tensorrt_bundle(folder: Path, dialect: str, llama: TinyLlama | None = None, **changes: Any) -> Bundle:
    """Write a complete bundle of a dialect for TensorRT.

    changes: as of `write_bundle`; dtype: of activations; reference: whether it gets one.
    """
    llama = llama or random_llama()
    dtype = changes.pop("dtype", "float32")
    made = _Graph(llama, dialect, changes.get("context", 64), dtype)
    graph, data = made.files()
    shape = manifest_for(llama).shape
    fields = {
        "dialect": dialect,
        "backend": "tensorrt",
        "engine": EngineRecord("tensorrt", "10.16.2" if dialect == STATIC else "10.3.0"),
        "providers": (),
        "minimum": {"python": "3.10"},
        "shape": type(shape)(**{**vars(shape), "cache_dtype": dtype}),
    }
    others = ("extra", "template", "reference")
    manifest = manifest_for(llama, **(fields | {name: value for name, value in changes.items() if name not in others}))
    (folder / ENGINES).mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_FILE).write_text(recipe_for(manifest).to_json())
    if changes.pop("reference", False):
        stored = {name: array.astype(np.float32) for name, array in made.weights.items()}
        write_reference(folder, dataclasses.replace(llama, weights=stored), made.weights)
    extra = {"model.onnx": graph, "model.onnx.data": data, **changes.pop("extra", {})}
    return write_bundle(folder, llama, extra=extra, **(fields | changes))


def recipe_for(manifest: Manifest) -> Recipe:
    """A recipe that fits the manifest of a bundle for TensorRT."""
    engine = manifest.engine
    assert engine is not None
    profiles = profiles_of(manifest.dialect, manifest.shape, manifest.limits)
    return Recipe(engine.module, engine.version, ("8.7",), True, (), (), 1 << 28, 3, 1 << 30, profiles)


def tensorrt_files(llama: TinyLlama, dialect: str, context: int, dtype: str = "float32") -> tuple[bytes, bytes]:
    """model.onnx and model.onnx.data of a dialect; `onnx_files` has those of `ort`."""
    if dialect == "ort":
        return onnx_files(llama)
    return _Graph(llama, dialect, context, dtype).files()


class _Graph:
    """One graph while it is made: nodes, weights and small constants. Names of nodes' outputs are theirs alone."""

    def __init__(self, llama: TinyLlama, dialect: str, context: int, dtype: str) -> None:
        self.llama, self.dialect, self.context, self.dtype = llama, dialect, context, dtype
        self.nodes: list[bytes] = []
        self.weights: dict[str, Array] = {}
        self.constants: dict[str, Array] = {}

    def files(self) -> tuple[bytes, bytes]:
        self._make()
        data, tensors = bytearray(), []
        for name, array in self.weights.items():
            tensors.append(onnx.tensor(name, array, ("model.onnx.data", len(data))))
            data += array.tobytes()
        tensors += [onnx.tensor(name, array) for name, array in self.constants.items()]
        llama, static = self.llama, self.dialect == STATIC
        cache = [f"{layer}.{kind}" for layer in range(llama.layers) for kind in ("key", "value")]
        past = ["batch", llama.kv_heads, self.context if static else "past_sequence", llama.head_dim]
        present = past if static else [*past[:2], "sequence", past[3]]
        kinds = {"input_ids": "sequence", "position_ids": "sequence", "logits_positions": "kept"}
        inputs = [onnx.value_info(name, "int64", ["batch", axis]) for name, axis in kinds.items()]
        inputs += [onnx.value_info(f"past_key_values.{name}", self.dtype, past) for name in cache]
        outputs = [onnx.value_info("logits", "float32", ["batch", "kept", llama.vocab])]
        outputs += [onnx.value_info(f"present.{name}", self.dtype, present) for name in cache]
        return onnx.model(self.nodes, tensors, inputs, outputs, OPSETS[self.dialect]), bytes(data)

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: onnx.Attribute) -> str:
        """Add a node; return the name of its output."""
        name = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(onnx.node(kind, inputs, [name], attributes=attributes))
        return name

    def constant(self, value: Any, dtype: str = "int64") -> str:
        array = np.array(value, dtype)
        name = f"{dtype}_{'_'.join(map(str, array.shape))}_{array.tobytes().hex()[:80]}"
        self.constants[name] = array
        return name

    def weight(self, name: str, dtype: str | None = None) -> str:
        self.weights[name] = self.llama.weights[name].astype(dtype or self.dtype)
        return name

    def _make(self) -> None:
        llama, static = self.llama, self.dialect == STATIC
        self.weights["cos_cache"], self.weights["sin_cache"] = llama.rope()
        x = self.op("Gather", self.weight("embed"), "input_ids", axis=0)
        mask = self._visible_of_all() if static else self._visible_of_past_and_new()
        for layer in range(llama.layers):
            qkv = self.op("MatMul", self._norm(x, f"{layer}.norm1"), self.weight(f"{layer}.qkv"))
            heads = self.op("Reshape", qkv, self.constant([0, 0, -1, llama.head_dim]))
            heads = self.op("Transpose", heads, perm=[0, 2, 1, 3])
            q = self._rotate(self._heads(heads, 0, llama.heads))
            k = self._rotate(self._heads(heads, llama.heads, llama.heads + llama.kv_heads))
            v = self._heads(heads, llama.heads + llama.kv_heads, llama.heads + 2 * llama.kv_heads)
            out = (self._fused if static else self._primitive)(layer, q, k, v, mask)
            out = self.op("Reshape", self.op("Transpose", out, perm=[0, 2, 1, 3]), self.constant([0, 0, -1]))
            x = self.op("Add", x, self.op("MatMul", out, self.weight(f"{layer}.o")))
            y = self._norm(x, f"{layer}.norm2")
            gate = self.op("MatMul", y, self.weight(f"{layer}.gate"))
            inner = self.op("Mul", gate, self.op("Sigmoid", gate))
            inner = self.op("Mul", inner, self.op("MatMul", y, self.weight(f"{layer}.up")))
            x = self.op("Add", x, self.op("MatMul", inner, self.weight(f"{layer}.down")))
        at = self.op("Unsqueeze", "logits_positions", self.constant([2]))
        kept = self._norm(self.op("GatherND", x, at, batch_dims=1), "norm")
        self.op("Cast", self.op("MatMul", kept, self.weight("head")), output="logits", to=1)

    def _heads(self, x: str, start: int, stop: int) -> str:
        return self.op("Slice", x, self.constant([start]), self.constant([stop]), self.constant([1]))

    def _norm(self, x: str, name: str) -> str:
        wide = self.op("Cast", x, to=1)
        mean = self.op("ReduceMean", self.op("Mul", wide, wide), *self._last_axis()[0], **self._last_axis()[1])
        root = self.op("Sqrt", self.op("Add", mean, self.constant(_EPSILON, "float32")))
        normed = self.op("Mul", self.op("Div", wide, root), self.weight(name, "float32"))
        return self._narrow(normed)

    def _last_axis(self) -> tuple[list[str], Mapping[str, onnx.Attribute]]:
        """ReduceMean's axes: an attribute before opset 18, then an input."""
        return ([], {"axes": [-1]}) if OPSETS[self.dialect] < 18 else ([self.constant([-1])], {})

    def _narrow(self, x: str) -> str:
        return self.op("Cast", x, to=onnx.ELEMENT_TYPES[self.dtype])

    def _rotate(self, x: str) -> str:
        tables = [self.op("Unsqueeze", self.op("Gather", name, "position_ids"), self.constant([1]))
                  for name in ("cos_cache", "sin_cache")]  # fmt: skip
        half, wide = self.llama.head_dim // 2, self.op("Cast", x, to=1)
        last = self.constant([3])
        low, high = (
            self.op("Slice", wide, self.constant([start]), self.constant([start + half]), last) for start in (0, half)
        )
        cos, sin = tables
        turned = (
            self.op("Sub", self.op("Mul", low, cos), self.op("Mul", high, sin)),
            self.op("Add", self.op("Mul", high, cos), self.op("Mul", low, sin)),
        )
        return self._narrow(self.op("Concat", *turned, axis=-1))

    def _first(self) -> str:
        return self.op("Gather", "position_ids", self.constant(0), axis=1)

    def _queries(self) -> str:
        return self.op("Unsqueeze", "position_ids", self.constant([1, 3]))

    def _visible_of_all(self) -> str:
        keys = self.constant(np.arange(self.context)[None, None, None])
        return self.op("LessOrEqual", keys, self._queries())

    def _fused(self, layer: int, q: str, k: str, v: str, mask: str) -> str:
        first = self._first()
        keys, values = (
            self.op("TensorScatter", f"past_key_values.{layer}.{kind}", new, first, output=f"present.{layer}.{kind}")
            for kind, new in (("key", k), ("value", v))
        )
        return self.op("Attention", q, keys, values, mask)

    def _visible_of_past_and_new(self) -> str:
        past = self.op("Shape", "past_key_values.0.key")
        count = self.op("Gather", past, self.constant(2), axis=0)
        index = self.op("Range", self.constant(0), count, self.constant(1))
        index = self.op("Reshape", index, self.constant([1, 1, 1, -1]))
        first = self.op("Reshape", self._first(), self.constant([-1, 1, 1, 1]))
        queries = self._queries()
        old = self.op("Less", index, first)
        ones = self.op("GreaterOrEqual", queries, self.constant(0))
        old = self.op("And", old, ones)  # for every query
        new = self.op("LessOrEqual", self.op("Unsqueeze", "position_ids", self.constant([1, 2])), queries)
        return self.op("Concat", old, new, axis=-1)

    def _primitive(self, layer: int, q: str, k: str, v: str, mask: str) -> str:
        llama, size = self.llama, self.llama.head_dim
        for kind, new in (("key", k), ("value", v)):
            self.op("Identity", new, output=f"present.{layer}.{kind}")
        keys, values = (
            self.op("Concat", f"past_key_values.{layer}.{kind}", new, axis=2)
            for kind, new in (("key", k), ("value", v))
        )
        group = llama.heads // llama.kv_heads
        grouped = self.op("Reshape", q, self.constant([0, llama.kv_heads, group, -1, size]))
        scaled = self.op("Mul", grouped, self.constant(1 / np.sqrt(size), self.dtype))
        axis = self.constant([2])
        scores = self.op("MatMul", scaled, self.op("Unsqueeze", self.op("Transpose", keys, perm=[0, 1, 3, 2]), axis))
        hidden = self.op("Where", self.op("Unsqueeze", mask, axis), scores, self.constant(-1e4, self.dtype))
        out = self.op("MatMul", self.op("Softmax", hidden, axis=-1), self.op("Unsqueeze", values, axis))
        return self.op("Reshape", out, self.constant([0, llama.heads, -1, size]))
