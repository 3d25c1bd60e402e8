"""SHA-256 of files: streamed, several files at once (hashlib releases the interpreter's lock)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import LlamaExportError

CHUNK = 1 << 20
"""Bytes read at once: large enough that reading costs nothing beside hashing, small enough to stay in the cache."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, holding one chunk of it at a time.

    Raises LlamaExportError when the file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        raise LlamaExportError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> Mapping[Path, str]:
    """Return the SHA-256 of every path, hashing as many at once as there are cores; the longest files start first."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 (not needed by a start that trusts its stamp)

    ordered = sorted(set(paths), key=lambda path: path.stat().st_size if path.exists() else 0, reverse=True)
    if not ordered:
        return {}
    with ThreadPoolExecutor(max_workers=min(len(ordered), os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(sha256_of, ordered), strict=True))
