"""What TensorRT-RTX compiles for a GPU when it first runs an engine, kept from run to run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from . import api
from .engine import Engine

_MOST_BYTES = 1 << 30


class Kernels:
    """The compiled kernels of an engine, and the file that they are kept in. cache: None for TensorRT, whose plan holds
    its kernels.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self._path = path
        self._known = _read(path)
        self.cache: Any = api.create_kernel_cache(engine.module, engine.handle, self._known)

    def save(self) -> None:
        """Write what was compiled since; a folder that cannot be written only costs the next start its compiling."""
        if self.cache is None:
            return
        compiled = bytes(self.cache.serialize() or b"")
        if not compiled or compiled == self._known:
            return
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                part.write_bytes(compiled)
                part.replace(self._path)
            finally:
                part.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
    except OSError:  # it was never written
        return b""
