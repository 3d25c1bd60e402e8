"""What config.json says about a Llama, checked before anything relies on it, and checked against the tensors."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import LlamaExportError, did_you_mean
from ..optimize.formats import EMBEDDING, HEAD
from ..optimize.tensors import SourceTensor

if TYPE_CHECKING:
    import transformers

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

_RELATIVES = {"mllama": "Llama 3.2 Vision", "llama4": "Llama 4"}
"""Start of a model_type or architecture (lower case) -> what people call it: Llamas by name, not by network."""

_MOST = 2**31 - 1
_MOST_LAYERS = 1024
_MOST_NUMBER = 1e30  # well inside of float32


@dataclass(frozen=True)
class _Rope:
    """The numbers of a rope type, all above 0. optional: with the values that transformers takes where they are absent;
    ascending: the first of the two must be below the second.
    """

    needed: tuple[str, ...] = ()
    optional: Mapping[str, float] = field(default_factory=dict)
    ascending: tuple[str, str] | None = None


_ROPES: Mapping[str, _Rope] = {
    "default": _Rope(),
    "linear": _Rope(("factor",)),
    "yarn": _Rope(
        ("factor",),
        {"attention_factor": 1.0, "beta_slow": 1.0, "beta_fast": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        ("beta_slow", "beta_fast"),
    ),
    "llama3": _Rope(
        ("factor", "low_freq_factor", "high_freq_factor"), ascending=("low_freq_factor", "high_freq_factor")
    ),
}
"""Rope types that export."""

_BESIDE_ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Keys that LlamaConfig takes from beside the rope object where the object lacks them."""

_PASSED = {
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "max_position_embeddings", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings"),
    *("attention_dropout", "initializer_range"),
}
"""Keys that transformers gets to see: those of a Llama's mathematics, none by which a config.json chooses code."""

_ROPE_LATER = {
    "dynamic": "its angles depend on the length of the text",
    "longrope": "its angles change when the text outgrows the original context",
}


@dataclass(frozen=True)
class LlamaShape:
    """The numbers that decide a Llama's tensors. `max_positions` is in tokens; `ffn` is the width inside the MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    tied: bool
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlamaShape:
        """Read the shape out of a config.json; absent optional keys take LlamaConfig's defaults.

        Raises LlamaExportError when a number is missing, out of range, or contradicts another.
        """
        heads = _count(config, "num_attention_heads")
        hidden = _count(config, "hidden_size")
        shape = cls(
            layers=_count(config, "num_hidden_layers", most=_MOST_LAYERS),
            hidden=hidden,
            heads=heads,
            kv_heads=_count(config, "num_key_value_heads", default=heads),
            head_dim=_count(config, "head_dim", default=max(hidden // heads, 1)),
            ffn=_count(config, "intermediate_size"),
            vocab=_count(config, "vocab_size"),
            max_positions=_count(config, "max_position_embeddings", default=2048),
            tied=_flag(config, "tie_word_embeddings"),
            rms_norm_eps=_number(config, "rms_norm_eps", default=1e-6, least=1e-13),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
        )
        shape._check()
        return shape

    def _check(self) -> None:
        if self.hidden % self.heads:
            raise LlamaExportError(
                f"config.json says hidden_size is {self.hidden} and num_attention_heads is {self.heads}, but the first "
                "must be a multiple of the second; correct config.json."
            )
        if self.heads % self.kv_heads:
            raise LlamaExportError(
                f"config.json says num_attention_heads is {self.heads} and num_key_value_heads is {self.kv_heads}, but "
                "the first must be a multiple of the second; correct config.json."
            )
        if self.head_dim % 2:
            raise LlamaExportError(
                f"config.json gives a head_dim of {self.head_dim}, but the rotary embedding needs an even one; correct "
                "config.json."
            )

    def parameters(self) -> int:
        """Return the number of weights; a tied head counts once."""
        return sum(math.prod(size) for size in _expected(self).values())


def check_config(config: Mapping[str, Any]) -> LlamaShape:
    """Return the shape of a config.json that this project can export.

    Raises LlamaExportError that names the architecture, key or rope type when it cannot.
    """
    _check_architecture(config)
    if config.get("quantization_config"):
        quantized = config["quantization_config"]
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, Mapping) else quantized
        raise LlamaExportError(
            f"The checkpoint is already quantised with {method!r}, but this version reads F32, F16 and BF16 "
            "safetensors and GGUF files; take the unquantised checkpoint."
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise LlamaExportError(
            f"config.json says hidden_act is {activation!r}, but a Llama's is 'silu'; take a Llama checkpoint."
        )
    shape = LlamaShape.from_config(config)
    _check_rope(config)
    return shape


def llama_config(config: Mapping[str, Any]) -> transformers.LlamaConfig:
    """Return transformers' LlamaConfig of a config.json, in the old (`rope_theta`, `rope_scaling`) or new
    (`rope_parameters`) spelling, which transformers itself brings together.

    Raises LlamaExportError when transformers finds fault with the values.
    """
    check_config(config)
    import transformers  # noqa: PLC0415 - takes seconds, and LlamaShape is needed without it
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415

    # A copy, because transformers writes defaults into the nested rope dictionary.
    values = copy.deepcopy({key: value for key, value in config.items() if key in _PASSED})
    try:
        return transformers.LlamaConfig(**values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LlamaExportError(f"transformers refuses config.json ({reason}); correct config.json.") from error


def rope_type(config: Mapping[str, Any]) -> str:
    """Return the rope type of a config.json in either spelling; "default" when it names none."""
    return str(_rope(config).get("rope_type") or _rope(config).get("type") or "default")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers prefers rope_scaling when both are there (convert_rope_params_to_dict).
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise LlamaExportError(f"config.json's {key} is {rope!r}, but an object is expected; correct config.json.")
    return rope


def _check_rope(config: Mapping[str, Any]) -> None:
    rope, kind = _rope(config), rope_type(config)
    if kind in _ROPE_LATER:
        raise LlamaExportError(
            f"The checkpoint's rope type is {kind!r}, which this version does not export because {_ROPE_LATER[kind]}; "
            f"supported are {', '.join(_ROPES)}."
        )
    if kind not in _ROPES:
        raise LlamaExportError(
            f"The checkpoint's rope type {kind!r} is unknown; supported are {', '.join(_ROPES)}."
            + did_you_mean(kind, _ROPES)
        )
    values = {**{key: config.get(key) for key in _BESIDE_ROPE}, **rope}
    _number(values, "rope_theta", default=10_000.0, least=1.0)
    if _number(values, "partial_rotary_factor", default=1.0, least=0.0) != 1.0:
        raise LlamaExportError(
            "config.json sets partial_rotary_factor, but a Llama rotates whole heads; take a Llama checkpoint."
        )
    _number(values, "original_max_position_embeddings", default=1.0, least=0.0)
    _check_numbers(_ROPES[kind], values)


def _check_numbers(rope: _Rope, values: Mapping[str, Any]) -> None:
    numbers = {key: _number(values, key, least=0.0) for key in rope.needed}
    numbers |= {key: _number(values, key, default=default, least=0.0) for key, default in rope.optional.items()}
    if rope.ascending is not None:
        low, high = rope.ascending
        if numbers[low] >= numbers[high]:
            raise LlamaExportError(
                f"config.json says {low} is {numbers[low]:g} and {high} is {numbers[high]:g}, but the first must be "
                "below the second; correct config.json."
            )


def _check_architecture(config: Mapping[str, Any]) -> None:
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    names = [str(name) for name in (model_type, *architectures) if name]
    if not names:
        raise LlamaExportError(
            f"config.json names neither model_type nor architectures; expected {MODEL_TYPE!r} ({ARCHITECTURE})."
        )
    for name in names:
        for start, relative in _RELATIVES.items():
            if name.lower().startswith(start):
                raise LlamaExportError(
                    f"The checkpoint is {relative} ({name!r}), which is another network than Llama and is not "
                    f"supported; expected {MODEL_TYPE!r} ({ARCHITECTURE}), as Llama 1 to 3.3 without vision are."
                )
    if model_type not in (None, MODEL_TYPE) or (architectures and ARCHITECTURE not in architectures):
        raise LlamaExportError(
            f"The checkpoint's architecture is {' / '.join(names)}, which is not supported; expected {MODEL_TYPE!r} "
            f"({ARCHITECTURE})."
        )


# Tensors of one decoder layer, of the model around them, and the config keys that give each axis.
_Q, _KV = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
_HIDDEN, _FFN, _VOCAB = "hidden_size", "intermediate_size", "vocab_size"

_PROJECTIONS = {
    "self_attn.q_proj": (_Q, _HIDDEN, "attention_bias"),
    "self_attn.k_proj": (_KV, _HIDDEN, "attention_bias"),
    "self_attn.v_proj": (_KV, _HIDDEN, "attention_bias"),
    "self_attn.o_proj": (_HIDDEN, _Q, "attention_bias"),
    "mlp.gate_proj": (_FFN, _HIDDEN, "mlp_bias"),
    "mlp.up_proj": (_FFN, _HIDDEN, "mlp_bias"),
    "mlp.down_proj": (_HIDDEN, _FFN, "mlp_bias"),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HARMLESS = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
"""Tables that early checkpoints saved and that transformers computes itself."""


def _axes(shape: LlamaShape) -> dict[str, tuple[str, ...]]:
    """Return the axes of every tensor, as config keys."""
    axes: dict[str, tuple[str, ...]] = {EMBEDDING: (_VOCAB, _HIDDEN)}
    biased = {"attention_bias": shape.attention_bias, "mlp_bias": shape.mlp_bias}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in _PROJECTIONS.items():
            axes[f"{prefix}{name}.weight"] = (rows, columns)
            if biased[bias]:
                axes[f"{prefix}{name}.bias"] = (rows,)
        axes.update({f"{prefix}{name}.weight": (_HIDDEN,) for name in _NORMS})
    axes["model.norm.weight"] = (_HIDDEN,)
    if not shape.tied:
        axes[HEAD] = (_VOCAB, _HIDDEN)
    return axes


def _expected(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    sizes = {
        _Q: shape.heads * shape.head_dim,
        _KV: shape.kv_heads * shape.head_dim,
        _HIDDEN: shape.hidden,
        _FFN: shape.ffn,
        _VOCAB: shape.vocab,
    }
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in _axes(shape).items()}


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a LlamaForCausalLM of this config; a tied head is absent."""
    return _expected(LlamaShape.from_config(config))


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Return the tensors that the model needs, in the model's order, leaving out those known to be harmless.

    Raises LlamaExportError that names the first tensor that is missing, unknown or of another shape, or the config key
    that it contradicts. A copy of a tied head must be gone already.
    """
    shape = LlamaShape.from_config(config)
    _check_layers(shape, tensors)
    expected, axes = _expected(shape), _axes(shape)
    for name in tensors:
        if name not in expected and not _HARMLESS.fullmatch(name):
            raise LlamaExportError(_unknown(name, expected))
    for name, size in expected.items():
        if name not in tensors:
            raise LlamaExportError(_missing(name))
        found = tensors[name].shape
        if found != size:
            raise LlamaExportError(
                f"Tensor {name} has the shape {list(found)}, but config.json expects {list(size)} "
                f"({', '.join(axes[name])}); the two do not belong together, take the checkpoint again."
            )
    return {name: tensors[name] for name in expected}


def _check_layers(shape: LlamaShape, tensors: Mapping[str, SourceTensor]) -> None:
    found = {int(match[1]): name for name in tensors if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    last = max(found, default=-1)
    if last >= shape.layers:
        raise LlamaExportError(
            f"config.json says num_hidden_layers is {shape.layers}, but the checkpoint holds a tensor of layer {last} "
            f"({found[last]}, counted from 0); correct config.json or take the checkpoint again."
        )
    if -1 < last < shape.layers - 1:
        raise LlamaExportError(
            f"config.json says num_hidden_layers is {shape.layers}, but the checkpoint's tensors end with layer {last} "
            "(counted from 0); correct config.json or take the checkpoint again."
        )


def _unknown(name: str, expected: Mapping[str, tuple[int, ...]]) -> str:
    for suffix, key in ((f"{projection}.bias", keys[2]) for projection, keys in _PROJECTIONS.items()):
        if name.endswith(suffix):
            return f"The checkpoint holds {name}, but config.json does not say {key}: true; correct config.json."
    return (
        f"The checkpoint holds the tensor {name}, which is no part of a {ARCHITECTURE}; take a plain Llama checkpoint, "
        "with adapters merged." + did_you_mean(name, expected)
    )


def _missing(name: str) -> str:
    if name == HEAD:
        return (
            f"The checkpoint has no tensor {name}, but config.json does not say tie_word_embeddings: true; correct "
            "config.json or take the checkpoint again."
        )
    for projection, (_, _, key) in _PROJECTIONS.items():
        if name.endswith(f"{projection}.bias"):
            return f"config.json says {key}: true, but the checkpoint has no tensor {name}; correct config.json."
    return f"The checkpoint has no tensor {name}, which config.json expects; take the checkpoint again, all its files."


def _count(config: Mapping[str, Any], key: str, *, default: int | None = None, most: int = _MOST) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise LlamaExportError(f"config.json has no {key}, which a Llama needs; take the checkpoint's own config.json.")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise LlamaExportError(
            f"config.json says {key} is {value!r}, but a whole number from 1 to {most} is expected; correct it."
        )
    return value


def _number(config: Mapping[str, Any], key: str, *, default: float | None = None, least: float) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise LlamaExportError(
            f"config.json's rope parameters lack {key}, which their type needs; correct config.json."
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < _MOST_NUMBER:
        raise LlamaExportError(
            f"config.json says {key} is {value!r}, but a number above {least:g} is expected; correct config.json."
        )
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise LlamaExportError(
            f"config.json says {key} is {value!r}, but true or false is expected; correct config.json."
        )
    return value
