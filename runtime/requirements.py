"""Is what is installed new enough for a bundle?"""

from __future__ import annotations

import platform
import re

from ..errors import LlamaExportError


def parse_version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version without trailing zeros: (1, 23, 2) for "1.23.2" and "1.23.2.0+cpu"."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in match.group().split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def require(what: str, installed: str, minimum: str | None, remedy: str) -> None:
    """Raise LlamaExportError when version `installed` of `what` is below `minimum`; None allows any version."""
    if minimum is not None and parse_version(installed) < parse_version(minimum):
        raise LlamaExportError(f"This bundle needs {what} {minimum} or newer, but here is {installed}; {remedy}.")


def require_python(minimum: str | None) -> None:
    """Raise LlamaExportError when this Python is older than `minimum`."""
    require("Python", platform.python_version(), minimum, "run it with a newer Python or build it for this device")
