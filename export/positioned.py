"""Reading at a place of an open file, from any thread: the descriptor's own position stays where it is."""

from __future__ import annotations

import os


def read_into(descriptor: int, target: memoryview, offset: int) -> None:
    """Fill `target` (bytes) with what begins at `offset` of the file; one preadv may return less than asked.

    Raises OSError, and EOFError with the place where the file ended.
    """
    while target:
        count = os.preadv(descriptor, [target], offset)
        if count == 0:
            raise EOFError(offset)
        target, offset = target[count:], offset + count
