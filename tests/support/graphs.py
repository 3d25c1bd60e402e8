"""Tiny models of every family in PyTorch, and their graphs run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from llama_export.export.canonical import canonical
from llama_export.export.families import classes
from llama_export.export.rotary import rotary_tables
from llama_export.export.write import lay_out, refer, write_data
from llama_export.optimize.formats import FP32, Format
from llama_export.optimize.ort import OrtOptions, lower
from llama_export.optimize.ort.cache_int8 import NO_SCALES
from llama_export.optimize.plan import column_orders, plan_formats
from llama_export.optimize.quantise import stored_values
from llama_export.optimize.tensors import Float32, SourceTensor
from llama_export.progress import Silent
from transformers import PreTrainedConfig, PreTrainedModel

VARIANTS: Mapping[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "one-kv-head": {"num_key_value_heads": 1},
    "own-head-dim": {"head_dim": 48},
    "head-dim-24": {"head_dim": 24},
    "head-dim-20": {"head_dim": 20},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "odd-sizes": {"vocab_size": 263, "intermediate_size": 77},
    "odd-rows": {"hidden_size": 72, "head_dim": 16, "intermediate_size": 131, "tie_word_embeddings": False},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "dynamic-rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 48},
    "mistral-window": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 0,
        "tie_word_embeddings": False,
    },
}
"""Every shape and family that differs in its graph, as changes of a small Llama's config."""


def llama(seed: int = 0, *, model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """A random Llama, or a relative, in float32 whose norms and biases are not their initial ones and zeros."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 259,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-5,
        "attn_implementation": "sdpa",
    }
    family = classes(model_type)
    model: PreTrainedModel = family.model(family.config(**{**settings, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
            elif name.endswith("bias"):
                weight.copy_(0.2 * torch.randn_like(weight))
    return model


_TRACED: dict[tuple[str, int, torch.dtype], ir.Model] = {}


def traced_once(config: PreTrainedConfig, *, context: int = 64, dtype: torch.dtype = torch.float32) -> ir.Model:
    """The canonical graph, traced once for each config: tracing takes seconds. It may be changed at will."""
    key = (config.to_json_string(), context, dtype)
    if key not in _TRACED:
        _TRACED[key] = canonical(config, context=context, dtype=dtype)
    return _TRACED[key].clone()


def logits_of(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def source_tensors(model: PreTrainedModel) -> dict[str, SourceTensor]:
    """The weights of `model` as a checkpoint has them; a tied head is absent."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]

    def tensor(name: str, values: np.ndarray) -> SourceTensor:
        return SourceTensor(name, values.shape, "F32", FP32, lambda start, stop: values[start:stop])

    return {name: tensor(name, value.float().numpy()) for name, value in state.items()}


def with_stored_weights(
    model: PreTrainedModel,
    tensors: Mapping[str, SourceTensor],
    formats: Mapping[str, Format],
    scale_dtype: npt.DTypeLike = np.float32,
) -> PreTrainedModel:
    """The same model computing with the values that a bundle stores, in float32."""
    twin = type(model)(model.config).eval()
    state = {
        name: torch.from_numpy(
            np.ascontiguousarray(stored_values(tensor, formats[name], 0, tensor.shape[0], scale_dtype))
        )
        for name, tensor in tensors.items()
    }
    twin.load_state_dict(state, strict=False)
    twin.tie_weights()
    return twin


def lowered(
    canonical: ir.Model,
    config: PreTrainedConfig,
    tensors: Mapping[str, SourceTensor],
    folder: Path,
    *,
    precision: str,
    context: int = 64,
    accuracy_level: int = 0,
    recordable: bool = False,
    cache: Mapping[str, Float32] = NO_SCALES,
) -> dict[str, Format]:
    """Lower to the `ort` dialect and write the files into `folder`; return the formats. cache: scales of one in
    int8.
    """
    formats = plan_formats(tensors, precision)
    orders = column_orders(tensors, formats)
    lower(
        canonical,
        OrtOptions(formats, rotary_tables(config, context), accuracy_level, orders, (), recordable, cache),
    )
    layout = lay_out(canonical)
    write_data(canonical, layout, tensors, folder, Silent(), threads=2)
    refer(canonical, layout, folder)
    return formats


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every copied cache and of logits_to_keep
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(str(path), options)


def saved_canonical(graph: ir.Model, model: PreTrainedModel, path: Path) -> Path:
    """Save a canonical graph with the weights of the PyTorch model."""
    tensors = source_tensors(model)
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(tensors[name].read(0, tensors[name].shape[0]), name=name)
    ir.save(graph, path)
    return path


def run_canonical(path: Path, ids: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """The logits of a canonical graph over pieces of `ids` that end at `cuts`, its cache handed on."""
    model = session(path)
    cache = {
        value.name: np.zeros((len(ids), *value.shape[1:]), np.float32)
        for value in model.get_inputs()
        if value.name.startswith("past")
    }
    parts, start = [], 0
    for stop in cuts:
        positions = np.broadcast_to(np.arange(start, stop), (len(ids), stop - start))
        logits, *presents = model.run(None, {"input_ids": ids[:, start:stop], "position_ids": positions, **cache})
        cache = dict(zip(cache, presents, strict=True))
        parts.append(logits)
        start = stop
    return np.concatenate(parts, axis=1)


_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def run_ort(model: onnxruntime.InferenceSession, ids: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """The logits of an `ort` graph over pieces of `ids` that end at `cuts`, the cache handed on."""
    past = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), _NUMPY[value.type])
        for value in model.get_inputs()
        if value.name.startswith("past_key_values")
    }
    parts, start = [], 0
    for stop in cuts:
        feeds = {
            "input_ids": ids[:, start:stop],
            "attention_mask": np.ones((len(ids), stop), np.int64),
            "logits_to_keep": np.array([stop - start], np.int64),
            **past,
        }
        logits, *presents = model.run(None, feeds)
        past = dict(zip(past, presents, strict=True))
        parts.append(logits)
        start = stop
    return np.concatenate(parts, axis=1)
