"""Giving back what was freed, before a stage that needs much memory."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Return freed memory to the system where the C library keeps it: glibc's threads hold tens of megabytes after the
    weights were written (malloc_trim(3)). Does nothing with another library.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
