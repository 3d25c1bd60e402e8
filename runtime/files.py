"""Giving a file that was written whole the name that it is looked for by, also where that name is taken."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ..errors import LlamaExportError

WINDOWS = os.name == "nt"

_PAUSES = (0.02, 0.05, 0.1, 0.3)
"""Seconds: after a file was written, a virus scanner or an indexer has it open for a moment."""


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
