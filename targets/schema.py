"""Checking what a data file says against the dataclass that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import LlamaExportError, did_you_mean

# The fields' annotations as they stand in the dataclasses, what to call them, and the types that TOML gives for them.
ACCEPTED: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "str": ("a string", (str,)),
    "bool": ("true or false", (bool,)),
    "float": ("a positive number", (int, float)),
    "tuple[str, ...]": ("a list of strings", (list,)),
    "tuple[Peak, ...]": ("a list of tables", (list,)),
    "Mapping[str, str]": ("a table of strings", (dict, MappingProxyType)),
}
LARGEST = 1e9


def field_names(schema: type) -> tuple[str, ...]:
    """The keys of a data file for `schema`."""
    return tuple(item.name for item in fields(schema))


def check_facts(facts: Mapping[str, Any], schema: type, allowed: Mapping[str, tuple[str, ...]], path: Path) -> None:
    """Refuse unknown and missing keys, values of another type, and values outside `allowed` for their key.

    Raises LlamaExportError, which names the file, the key, what was found and what is allowed.
    """
    known = field_names(schema)
    for key in facts:
        if key not in known:
            raise LlamaExportError(f"{path}: unknown key {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}.")
    for item in fields(schema):
        if item.name in facts:
            value = facts[item.name]
            _check_type(item.name, item.type, value, path)
            _check_allowed(item.name, value if isinstance(value, list) else [value], allowed, path)
        elif item.default is MISSING and item.default_factory is MISSING:
            expected = _expected(item.name, item.type, allowed)
            raise LlamaExportError(f"{path}: the key {item.name!r} is missing; {expected}.")


def _accepted(annotation: Any) -> tuple[str, tuple[type, ...]]:
    return ACCEPTED[str(annotation).removesuffix(" | None")]


def _expected(key: str, annotation: Any, allowed: Mapping[str, tuple[str, ...]]) -> str:
    described = f"it must be {_accepted(annotation)[0]}"
    return f"{described} (allowed: {', '.join(allowed[key])})" if key in allowed else described


def _check_type(key: str, annotation: Any, value: Any, path: Path) -> None:
    described, types = _accepted(annotation)
    right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if right and float in types:
        right = 0 <= value < LARGEST
    if right and described.endswith("of strings"):
        items = value.values() if isinstance(value, Mapping) else value
        right = all(isinstance(item, str) for item in items)
    if not right:
        raise LlamaExportError(f"{path}: {key} is {value!r}, but it must be {described}.")


def _check_allowed(key: str, values: list[Any], allowed: Mapping[str, tuple[str, ...]], path: Path) -> None:
    for value in values:
        if key in allowed and value not in allowed[key]:
            hint = did_you_mean(str(value), allowed[key])
            raise LlamaExportError(f"{path}: {key} has {value!r}.{hint} Allowed: {', '.join(allowed[key])}.")
