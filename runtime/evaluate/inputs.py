"""Texts and questions as files: read whole, bounded, and only as UTF-8."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ...errors import LlamaExportError, UsageError
from ...tables import size

MAX_BYTES = 64 << 20
"""Of a file; its tokens and their places take some fifteen times as much memory."""


@dataclass(frozen=True)
class TextFile:
    """A file's text, and the SHA-256 of its bytes in hexadecimal digits."""

    path: Path
    text: str
    sha256: str


def read_text(path: Path) -> TextFile:
    """Read a file of UTF-8; line ends stay as they are.

    Raises UsageError when it is no file, empty, larger than `MAX_BYTES` or not UTF-8, LlamaExportError when it cannot
    be read.
    """
    if not path.is_file():
        raise UsageError(f"There is no file {path}; name a file with text in UTF-8.")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise LlamaExportError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path} has more than {size(MAX_BYTES)}; give a part of it.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start:,}); convert it.") from error
    if not text.strip():
        raise UsageError(f"{path} is empty; give a file with text.")
    return TextFile(path, text, hashlib.sha256(content).hexdigest())
