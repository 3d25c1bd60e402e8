"""Columns line up, and sizes keep three digits."""

import pytest
from llama_export.tables import clipped, columns, plain, size, width


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (42_123, "42.1 kB"),
        (2_104_556, "2.10 MB"),
        (806_000_000, "806 MB"),
        (2_471_645_608, "2.47 GB"),
        (1_500_000_000_000, "1,500 GB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_columns() -> None:
    assert columns([("a", "long", "x"), ("bbb", "b", "")], indent="> ") == ["> a    long  x", "> bbb  b"]


def test_wide_and_joining_characters_count_as_a_terminal_shows_them() -> None:
    assert [width(text) for text in ("abc", "東京", "e\u0301", "a\u200d", "")] == [3, 4, 1, 1, 0]
    assert columns([("東京", "x"), ("abc", "y")]) == ["東京  x", "abc   y"]


@pytest.mark.parametrize(
    ("text", "most", "line"),
    [
        ("short", 5, "short"),
        ("longer", 5, "long…"),
        ("東京都", 5, "東京…"),
        ("a\nb\t\x1b[31mc", 20, "a b [31mc"),
        ("x" * 10_000, 4, "xxx…"),
        (" " * 10_000 + "x", 4, "…"),
    ],
)
def test_clipped(text: str, most: int, line: str) -> None:
    assert clipped(text, most) == line
    assert width(line) <= most


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    assert plain("a\x1b[31mb\x07\tc\n\x9b\x7f\ud800é東🙂") == "a[31mb\tc\né東🙂"
