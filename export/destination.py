"""The folder that a build makes: written beside its place, put there in one step, and never left half done."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .. import tables
from ..errors import LlamaExportError, UsageError
from ..runtime.bundle import MANIFEST

_NEW, _OLD, _LOCK = "bundle", "old", "lock"
"""Names inside a staging folder: what is being built, what it replaces, the file that a living build holds locked."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOST_MANIFEST = 1 << 24


@contextlib.contextmanager
def staged(destination: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends, and vanishes when it fails.

    An existing bundle is replaced only with `force`. At any moment, also when the process is killed, `destination` is
    what it was or the finished new bundle; what a killed build leaves beside it is removed by the next build to the
    same place. Parent folders are made. SIGTERM and SIGHUP end the block like Ctrl-C does.
    Raises UsageError, before anything is written, when `destination` cannot be used or another build is writing it;
    LlamaExportError when the disk is full.
    """
    place = check_destination(destination, force=force)
    made = _make_parents(place)
    try:
        with signals_raise(), _staging(place, force=force) as staging:
            try:
                yield staging / _NEW
            except OSError as error:
                if error.errno in _FULL:
                    raise _full(place) from error
                raise
            _publish(staging, place, force=force)
    except BaseException:
        _remove_empty(made)
        raise


def check_destination(destination: Path, *, force: bool) -> Path:
    """Return the absolute path where a bundle may be made, links followed.

    Raises UsageError when it may not: it is a file, a folder with other content, or a bundle and `force` is not set.
    """
    try:
        place = destination.expanduser().resolve()
        problem = _problem(place, force=force)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, or a ~user that does not exist
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UsageError(f"{destination} cannot be used: {reason}; name another folder.") from error
    if problem:
        raise UsageError(f"{destination} {problem}.")
    return place


def _problem(place: Path, *, force: bool) -> str | None:
    cwd = Path.cwd()
    if place == cwd or place in cwd.parents:
        return "is the current folder or one above it; name a new folder for the bundle"
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    if not nearest.is_dir():
        return f"cannot be made, as {nearest} is a file; name another folder"
    if place.is_mount():
        return "is a mount point, which cannot be replaced; name a folder in it"
    if nearest != place or not any(place.iterdir()):
        return None
    if not _is_bundle(place):
        return (
            "is a folder with other content than a bundle, which is never replaced; name another folder, or empty this "
            "one yourself"
        )
    return None if force else "holds a bundle already; pass --force to replace it, or name another folder"


def require_usable(place: Path, *, force: bool) -> None:
    """Make and remove a staging folder, so that what would end a build later ends it before its long work.

    Raises as `staged`.
    """
    made = _make_parents(place)
    try:
        with _staging(place, force=force):
            pass
    finally:
        _remove_empty(made)


def require_space(path: Path, size: int) -> None:
    """Check that `size` bytes fit on the disk of `path`, which need not exist. Raises LlamaExportError when not."""
    free = _free(path)
    if free < size:
        raise LlamaExportError(
            f"The bundle needs {tables.size(size)} in {path}, but only {tables.size(free)} are free there; free space "
            "or name a folder on another disk."
        )


def _full(place: Path) -> LlamaExportError:
    return LlamaExportError(
        f"The disk of {place.parent} is full, and nothing of the bundle was kept; free space or name a folder on "
        "another disk."
    )


def _unwritable(place: Path, error: OSError) -> UsageError:
    return UsageError(f"{place} cannot be written: {error.strerror}; name a folder that you may write to.")


def _free(path: Path) -> int:
    path = path.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def _is_bundle(folder: Path) -> bool:
    try:
        with (folder / MANIFEST).open("rb") as file:
            manifest = json.loads(file.read(_MOST_MANIFEST))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"schema_version", "dialect", "files"} <= manifest.keys()


def _make_parents(place: Path) -> list[Path]:
    """Make the folders above `place`, and return those that were missing, innermost first."""
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise _unwritable(place, error) from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # never made, or in use by somebody else by now
            folder.rmdir()


@contextlib.contextmanager
def _staging(place: Path, *, force: bool) -> Iterator[Path]:
    """Yield a staging folder with an empty folder to build in, locked as long as it lives, and remove it afterwards."""
    staging = place.parent / f".{place.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        try:
            with _locked_parent(place.parent):
                _clear_dead(place)
                check_destination(place, force=force)  # again: a dead build's bundle may be back in its place
                stack.callback(_discard, staging, place)
                staging.mkdir()
                lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                stack.callback(os.close, lock)
                _try_lock(lock)
                (staging / _NEW).mkdir()
        except OSError as error:
            raise (_full(place) if error.errno in _FULL else _unwritable(place, error)) from error
        yield staging


def _discard(staging: Path, place: Path) -> None:
    """Remove a staging folder, after taking back the bundle that it put aside if nothing came in its place."""
    old = staging / _OLD
    if old.is_dir() and not place.exists():
        try:
            old.rename(place)
        except OSError:
            return  # keep it: the next build to this place tries again
    shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked_parent(parent: Path) -> Iterator[None]:
    """Let one build at a time look for others and enter itself. Network file systems may lack locks on folders; there
    two builds that start in the same millisecond may both go on, and the one that ends last wins."""
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed, which the end of the process does too; False when another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear_dead(place: Path) -> None:
    """Remove what killed builds to `place` left.

    Raises UsageError when a build to `place` is alive.
    """
    name = re.compile(re.escape(f".{place.name}.partial-") + r"\d+-[0-9a-f]{8}")
    for staging in sorted(place.parent.iterdir()):
        if not name.fullmatch(staging.name) or staging.is_symlink() or not staging.is_dir():
            continue
        if _is_locked(staging / _LOCK):
            raise UsageError(f"Another build is writing {place} now; wait for its end or name another folder.")
        _discard(staging, place)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _publish(staging: Path, place: Path, *, force: bool) -> None:
    """Put the finished folder in its place.

    A folder cannot be renamed onto one that is not empty, so replacing a bundle needs an exchange of two names in one
    step. Linux has it (renameat2 with RENAME_EXCHANGE): there is no moment without a bundle, and no recovery to get
    wrong. File systems without it (NFS, some FUSE) and other systems get the second best: the old bundle is put aside
    in the staging folder, and `_discard` takes it back when the new one cannot be put there, in the next build if this
    process is killed between the two renames.
    """
    new = staging / _NEW
    try:
        _sync_tree(new)
        check_destination(place, force=force)  # somebody may have made it in the meantime
        if not place.exists() or not any(place.iterdir()):
            new.rename(place)
        elif not _exchange(new, place):
            place.rename(staging / _OLD)
            new.rename(place)
        sync(place.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(place) from error
        raise LlamaExportError(
            f"The finished bundle cannot be put to {place}: {error.strerror}; name another folder."
        ) from error


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system cannot, with both as they were."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync_tree(folder: Path) -> None:
    """Bring every file to the disk, so that a power cut after the rename cannot leave a bundle of empty files."""
    for base, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(base) / name)
        sync(Path(base))


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Make signals that end the process raise SystemExit instead, so that the staging folder is removed.

    Only where nobody handles or ignores them (nohup), and only in the main thread, which Python gives signals to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
