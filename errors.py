"""The errors that a user can cause: one sentence on what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlamaExportError(Exception):
    """A failure that the message explains; the command ends with `exit_code` and without a traceback."""

    exit_code = 1


class UsageError(LlamaExportError):
    """The command was called wrongly: an unknown name, a value out of range, a path that cannot be used."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `known` words, or an empty string when none is close."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
