"""The lists of operators, one TOML file for each release that changed them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

from ...errors import LlamaExportError


@dataclass(frozen=True)
class Operators:
    """What a release's parser takes. version: the release from which on this holds, until the next list.

    types: by operator, the types of its data as NVIDIA writes them (FP32, INT64). narrowed: types that become others
    where values fit. opsets: the first and the last. constants: by operator, inputs that must be known when an engine
    is built. ignored_attributes: those that the parser does not look at. fixed_attributes: those with one value that it
    takes. most_inputs: by operator, where it takes fewer than ONNX has.
    """

    name: str
    backend: str
    version: tuple[int, ...]
    source: str
    opsets: tuple[int, int]
    types: Mapping[str, frozenset[str]]
    narrowed: Mapping[str, str]
    constants: Mapping[str, tuple[int, ...]]
    ignored_attributes: Mapping[str, tuple[str, ...]]
    fixed_attributes: Mapping[str, Mapping[str, int]]
    most_inputs: Mapping[str, int]


@functools.cache
def all_operators() -> tuple[Operators, ...]:
    """All lists, oldest first."""
    paths = Path(__file__).parent.glob("*.toml")
    lists = (_operators(tomllib.loads(path.read_text(encoding="utf-8"))) for path in paths)
    return tuple(sorted(lists, key=lambda operators: (operators.backend, operators.version)))


def operators_of(backend: str, version: str) -> Operators:
    """The list that holds for a release: `operators_of("tensorrt", "10.3.0")` is that of 10.0.

    Raises LlamaExportError for a release older than all lists.
    """
    release = tuple(int(part) for part in version.split("."))
    known = [operators for operators in all_operators() if operators.backend == backend]
    fitting = [operators for operators in known if operators.version <= release]
    if not fitting:
        names = ", ".join(operators.name for operators in known) or "no release of it"
        raise LlamaExportError(
            f"The operators of {backend} {version} are not known; choose a release from one of these on: {names}."
        )
    return fitting[-1]


def _operators(entry: Mapping[str, Any]) -> Operators:
    first, last = entry["opsets"]
    return Operators(
        name=entry["name"],
        backend=entry["backend"],
        version=tuple(entry["version"]),
        source=entry["source"],
        opsets=(first, last),
        types={name: frozenset(group["types"]) for group in entry["group"] for name in group["operators"]},
        narrowed=entry["narrowed"],
        constants={name: tuple(indices) for name, indices in entry["constants"].items()},
        ignored_attributes={name: tuple(names) for name, names in entry.get("ignored_attributes", {}).items()},
        fixed_attributes=entry.get("fixed_attributes", {}),
        most_inputs=entry.get("most_inputs", {}),
    )
