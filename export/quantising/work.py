"""Where an interrupted quantisation goes on: a folder beside the bundle's place, with one file for each finished layer.

Files carry the start of their own SHA-256 in their names, so that one that was cut short or damaged is no file of ours;
they come to their names in one step. They are safetensors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import LlamaExportError, UsageError
from ...runtime.hashing import sha256_of
from ..destination import sync
from ..safetensors_file import StoredTensor, open_file

Arrays = Mapping[str, npt.NDArray[Any]]

_KEY, _LOCK = "key.json", "lock"
_DTYPES = {"float32": "F32", "uint8": "U8"}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DIGITS = 32
_MOST_KEY = 1 << 20
_PIECE = 1 << 24


class WorkFolder:
    """The files of one quantisation. Nothing in them is believed before its hash is that of its name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, stem: str, arrays: Arrays) -> dict[str, StoredTensor]:
        """Keep `arrays` (float32 and uint8) under this name, in place of what it had, and return them as `find` does.

        Raises LlamaExportError when the disk is full.
        """
        part = self.path / f"{stem}.part"
        try:
            digest = _write(part, arrays)
            found = self.path / f"{stem}-{digest[:_DIGITS]}.safetensors"
            part.replace(found)
            sync(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise self._unwritable(error) from error
        self.remove(stem, but=found)
        return open_file(found)

    def find(self, stem: str) -> dict[str, StoredTensor] | None:
        """What was kept under this name, nothing of it read yet; None where there is nothing, or it is damaged."""
        whole = (path for path in self._files(stem) if path.is_file() and _digest(path) == path.stem[-_DIGITS:])
        path = next(whole, None)
        return None if path is None else open_file(path)

    def remove(self, stem: str, but: Path | None = None) -> None:
        """Forget what was kept under this name."""
        for path in self._files(stem):
            if path != but:
                path.unlink(missing_ok=True)

    @property
    def holds_anything(self) -> bool:
        """Whether a later build could take something over."""
        return any(self.path.glob("*.safetensors"))

    def _files(self, stem: str) -> list[Path]:
        name = re.compile(re.escape(stem) + rf"-[0-9a-f]{{{_DIGITS}}}\.safetensors")
        return sorted(path for path in self.path.iterdir() if name.fullmatch(path.name))

    def _unwritable(self, error: OSError) -> LlamaExportError:
        if error.errno in _FULL:
            return LlamaExportError(
                f"The disk of {self.path} is full; free space and build again, which goes on after the last layer that "
                "is finished."
            )
        return LlamaExportError(f"{self.path} cannot be written: {error.strerror}; name another place for the bundle.")


def _digest(path: Path) -> str | None:
    """The start of the file's SHA-256; None where it cannot be read, so that it is made again."""
    try:
        return sha256_of(path)[:_DIGITS]
    except LlamaExportError:
        return None


def work_path(destination: Path) -> Path:
    """The work folder of a build to `destination`, an absolute path."""
    return destination.parent / f".{destination.name}.quantising"


@contextlib.contextmanager
def opened_work(path: Path, key: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """The work folder at `path`, as long as the block lasts for this process alone. With another key than this it is
    emptied first. It is removed when the block ends well, and when nothing in it would help a later build.

    Raises UsageError when another build uses it, or it cannot be written.
    """
    text = json.dumps(key, indent=2, sort_keys=True) + "\n"
    with contextlib.ExitStack() as stack:
        try:
            made = _make(path.parent)
            stack.callback(os.close, _locked(path))
            _prepare(path, text)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written: {error.strerror}; name another place for the bundle."
            ) from error
        work = WorkFolder(path)
        try:
            yield work
        except BaseException:
            if not work.holds_anything:
                _remove(path, made)
            raise
        _remove(path, made)


def _make(parent: Path) -> list[Path]:
    """Make this folder and those above it; return what was missing, innermost first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _locked(path: Path) -> int:
    """Make the folder, and lock a file in it until that is closed, which the end of the process does too."""
    while True:
        path.mkdir(exist_ok=True)
        if path.is_symlink():
            raise UsageError(f"{path} is a link, where a build keeps what it has quantised; remove it.")
        try:
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # another build ended and removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"Another build is quantising in {path} now; wait for its end or name another place for the bundle."
            ) from None
        if _is(path / _LOCK, descriptor):
            return descriptor
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the file that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _prepare(path: Path, key: str) -> None:
    """Leave what was made with the same key, and nothing else."""
    try:
        with (path / _KEY).open(encoding="utf-8") as file:
            same = file.read(_MOST_KEY) == key
    except (OSError, ValueError):
        same = False
    for entry in path.iterdir():
        if entry.name not in (_LOCK, _KEY) and not (same and entry.suffix == ".safetensors" and entry.is_file()):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if not same:
        part = path / f"{_KEY}.part"
        part.write_text(key, encoding="utf-8")
        part.replace(path / _KEY)


def _remove(path: Path, made: list[Path]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for folder in made:
        with contextlib.suppress(OSError):  # a bundle is in it by now
            folder.rmdir()


def _write(path: Path, arrays: Arrays) -> str:
    """Write a safetensors file to the disk; returns its SHA-256."""
    header: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            view = memoryview(data)
            digest.update(view)
            while view:
                view = view[file.write(view) :]

        put(len(text).to_bytes(8, "little"))
        put(text)
        for array in arrays.values():
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for start in range(0, len(flat), _PIECE):
                put(flat[start : start + _PIECE].data)
        os.fsync(file.fileno())
    return digest.hexdigest()
