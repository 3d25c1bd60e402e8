"""The networks that come by the same trace: Llama and the relatives that differ from it in biases and attention span.

What a family is stands here as data. Its mathematics is transformers' own; the classes are looked up by name when they
are needed, since importing them takes seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import LlamaExportError, did_you_mean

ALWAYS = "always"
"""Instead of a key of config.json: the projection has a bias in every model of the family."""

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""The projections of a decoder layer, as all families call them."""


@dataclass(frozen=True)
class WindowKeys:
    """How a config.json says that tokens see only the latest ones, by `sliding_window`.

    default: tokens where that key is absent; switch: a key that must be true for it to count; full_layers: a key that
    counts the first layers without a window, and its default.
    """

    default: int
    switch: str | None = None
    full_layers: tuple[str, int] | None = None


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    name: what people call it. prefix: of its classes' names. biases: projection -> the key of config.json that gives it
    a bias, or ALWAYS. keys: those of config.json that only this family has. kv_heads and max_positions: what
    transformers takes where config.json has no num_key_value_heads (None: as many as heads) and no
    max_position_embeddings.
    """

    model_type: str
    name: str
    prefix: str
    biases: Mapping[str, str] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    kv_heads: int | None = None
    max_positions: int = 2048
    window: WindowKeys | None = None

    @property
    def architecture(self) -> str:
        """The class that config.json's `architectures` names."""
        return f"{self.prefix}ForCausalLM"


_ALL = (
    Family(
        "llama",
        "Llama",
        "Llama",
        biases={**dict.fromkeys(ATTENTION, "attention_bias"), **dict.fromkeys(MLP, "mlp_bias")},
        keys=frozenset({"attention_bias", "mlp_bias"}),
    ),
    Family(
        "mistral",
        "Mistral",
        "Mistral",
        keys=frozenset({"sliding_window"}),
        kv_heads=8,
        max_positions=131072,
        window=WindowKeys(4096),
    ),
    Family(
        "qwen2",
        "Qwen2",
        "Qwen2",
        biases=dict.fromkeys(ATTENTION[:3], ALWAYS),
        keys=frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}),
        kv_heads=32,
        max_positions=32768,
        window=WindowKeys(4096, "use_sliding_window", ("max_window_layers", 28)),
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}
"""model_type -> family, of all that export."""

SUPPORTED = ", ".join(f"{family.model_type} ({family.architecture})" for family in _ALL)

_OTHERS = {"mllama": "Llama 3.2 Vision", "llama4": "Llama 4"}
"""Start of a model_type or architecture (lower case) -> what people call it: Llamas by name, not by network."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a config.json's `model_type` and `architectures` agree on; either may be absent.

    Raises LlamaExportError that names what is there and what is supported.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    names = [str(name) for name in (model_type, *architectures) if name]
    if not names:
        raise LlamaExportError(f"config.json names neither model_type nor architectures; supported are {SUPPORTED}.")
    for name in names:
        for start, other in _OTHERS.items():
            if name.lower().startswith(start):
                raise LlamaExportError(
                    f"The checkpoint is {other} ({name!r}), which is another network than Llama and is not "
                    f"supported; supported are {SUPPORTED}, as Llama 1 to 3.3 without vision are."
                )
    for family in _ALL:
        if model_type in (None, family.model_type) and (not architectures or family.architecture in architectures):
            return family
    known = (*FAMILIES, *(family.architecture for family in _ALL))
    hint = "" if any(name in known for name in names) else did_you_mean(names[0], known)
    raise LlamaExportError(
        f"The checkpoint's architecture is {' / '.join(names)}, which is not supported; supported are {SUPPORTED}."
        + hint
    )


@dataclass(frozen=True)
class Classes:
    """transformers' classes of a family."""

    config: type[Any]
    model: type[Any]
    layer: type[Any]
    norm: type[Any]
    rotary: type[Any]


def classes(model_type: str) -> Classes:
    """Return transformers' classes of the family of this model_type; importing them takes seconds."""
    package = f"transformers.models.{model_type}"
    configuration = importlib.import_module(f"{package}.configuration_{model_type}")
    modeling = importlib.import_module(f"{package}.modeling_{model_type}")
    prefix = FAMILIES[model_type].prefix
    return Classes(
        getattr(configuration, f"{prefix}Config"),
        *(
            getattr(modeling, f"{prefix}{kind}")
            for kind in ("ForCausalLM", "DecoderLayer", "RMSNorm", "RotaryEmbedding")
        ),
    )
