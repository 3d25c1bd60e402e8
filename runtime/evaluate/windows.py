"""A text cut into windows of tokens, each of which the model reads alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UsageError
from ..text import Tokenizer


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a text, of which those from `first` on are scored; `first` is above `start`."""

    start: int
    stop: int
    first: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return self.stop - self.first


@dataclass(frozen=True)
class Tokens:
    """A text's token ids, and at which byte of its UTF-8 each begins, with the number of all bytes at the end."""

    ids: Sequence[int]
    starts: Sequence[int]

    def bytes_scored(self, window: Window) -> int:
        """Bytes that the scored tokens stand for; a character of several tokens counts where its first is."""
        return self.starts[window.stop] - self.starts[window.first]


def tokens_of(text: str, tokenizer: Tokenizer) -> Tokens:
    """Tokenise a text at once; it begins with BOS where the tokenizer puts it there.

    Raises UsageError when there are fewer than two tokens, of which nothing can be scored.
    """
    ids, places = tokenizer.encode_with_places(text)
    if len(ids) < 2:
        raise UsageError("The text has fewer than two tokens, so none has another before it; give a longer one.")
    return Tokens(ids, _byte_starts(text, places))


def _byte_starts(text: str, places: Sequence[int]) -> list[int]:
    """Places of characters as places of bytes, never one below the one before; the last is the text's end."""
    starts, at_char, at_byte = [], 0, 0
    for place in places:
        if place > at_char:  # a special token that was added has place 0
            at_byte += len(text[at_char:place].encode())
            at_char = place
        starts.append(at_byte)
    return [*starts, at_byte + len(text[at_char:].encode())]


def windows_of(count: int, window: int, stride: int) -> list[Window]:
    """Windows of at most `window` tokens over `count`, each beginning `stride` after the one before.

    Every token is scored once, given the tokens before it in its window; a window's first token, which has none, is
    scored in no window where windows do not overlap, and otherwise only the text's first is left out. This is what
    transformers' guide "Perplexity of fixed-length models" does.
    """
    found, scored = [], 0
    for start in range(0, count, stride):
        stop = min(start + window, count)
        first = max(scored, start + 1)
        if first < stop:
            found.append(Window(start, stop, first))
        scored = stop
        if stop == count:
            break
    return found
