"""What has been computed so far, in a file that a later run goes on with.

One JSON document a line: first what is computed, then one for each item, numbered from 0. A killed run leaves lines
that are whole, and perhaps one that is not, which the next run drops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from ...errors import LlamaExportError
from ...progress import Progress
from ..decode_json import decode
from ..hashes import cache_folder

T = TypeVar("T")

_SCHEMA_VERSION = 1
_MAX_BYTES = 1 << 30
_NUMBER = "item"


class Ledger:
    """The items that are done, from the first on. As a context manager it closes its file."""

    def __init__(self, facts: Mapping[str, Any], progress: Progress, *, restart: bool = False) -> None:
        """facts: all that the items depend on, as JSON; a run with others has another file. restart: forget what there
        is. Without a cache folder that can be written, nothing is kept, which `progress` is told.
        """
        self.items: list[dict[str, Any]] = []
        self._progress = progress
        self._file: IO[bytes] | None = None
        head = {"schema_version": _SCHEMA_VERSION, **facts}
        folder, key = cache_folder(), hashlib.sha256(_line(head)).hexdigest()
        self.path = None if folder is None else folder / "eval" / f"{key}.jsonl"
        with self._kept():
            if self.path is None:
                raise OSError("there is no home folder")
            self._open(self.path, head, restart=restart)
        self.found = len(self.items)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, item: Mapping[str, Any]) -> None:
        """Add the next item; a kill after this call does not lose it."""
        line = _line({_NUMBER: len(self.items), **item})
        self.items.append(json.loads(line))  # as a later run will read it
        if self._file is not None:
            with self._kept():
                self._file.write(line)
                self._file.flush()

    def read(self, cls: type[T], count: int) -> list[T]:
        """The first `count` items as dataclasses. Raises LlamaExportError when one is not what a run has written."""
        try:
            return [decode(cls, item, f"{cls.__name__} {number}") for number, item in enumerate(self.items[:count])]
        except LlamaExportError as error:
            reason = str(error).removesuffix(".")
            raise LlamaExportError(f"{self.path} was changed ({reason}); begin anew with --restart.") from error

    def _open(self, path: Path, head: Mapping[str, Any], *, restart: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Opened to append as well: two runs of the same may then write at once without overwriting each other.
        self._file = path.open("a+b")
        self._file.seek(0)
        content = b"" if restart else self._file.read(_MAX_BYTES)
        first, *rest = content.splitlines(keepends=True) or [b""]
        valid = len(first)
        if first != _line(head):
            valid, rest = 0, []
        for line in rest:
            item = _item(line, len(self.items))
            if item is None:
                break
            self.items.append(item)
            valid += len(line)
        self._file.truncate(valid)
        if not valid:
            self._file.write(_line(head))
            self._file.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What fails in here ends the keeping, not the evaluation."""
        try:
            yield
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):  # it tries again to write what it could not
                    self._file.close()
            self._file = None
            self._progress.warn(
                f"What is computed cannot be kept for a later run ({error.strerror or error}); a run that is stopped "
                "begins anew."
            )


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _item(line: bytes, number: int) -> dict[str, Any] | None:
    """The item of a line, None where it is not whole or not the one with this number."""
    try:
        # Nothing that was computed is NaN or infinite, which `int` raises ValueError for.
        item = json.loads(line, parse_constant=int) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return item if isinstance(item, dict) and item.get(_NUMBER) == number else None
