"""JSON to frozen dataclasses, strictly: every key known and present, every value of the declared type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import LlamaExportError, did_you_mean

T = TypeVar("T")

_NAMES = {int: "an integer", str: "a string", bool: "true or false", float: "a number", type(None): "null"}


def decode(cls: type[T], value: object, where: str) -> T:
    """Build the dataclass `cls` from a decoded JSON object; `where` names the value in messages.

    Fields may be int, str, bool, float, another dataclass, `X | None`, `tuple[X, ...]` or `Mapping[str, X]`; a field
    with a default may be left out. Raises LlamaExportError with the dotted name of the first value that does not fit.
    """
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    for key in value:
        if key not in fields:
            raise LlamaExportError(f"{where} has an unknown key {key!r}.{did_you_mean(key, fields)}")
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _decode_value(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise LlamaExportError(f"{where} lacks the key {name!r}.")
    return cls(**arguments)


def _decode_value(hint: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _decode_value(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        return tuple(_decode_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {key: _decode_value(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type[Any], hint), value, where)
    if type(value) is not hint:  # not isinstance: true is no integer here
        raise _mismatch(where, _NAMES[hint], value)
    return value


def _mismatch(where: str, expected: str, value: object) -> LlamaExportError:
    found = repr(value)
    return LlamaExportError(f"{where} must be {expected}, not {found if len(found) < 40 else type(value).__name__}.")
