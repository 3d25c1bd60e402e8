"""Moving large allocations to huge pages: which memory is asked for, and that asking keeps what is in it."""

from __future__ import annotations

import mmap
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from llama_export.runtime import huge_pages

MB = 1 << 20


def test_only_whole_pages_of_unnamed_private_memory() -> None:
    maps = (
        "100000-700000 rw-p 00000000 00:00 0 \n"  # 1 to 7 MB: whole pages from 2 to 6
        "800000-9ff000 rw-p 00000000 00:00 0\n"  # none whole
        "a00000-e00000 r--p 00000000 00:00 0 \n"
        "e00000-1400000 rw-p 00000000 00:00 0                  [heap]\n"
        "1400000-1c00000 rw-s 00000000 00:00 0 \n"
        "1c00000-2400000 rw-p 00000000 08:01 42                 /lib/x.so\n"
    )
    assert list(huge_pages.large_regions(maps)) == [(2 * MB, 6 * MB)]


def huge_kilobytes() -> int:
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found.group(1)) if found else 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are gathered on Linux alone")
def test_memory_keeps_its_content_and_refusing_memory_stays_as_it_is() -> None:
    memory, sparse = mmap.mmap(-1, 32 * MB, flags=mmap.MAP_PRIVATE), mmap.mmap(-1, 64 * MB, flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        sparse.madvise(mmap.MADV_NOHUGEPAGE)
    values = np.frombuffer(memory, np.uint32)
    before = huge_kilobytes()
    with huge_pages.gathering():
        values[:] = np.arange(values.size)
    assert (values == np.arange(values.size)).all()
    gained = huge_kilobytes() - before
    release = tuple(int(part) for part in re.findall(r"\d+", Path("/proc/sys/kernel/osrelease").read_text())[:2])
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if release < (6, 1) or not enabled.is_file() or "[never]" in enabled.read_text():
        pytest.skip("this kernel gathers no huge pages on request")
    assert 16 * 1024 < gained < 512 * 1024


def test_nothing_is_left_running_also_after_an_error() -> None:
    with pytest.raises(ValueError, match="loading failed"), huge_pages.gathering():
        raise ValueError("loading failed")
    assert "huge pages" not in {thread.name for thread in threading.enumerate()}
