"""Are the files of a bundle those that its manifest records? Checked in full once, then trusted by a stamp.

The stamp is a JSON file in the user's cache folder that holds size, modification time and inode of each file at the
time its hash was right. A start then costs one `stat` a file instead of a read of the whole model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from ..errors import LlamaExportError
from .bundle import Bundle
from .hashing import sha256_of_all

_MAX_STAMP_BYTES = 4 << 20


def check_files(bundle: Bundle, *, force: bool = False) -> bool:
    """Make sure that every file of the bundle is there with the size and SHA-256 that the manifest records.

    Files that a stamp vouches for are not read again unless `force`. Returns whether anything was hashed.
    Raises LlamaExportError naming the first file that is missing, not a plain file, or different.
    """
    if not force and is_checked(bundle):
        return False
    for problem in differing_files(bundle).values():
        raise LlamaExportError(problem)
    return True


def differing_files(bundle: Bundle) -> Mapping[str, str]:
    """Read every file; return a sentence for each that is not what the manifest records, by its name.

    Afterwards a stamp vouches for a bundle without such files, and for no other. Raises LlamaExportError when a file
    cannot be read.
    """
    stamp = _stamp_path(bundle)
    before, problems = _look(bundle)
    hashes = sha256_of_all(bundle.path / name for name in before)
    for name in before:
        if hashes[bundle.path / name] != bundle.manifest.files[name].sha256:
            problems[name] = (
                f"{bundle.path / name} is damaged: its SHA-256 differs from the manifest's; copy the bundle again."
            )
    if stamp is not None and problems:
        _remove_stamp(stamp)
    elif stamp is not None and _look(bundle) == (before, {}):  # a file that changed while it was read earns no stamp
        _write_stamp(stamp, _facts(bundle, before))
    return {name: problems[name] for name in bundle.manifest.files if name in problems}


def is_checked(bundle: Bundle) -> bool:
    """Whether a stamp vouches for the files as they are now, so that `check_files` would read none of them.

    Raises LlamaExportError naming the first file that is missing, not a plain file, or of another size.
    """
    files, problems = _look(bundle)
    for problem in problems.values():
        raise LlamaExportError(problem)
    return _read_stamp(_stamp_path(bundle)) == _facts(bundle, files)


def _look(bundle: Bundle) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return size, modification time and inode of every file that can be read, and what is wrong with each other."""
    files: dict[str, list[int]] = {}
    problems: dict[str, str] = {}
    for name, record in bundle.manifest.files.items():
        path = bundle.path / name
        try:
            found = path.stat()
        except OSError as error:
            problems[name] = f"{path} is missing ({error.strerror}); copy the bundle again."
            continue
        if not stat.S_ISREG(found.st_mode):
            problems[name] = f"{path} is not a file; copy the bundle again."
        elif found.st_size != record.size:
            problems[name] = (
                f"{path} is damaged: it has {found.st_size} bytes, the manifest says {record.size}; "
                "copy the bundle again."
            )
        else:
            files[name] = [found.st_size, found.st_mtime_ns, found.st_ino]
    return files, problems


def _facts(bundle: Bundle, files: dict[str, list[int]]) -> dict[str, object]:
    """Return what a stamp holds."""
    return {"bundle": str(bundle.path), "manifest": bundle.manifest_sha256, "files": files}


def cache_folder() -> Path | None:
    """Return where this user's caches of llama-export are, or None when there is no home folder."""
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "llama-export"
    with contextlib.suppress(RuntimeError):  # no home folder: nothing is cached
        return Path.home() / ".cache" / "llama-export"
    return None


def _stamp_path(bundle: Bundle) -> Path | None:
    folder = cache_folder()
    key = hashlib.sha256(f"{bundle.manifest_sha256}\0".encode() + os.fsencode(bundle.path)).hexdigest()
    return None if folder is None else folder / "verified" / f"{key}.json"


def _read_stamp(path: Path | None) -> object:
    """Return the decoded stamp, or None when it is absent or unreadable; its caller compares it whole."""
    if path is None:
        return None
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_STAMP_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def _write_stamp(path: Path, facts: dict[str, object]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs the next start its hashing
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            part.write_text(json.dumps(facts), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _remove_stamp(path: Path) -> None:
    with contextlib.suppress(OSError):  # a folder that is not ours to write holds no stamp of ours
        path.unlink()
