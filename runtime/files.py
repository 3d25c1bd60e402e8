"""Files that are whole or not there: written under another name, and then given theirs, also where that is taken."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import LlamaExportError

WINDOWS = os.name == "nt"

_PAUSES = (0.02, 0.05, 0.1, 0.3)
"""Seconds: after a file was written, a virus scanner or an indexer has it open for a moment."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which is `path` once all of it is on the disk; where anything is raised, nothing of it stays.

    Raises OSError when it cannot be written, and as `replace` does.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def replace(part: Path, path: Path) -> None:
    """Rename `part` to `path`, in place of a file that is there.

    Windows refuses that while any program has either of the two open or mapped, other systems never do. Raises
    LlamaExportError when it goes on refusing, and OSError as `Path.replace` does; both files are then as they were.
    """
    for pause in (*_PAUSES, None):
        try:
            part.replace(path)
        except PermissionError as error:  # noqa: PERF203 (five at most)
            if not WINDOWS:
                raise
            if pause is None:
                raise LlamaExportError(
                    f"{path} cannot be replaced, as a program has it or {part.name} open; end that program and try "
                    "again."
                ) from error
            time.sleep(pause)
        else:
            return
