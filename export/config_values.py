"""Single values of a config.json: read strictly, since nothing about the file is certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LlamaExportError

MOST = 2**31 - 1
_MOST_NUMBER = 1e30  # well inside of float32


def count(config: Mapping[str, Any], key: str, *, default: int | None = None, most: int = MOST) -> int:
    """Return a whole number from 1 to `most`; `default` where the key is absent or null.

    Raises LlamaExportError for any other value, and for none where there is no default.
    """
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise LlamaExportError(f"config.json has no {key}, but it must; take the checkpoint's own config.json.")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise LlamaExportError(
            f"config.json says {key} is {value!r}, but a whole number from 1 to {most} is expected; correct it."
        )
    return value


def number(config: Mapping[str, Any], key: str, *, default: float | None = None, above: float) -> float:
    """Return a number above `above`; `default` where the key is absent or null. Raises LlamaExportError as `count`."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise LlamaExportError(
            f"config.json's rope parameters lack {key}, which their type needs; correct config.json."
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < _MOST_NUMBER:
        raise LlamaExportError(
            f"config.json says {key} is {value!r}, but a number above {above:g} is expected; correct config.json."
        )
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """Return true or false; false where the key is absent or null. Raises LlamaExportError for any other value."""
    value = config.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise LlamaExportError(
            f"config.json says {key} is {value!r}, but true or false is expected; correct config.json."
        )
    return value
