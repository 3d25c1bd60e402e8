"""Plain text for people: columns that line up, sizes with their unit, and nothing that a terminal obeys."""

from __future__ import annotations

from collections.abc import Sequence

_OBEYED = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000)])
"""All control characters but tab and line end, and halves of surrogate pairs, which cannot be written."""


def plain(text: str) -> str:
    """`text` without control characters: what a checkpoint, bundle or model says is shown, not obeyed."""
    return text.translate(_OBEYED)


def listed(words: Sequence[str], last: str = "and") -> str:
    """ "fp16, int8 and int4"; empty for no words."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> list[str]:
    """Lines in which every column but the last is as wide as its widest cell; rows are of one length."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def size(count: int) -> str:
    """Bytes in decimal units, to three digits: "913 bytes", "42.1 kB", "806 MB", "2.47 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{count} bytes"
