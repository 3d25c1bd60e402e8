"""Plain text for people: columns that line up, sizes with their unit, and nothing that a terminal obeys."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_OBEYED = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000)])
"""All control characters but tab and line end, and halves of surrogate pairs, which cannot be written."""
_JOINING, _WIDE = frozenset({"Mn", "Me", "Cf"}), frozenset({"W", "F"})


def plain(text: str) -> str:
    """`text` without control characters: what a checkpoint, bundle or model says is shown, not obeyed."""
    return text.translate(_OBEYED)


def listed(words: Sequence[str], last: str = "and") -> str:
    """ "fp16, int8 and int4"; empty for no words."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def width(text: str) -> int:
    """Columns of a terminal that `text` takes: two for a wide character, none for one that joins what is before it
    (Unicode Standard Annex 11).
    """
    return sum(map(_width, text))


def _width(character: str) -> int:
    if unicodedata.category(character) in _JOINING:
        return 0
    return 2 if unicodedata.east_asian_width(character) in _WIDE else 1


def clipped(text: str, most: int) -> str:
    """`text` as one plain line of at most `most` columns, with "…" where its end was left out."""
    taken = text[: 8 * most]
    line = " ".join(plain(taken).split())
    if len(taken) == len(text) and width(line) <= most:
        return line
    while width(line) > most - 1:
        line = line[:-1]
    return f"{line}…"


def columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> list[str]:
    """Lines in which every column but the last is as wide as its widest cell; rows are of one length."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return [
        (indent + "  ".join(cell + " " * (most - width(cell)) for cell, most in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def size(count: int) -> str:
    """Bytes in decimal units, to three digits: "913 bytes", "42.1 kB", "806 MB", "2.47 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{count} bytes"
