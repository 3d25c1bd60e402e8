"""Columns line up, and sizes keep three digits."""

import pytest
from llama_export.tables import columns, plain, size


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


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    assert plain("a\x1b[31mb\x07\tc\n\x9b\x7f\ud800é東🙂") == "a[31mb\tc\né東🙂"
