"""JSON objects out of files that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import LlamaExportError
from ..tables import size

MOST_BYTES = 100_000_000
"""Of any file but the weights; Llama 3's tokenizer.json, the largest, has 17 million."""


def read_object(path: Path, *, most: int = MOST_BYTES, unique: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file of at most `most` bytes, as `parse_object` does.

    Raises LlamaExportError when it is larger, cannot be read, or holds no such object.
    """
    try:
        found = path.stat().st_size
        text = path.read_bytes() if found <= most else b""
    except OSError as error:
        raise LlamaExportError(f"Cannot read {path}: {error.strerror}; check the file and its permissions.") from error
    if found > most:
        raise LlamaExportError(f"{path} has {size(found)}, but at most {size(most)} are read; check what it is.")
    return parse_object(text, str(path), unique=unique)


def parse_object(text: bytes, what: str, *, unique: bool = False) -> dict[str, Any]:
    """Return the JSON object in `text`. unique: refuse names that stand there twice, of which readers take either.

    Raises LlamaExportError that begins with `what` when it is none.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        raise LlamaExportError(f"{what} is no valid JSON ({error}); copy or download it again.") from error
    if not isinstance(value, dict):
        raise LlamaExportError(f"{what} does not hold one JSON object; copy or download it again.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands there twice")
    return values
