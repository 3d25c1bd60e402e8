"""How much memory a machine with Windows has: its kernel tells by a call, not by a file."""

from __future__ import annotations

import ctypes
from typing import Any


class _Status(ctypes.Structure):
    """MEMORYSTATUSEX (Windows API, sysinfoapi.h). The first field is to be its own size."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended", ctypes.c_uint64),
    )


def windows_memory(kernel: Any) -> tuple[int, int]:
    """Total and available bytes, zeros where it does not tell. kernel: kernel32, as ctypes loads it."""
    status = _Status(length=ctypes.sizeof(_Status))
    told = kernel.GlobalMemoryStatusEx(ctypes.byref(status))
    return (status.total, status.available) if told else (0, 0)
