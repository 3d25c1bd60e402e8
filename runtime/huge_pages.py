"""Weights on huge pages: a step reads all of them, and with pages of 4 KB part of it goes into page tables.

Measured on 2 cores: 4 % more tokens a second on a model of 135M parameters, 6 to 12 % on one of 1B, and no longer a
speed that differs from process to process with where the pages happen to lie. Gathering costs 0.2 to 0.5 s a GB, in the
background. Linux 6.1 and later does it at once (MADV_COLLAPSE, madvise(2)); elsewhere nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_SIZE = 2 << 20
_COLLAPSE = 25
_ENOUGH = 4
_MAPS = Path("/proc/self/maps")
_PRIVATE = re.compile(r"(?P<start>[0-9a-f]+)-(?P<stop>[0-9a-f]+) rw-p 00000000 00:00 0\s*")
"""Anonymous memory without a name: what large allocations are."""


def gather_in_background() -> threading.Thread | None:
    """Start to move this process's large allocations to huge pages; None where that is not Linux's."""
    if not sys.platform.startswith("linux"):
        return None
    thread = threading.Thread(target=gather, name="huge pages", daemon=True)
    thread.start()
    return thread


def gather() -> None:
    """Ask for one huge page after another, so that no step waits for more than one.

    A region that refuses several in a row is left: the cache does, which is mostly empty, and so does all memory on a
    kernel that does not know the request.
    """
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with contextlib.suppress(OSError):  # no /proc: a container may hide it
        for start, stop in large_regions(_MAPS.read_text()):
            refused = 0
            for page in range(start, stop, _SIZE):
                refused = 0 if advise(page, _SIZE, _COLLAPSE) == 0 else refused + 1
                if refused == _ENOUGH:
                    break


def large_regions(maps: str) -> Iterator[tuple[int, int]]:
    """The unnamed private regions of /proc/self/maps that hold whole huge pages, cut to these."""
    for line in maps.splitlines():
        if match := _PRIVATE.fullmatch(line):
            start, stop = (int(match[name], 16) for name in ("start", "stop"))
            first, last = -(-start // _SIZE) * _SIZE, stop // _SIZE * _SIZE
            if first < last:
                yield first, last
