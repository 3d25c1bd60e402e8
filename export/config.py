"""What config.json says about a model, checked before anything relies on it, and checked against the tensors."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import LlamaExportError, did_you_mean
from ..optimize.formats import EMBEDDING, HEAD
from ..optimize.requirements import WINDOW_MINIMUM_ONNXRUNTIME
from ..optimize.tensors import SourceTensor
from .config_values import count, flag, number
from .families import ALWAYS, FAMILIES, Family, classes, family_of
from .rope import check_rope, dynamic_base, longest_context
from .window import sliding_window

if TYPE_CHECKING:
    import transformers

_MOST_LAYERS = 1024

_PASSED = {
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "hidden_act",
        "rms_norm_eps",
    ),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings"),
    *("attention_dropout", "initializer_range"),
}
"""Keys that transformers gets to see, beside those of the family: of a model's mathematics, none by which a config.json
chooses code."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers that decide a model's tensors and what its tokens see.

    max_positions: tokens that the model knows; longest: tokens up to which its rope type stretches them; ffn: the width
    inside the MLP; biased: projections with a bias; window: how many of the latest tokens a token sees, itself
    included, None for all; family: a key of FAMILIES.
    """

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
    longest: int
    biased: frozenset[str] = frozenset()
    window: int | None = None
    family: str = "llama"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the shape out of a config.json; absent optional keys take the defaults of transformers' config class.

        Raises LlamaExportError when a number is missing, out of range, or contradicts another.
        """
        family = family_of(config)
        heads = count(config, "num_attention_heads")
        hidden = count(config, "hidden_size")
        layers = count(config, "num_hidden_layers", most=_MOST_LAYERS)
        max_positions = count(config, "max_position_embeddings", default=family.max_positions)
        kv_heads = heads if "num_key_value_heads" in config else family.kv_heads or heads  # null: as many as heads
        shape = cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=count(config, "num_key_value_heads", default=kv_heads),
            head_dim=count(config, "head_dim", default=max(hidden // heads, 1)),
            ffn=count(config, "intermediate_size"),
            vocab=count(config, "vocab_size"),
            max_positions=max_positions,
            tied=flag(config, "tie_word_embeddings"),
            rms_norm_eps=number(config, "rms_norm_eps", default=1e-6, above=1e-13),
            longest=longest_context(config, max_positions),
            biased=frozenset(name for name, key in family.biases.items() if key == ALWAYS or flag(config, key)),
            window=sliding_window(config, family, layers),
            family=family.model_type,
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

    def window_in(self, context: int) -> int | None:
        """Return the window of a text of `context` tokens; None where the text lies in it whole."""
        return None if self.window is None or self.window >= context else self.window

    def parameters(self) -> int:
        """Return the number of weights; a tied head counts once."""
        return sum(math.prod(size) for size in _expected(self).values())


def check_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of a config.json that this project can export.

    Raises LlamaExportError that names the architecture, key or rope type when it cannot.
    """
    family = family_of(config)
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise LlamaExportError(
            f"config.json says hidden_act is {activation!r}, but a {family.name}'s is 'silu'; take a {family.name} "
            "checkpoint."
        )
    shape = ModelShape.from_config(config)
    check_rope(config, shape.head_dim)
    return shape


def known_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that says what its model computes."""
    passed = _PASSED | FAMILIES[family_of(config).model_type].keys
    return {key: value for key, value in config.items() if key in passed}


def transformers_config(config: Mapping[str, Any]) -> transformers.PreTrainedConfig:
    """Return the config of transformers' own class for a config.json, in the old (`rope_theta`, `rope_scaling`) or new
    (`rope_parameters`) spelling, which transformers itself brings together.

    Raises LlamaExportError when transformers finds fault with the values.
    """
    shape = check_config(config)
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415 - takes seconds, and the shape needs none

    # A copy, because transformers writes defaults into the nested rope dictionary.
    values = copy.deepcopy(known_facts(config))
    values |= {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    try:
        return classes(shape.family).config(**values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LlamaExportError(f"transformers refuses config.json ({reason}); correct config.json.") from error


def model_notes(config: Mapping[str, Any], context: int) -> tuple[str, ...]:
    """Return what users of a bundle of `context` tokens should know of its attention: whole sentences, often none."""
    shape, notes = ModelShape.from_config(config), []
    window = shape.window_in(context)
    if window is not None:
        notes.append(
            f"A token sees the latest {window:,} tokens, itself included (a sliding window); this takes onnxruntime "
            f"{WINDOW_MINIMUM_ONNXRUNTIME} or newer, which a --context of {window} or less would not."
        )
    stretched = stretch_note(config, context)
    return (*notes, stretched) if stretched is not None else tuple(notes)


def stretch_note(config: Mapping[str, Any], context: int) -> str | None:
    """What a dynamic rope type fixed for `context` tokens changes; None where it changes nothing."""
    shape = ModelShape.from_config(config)
    if not shape.max_positions < context <= shape.longest:
        return None
    base = dynamic_base(config, shape.head_dim, shape.max_positions, context)
    return (
        f"The rotary base is fixed at {base:,.1f}, which the dynamic rope type gives a text of all {context:,} tokens. "
        "transformers changes it with the length of a text, so shorter texts come out differently there, also those of "
        f"up to {shape.max_positions:,} tokens; a --context of {shape.max_positions} or less gives what it gives."
    )


# Tensors of one decoder layer, of the model around them, and the config keys that give each axis.
_Q, _KV = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
_HIDDEN, _FFN, _VOCAB = "hidden_size", "intermediate_size", "vocab_size"

_PROJECTIONS = {
    "self_attn.q_proj": (_Q, _HIDDEN),
    "self_attn.k_proj": (_KV, _HIDDEN),
    "self_attn.v_proj": (_KV, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _Q),
    "mlp.gate_proj": (_FFN, _HIDDEN),
    "mlp.up_proj": (_FFN, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _FFN),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HARMLESS = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
"""Tables that early checkpoints saved and that transformers computes itself."""


def _axes(shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """Return the axes of every tensor, as config keys."""
    axes: dict[str, tuple[str, ...]] = {EMBEDDING: (_VOCAB, _HIDDEN)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in _PROJECTIONS.items():
            axes[f"{prefix}{name}.weight"] = (rows, columns)
            if name in shape.biased:
                axes[f"{prefix}{name}.bias"] = (rows,)
        axes.update({f"{prefix}{name}.weight": (_HIDDEN,) for name in _NORMS})
    axes["model.norm.weight"] = (_HIDDEN,)
    if not shape.tied:
        axes[HEAD] = (_VOCAB, _HIDDEN)
    return axes


def _expected(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    sizes = {
        _Q: shape.heads * shape.head_dim,
        _KV: shape.kv_heads * shape.head_dim,
        _HIDDEN: shape.hidden,
        _FFN: shape.ffn,
        _VOCAB: shape.vocab,
    }
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in _axes(shape).items()}


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a model of this config; a tied head is absent."""
    return _expected(ModelShape.from_config(config))


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Return the tensors that the model needs, in the model's order, leaving out those known to be harmless.

    Raises LlamaExportError that names the first tensor that is missing, unknown or of another shape, or the config key
    that it contradicts. A copy of a tied head must be gone already.
    """
    shape = ModelShape.from_config(config)
    _check_layers(shape, tensors)
    expected, axes = _expected(shape), _axes(shape)
    for name in tensors:
        if name not in expected and not _HARMLESS.fullmatch(name):
            raise LlamaExportError(_unknown(name, expected, FAMILIES[shape.family]))
    for name, size in expected.items():
        if name not in tensors:
            raise LlamaExportError(_missing(name, FAMILIES[shape.family]))
        found = tensors[name].shape
        if found != size:
            raise LlamaExportError(
                f"Tensor {name} has the shape {list(found)}, but config.json expects {list(size)} "
                f"({', '.join(axes[name])}); the two do not belong together, take the checkpoint again."
            )
    return {name: tensors[name] for name in expected}


def _check_layers(shape: ModelShape, tensors: Mapping[str, SourceTensor]) -> None:
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


def _unknown(name: str, expected: Mapping[str, tuple[int, ...]], family: Family) -> str:
    projection = _bias_of(name)
    if projection is not None and projection in family.biases:
        key = family.biases[projection]
        return f"The checkpoint holds {name}, but config.json does not say {key}: true; correct config.json."
    return (
        f"The checkpoint holds the tensor {name}, which is no part of a {family.architecture}; take a plain "
        f"{family.name} checkpoint, with adapters merged." + did_you_mean(name, expected)
    )


def _missing(name: str, family: Family) -> str:
    if name == HEAD:
        return (
            f"The checkpoint has no tensor {name}, but config.json does not say tie_word_embeddings: true; correct "
            "config.json or take the checkpoint again."
        )
    projection = _bias_of(name)
    if projection is not None and family.biases[projection] != ALWAYS:
        key = family.biases[projection]
        return f"config.json says {key}: true, but the checkpoint has no tensor {name}; correct config.json."
    return f"The checkpoint has no tensor {name}, which config.json expects; take the checkpoint again, all its files."


def _bias_of(name: str) -> str | None:
    """The projection whose bias a tensor of this name is."""
    return next((one for one in _PROJECTIONS if name.endswith(f".{one}.bias")), None)
