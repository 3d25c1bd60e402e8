"""The sliding window of a config.json: how many of the latest tokens a token sees, itself included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LlamaExportError
from .config_values import count, flag
from .families import Family, WindowKeys

_SLIDING, _FULL = "sliding_attention", "full_attention"


def sliding_window(config: Mapping[str, Any], family: Family, layers: int) -> int | None:
    """Return the window that all layers share, in tokens; None where every token sees all before it.

    Raises LlamaExportError for an impossible window, and for layers that differ, since one layer is traced for all.
    """
    keys = family.window
    if keys is None:
        return None
    window = _window(config, keys)
    types = _layer_types(config, keys, layers, window)
    found = set(types)
    if not found <= {_SLIDING, _FULL}:
        raise LlamaExportError(
            f"config.json's layer_types has {sorted(found - {_SLIDING, _FULL})[0]!r}, but {_FULL!r} or {_SLIDING!r} is "
            "expected; take another checkpoint."
        )
    if len(found) > 1:
        raise LlamaExportError(
            f"In this {family.name} {types.count(_SLIDING)} of {layers} layers have a sliding window and the others "
            "see everything, which is not supported, because one layer is traced for all; take one whose layers are "
            "alike."
        )
    slides = found == {_SLIDING}
    if (slides and window is None) or (not slides and window is not None and keys.full_layers is None):
        raise LlamaExportError(
            f"config.json's layer_types say {types[0]!r}, but its sliding_window is {window}; correct config.json."
        )
    return window if slides else None


def _window(config: Mapping[str, Any], keys: WindowKeys) -> int | None:
    if keys.switch is not None and not flag(config, keys.switch):
        return None
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    return count(config, "sliding_window", default=keys.default)


def _layer_types(config: Mapping[str, Any], keys: WindowKeys, layers: int, window: int | None) -> list[str]:
    """The kind of each layer: what config.json says, or what transformers makes of its other keys."""
    given = config.get("layer_types")
    if given is not None:
        if not isinstance(given, list) or len(given) != layers or not all(isinstance(kind, str) for kind in given):
            raise LlamaExportError(
                f"config.json's layer_types must be a list of {layers} names, one for each layer; correct config.json."
            )
        return given
    if window is None:
        return [_FULL] * layers
    full = _full_layers(config, *keys.full_layers) if keys.full_layers is not None else 0
    return [_FULL if layer < full else _SLIDING for layer in range(layers)]


def _full_layers(config: Mapping[str, Any], key: str, default: int) -> int:
    return 0 if config.get(key) == 0 else count(config, key, default=default)
