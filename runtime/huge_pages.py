"""Weights on huge pages: a step reads all of them, and with pages of 4 KB part of it goes into page tables.

Measured on 2 cores: 4 % more tokens a second on a model of 135M parameters, 6 to 12 % on one of 1B, and no longer a
speed that differs from process to process with where the pages happen to lie. ONNX Runtime prepares its weights on one
core, so that the other one can do this meanwhile. Linux 6.1 and later takes the request (MADV_COLLAPSE, madvise(2));
elsewhere nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_SIZE = 2 << 20
_COLLAPSE = 25
_ENOUGH = 4
_PAUSE = 0.02
_MAPS = Path("/proc/self/maps")
_PRIVATE = re.compile(r"(?P<start>[0-9a-f]+)-(?P<stop>[0-9a-f]+) rw-p 00000000 00:00 0\s*")
"""Anonymous memory without a name: what large allocations are."""


@contextlib.contextmanager
def gathering() -> Iterator[None]:
    """While the block fills large allocations, move them to huge pages; a last time when it has ended."""
    if not sys.platform.startswith("linux"):
        yield
        return
    gather, ended = gatherer(), threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            if gather() == 0:
                ended.wait(_PAUSE)

    thread = threading.Thread(target=repeat, name="huge pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    gather()


def gatherer() -> Callable[[], int]:
    """A function that moves what has been filled since its last call, and returns how many huge pages that made.

    A region that refuses several pages in a row is left: the cache does, which is mostly empty, and so does all memory
    on a kernel that does not know the request.
    """
    assert sys.platform.startswith("linux"), "`gathering` calls this nowhere else"
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done: set[int] = set()

    def gather() -> int:
        before = len(done)
        with contextlib.suppress(OSError):  # no /proc: a container may hide it
            for start, stop in large_regions(_MAPS.read_text("utf-8", "replace")):
                refused = 0
                for page in range(start, stop, _SIZE):
                    if page in done:
                        continue
                    if advise(page, _SIZE, _COLLAPSE) == 0:
                        done.add(page)
                        refused = 0
                    else:
                        refused += 1
                    if refused == _ENOUGH:
                        break
        return len(done) - before

    return gather


def large_regions(maps: str) -> Iterator[tuple[int, int]]:
    """The unnamed private regions of /proc/self/maps that hold whole huge pages, cut to these."""
    for line in maps.splitlines():
        if match := _PRIVATE.fullmatch(line):
            start, stop = (int(match[name], 16) for name in ("start", "stop"))
            first, last = -(-start // _SIZE) * _SIZE, stop // _SIZE * _SIZE
            if first < last:
                yield first, last
