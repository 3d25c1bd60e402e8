"""The rotary embedding that a config.json asks for: its type and numbers, checked before transformers sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import LlamaExportError, did_you_mean
from .config_values import MOST, number

DYNAMIC = "dynamic"

_THETA = 10_000.0
"""transformers' rope_theta where there is none."""


@dataclass(frozen=True)
class _Rope:
    """The numbers of a rope type, all above 0. optional: with the values that transformers takes where they are absent;
    ascending: the first of the two must be below the second; one_or_more: those that may not be below 1.
    """

    needed: tuple[str, ...] = ()
    optional: Mapping[str, float] = field(default_factory=dict)
    ascending: tuple[str, str] | None = None
    one_or_more: tuple[str, ...] = ()


_ROPES: Mapping[str, _Rope] = {
    "default": _Rope(),
    "linear": _Rope(("factor",)),
    DYNAMIC: _Rope(("factor",), one_or_more=("factor",)),
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
"""Keys that transformers' configs take from beside the rope object where the object lacks them."""

_ROPE_LATER = {"longrope": "its angles change when the text outgrows the original context"}


def rope_type(config: Mapping[str, Any]) -> str:
    """Return the rope type of a config.json in either spelling; "default" when it names none."""
    return str(_rope(config).get("rope_type") or _rope(config).get("type") or "default")


def check_rope(config: Mapping[str, Any], head_dim: int) -> None:
    """Raise LlamaExportError for a rope type that does not export, and for numbers that it cannot have."""
    kind = rope_type(config)
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
    values = _values(config)
    number(values, "rope_theta", default=_THETA, above=1.0)
    if number(values, "partial_rotary_factor", default=1.0, above=0.0) != 1.0:
        raise LlamaExportError(
            "config.json sets partial_rotary_factor, but only whole heads are rotated here; take another checkpoint."
        )
    number(values, "original_max_position_embeddings", default=1.0, above=0.0)
    _check_numbers(_ROPES[kind], values)
    if kind == DYNAMIC and head_dim == 2:
        raise LlamaExportError(
            "config.json gives a head_dim of 2, but the dynamic rope type's formula divides by head_dim - 2; correct "
            "config.json."
        )


def longest_context(config: Mapping[str, Any], max_positions: int) -> int:
    """Return the most tokens that the rope type is made for: a dynamic one stretches `max_positions` by its factor."""
    if rope_type(config) != DYNAMIC:
        return max_positions
    return int(min(max_positions * number(_values(config), "factor", above=0.0), MOST))


def dynamic_base(config: Mapping[str, Any], head_dim: int, max_positions: int, context: int) -> float:
    """Return the base that the dynamic rope type gives a text of `context` tokens.

    The formula of transformers' `_compute_dynamic_ntk_parameters`, for people to read; frequencies come from there.
    """
    values = _values(config)
    theta, factor = number(values, "rope_theta", default=_THETA, above=1.0), number(values, "factor", above=0.0)
    stretch = factor * max(context, max_positions) / max_positions - (factor - 1.0)
    return float(theta * stretch ** (head_dim / (head_dim - 2)))


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers prefers rope_scaling when both are there (convert_rope_params_to_dict).
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise LlamaExportError(f"config.json's {key} is {rope!r}, but an object is expected; correct config.json.")
    return rope


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: config.get(key) for key in _BESIDE_ROPE}, **_rope(config)}


def _check_numbers(rope: _Rope, values: Mapping[str, Any]) -> None:
    numbers = {key: number(values, key, above=0.0) for key in rope.needed}
    numbers |= {key: number(values, key, default=default, above=0.0) for key, default in rope.optional.items()}
    for key in rope.one_or_more:
        if numbers[key] < 1.0:
            raise LlamaExportError(
                f"config.json says {key} is {numbers[key]:g}, but its rope type stretches the context, by 1 or more; "
                "correct config.json."
            )
    if rope.ascending is not None:
        low, high = rope.ascending
        if numbers[low] >= numbers[high]:
            raise LlamaExportError(
                f"config.json says {low} is {numbers[low]:g} and {high} is {numbers[high]:g}, but the first must be "
                "below the second; correct config.json."
            )
