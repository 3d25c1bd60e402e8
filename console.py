"""The standard streams: there, able to take any text, and known to obey escape sequences or not."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TextIO

_VIRTUAL_TERMINAL = 0x0004
"""ENABLE_VIRTUAL_TERMINAL_PROCESSING (Windows Console API, SetConsoleMode)."""


def prepare_streams() -> None:
    """Make the standard streams fit to print to and read from, whatever started this process.

    What a stream's encoding lacks is printed as "?" instead of ending the command. On Windows, streams that are files
    or pipes are UTF-8, as they are everywhere from Python 3.15 on (PEP 686), unless PYTHONIOENCODING says otherwise:
    the code page there would lose most scripts. Python has None for a stream that the shell closed (`>&-`), and much of
    what prints does not expect that.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 (for good)
        elif hasattr(stream, "reconfigure"):
            if sys.platform == "win32" and not stream.isatty() and not os.environ.get("PYTHONIOENCODING"):
                stream.reconfigure(encoding="utf-8")
            if name == "stdout":
                stream.reconfigure(errors="replace")


def printable(text: str, stream: TextIO) -> bool:
    """Whether a stream's encoding has every character of a text."""
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def obeys_escapes(stream: TextIO) -> bool:
    """Whether a stream is a terminal that obeys escape sequences.

    Windows' consoles know them since Windows 10, version 1511, and obey when told to; this tells them.
    """
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 (only there)

        kernel = ctypes.WinDLL("kernel32")
        handle, mode = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno())), ctypes.c_ulong()
        if not kernel.GetConsoleMode(handle, ctypes.byref(mode)):
            return False
        return bool(kernel.SetConsoleMode(handle, ctypes.c_ulong(mode.value | _VIRTUAL_TERMINAL)))
    return True
