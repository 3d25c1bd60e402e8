"""Text to tokens, and tokens to text as they come: whole characters only, and no part of a stop string."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import LlamaExportError, UsageError
from .bundle import Tokens

_UNFINISHED = "�"  # what decoders put for bytes that are no character, or not yet one
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NOT_UNICODE = "The text is not valid Unicode; give it as UTF-8."
_CONTEXT = 16  # tokens of a prompt that can matter to how its continuation reads


class Tokenizer:
    """A bundle's `tokenizer.json`, used exactly as it says: its own normaliser, post-processor (BOS) and decoder."""

    def __init__(self, inner: Any) -> None:
        """`inner` is a `tokenizers.Tokenizer`; truncation and padding left in its file are switched off."""
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        decoder = inner.decoder
        self._has_byte_tokens = decoder is not None and decoder.decode(["<0x41>"]) == "A"

    @staticmethod
    def load(path: Path, tokens: Tokens) -> Tokenizer:
        """Read tokenizer.json.

        Raises LlamaExportError when it cannot be read, or begins texts differently from what the manifest says: a
        missing or doubled BOS token makes every answer worse without a sign of it.
        """
        tokenizer = Tokenizer.from_file(path)
        adds_bos = tokens.bos is not None and tokenizer.encode("a")[:1] == [tokens.bos]
        if adds_bos != tokens.add_bos:
            said, does = ("", " not") if tokens.add_bos else (" not", "")
            raise LlamaExportError(
                f"The manifest says that texts do{said} begin with the BOS token, "
                f"but {path.name} does{does} put it there; build the bundle again."
            )
        return tokenizer

    @staticmethod
    def from_file(path: Path) -> Tokenizer:
        """Read a tokenizer.json of which no manifest says anything; LlamaExportError when it cannot be read."""
        from tokenizers import Tokenizer as Inner  # noqa: PLC0415 (commands that need no tokens start without it)

        try:
            return Tokenizer(Inner.from_file(str(path)))
        except Exception as error:  # tokenizers raises Exception itself
            raise LlamaExportError(f"{path} is not a tokenizer that can be read: {error}.") from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of `text`. special: with the BOS token and whatever else the post-processor adds.

        Special tokens that are written out in the text are recognised, as in transformers. Raises UsageError when
        `text` holds half of a surrogate pair, which is no Unicode text.
        """
        try:
            ids: list[int] = self._inner.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise UsageError(_NOT_UNICODE) from error
        return ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of `text`, as `encode` does, and the character of `text` at which each begins; tokens that are
        none of the text (BOS) begin at 0. Raises UsageError as `encode` does.
        """
        try:
            encoding = self._inner.encode(text)
        except (TypeError, UnicodeEncodeError) as error:
            raise UsageError(_NOT_UNICODE) from error
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens; bytes that are no character become U+FFFD."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def told(self, token: int) -> str:
        """One token for people: special ones by name, and by number those that the tokenizer does not know."""
        name = self._inner.id_to_token(token)
        return f"#{token}" if name is None else self.decode([token]) or name

    def ends_in_byte(self, token: int) -> bool:
        """Tell whether a token is one raw byte (SentencePiece's byte fallback), whose reading the next may change."""
        return self._has_byte_tokens and _BYTE_TOKEN.fullmatch(self._inner.id_to_token(token) or "") is not None


class StreamDecoder:
    """Decodes tokens one at a time; the pieces joined equal the decoding of all tokens at once.

    A token alone does not tell its text: characters span tokens, and decoders strip a space at the start of a text.
    So a short window is decoded whole, and what it adds to the last text is new. Text waits while it ends in an
    unfinished character or a byte token (a run of byte tokens that is not UTF-8 turns, as a whole, into replacement
    characters).
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """`context`: the tokens before the first, when the text continues theirs (then a leading space is kept)."""
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._settled = 0  # tokens at the start of the window whose text was given out
        self._given = ""  # the window's text up to there, decoded alone
        for token in context[-_CONTEXT:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain, often one word, possibly empty."""
        self._window.append(token)
        if self._tokenizer.ends_in_byte(token):
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(_UNFINISHED) or len(text) <= len(self._given):
            return ""
        new = text[len(self._given) :]
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._given = self._tokenizer.decode(self._window)
        return new

    def flush(self) -> str:
        """Return the text that was waiting, when no token follows; unfinished characters become U+FFFD."""
        new = self._tokenizer.decode(self._window)[len(self._given) :]
        self._window, self._settled, self._given = [], 0, ""
        return new


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces, and lets nothing of it through."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take a piece; return what can be shown: up to a stop string, less an end that might become one."""
        if not self._stops or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.found = min(places)
            self._held = ""
            return text[:place]
        keep = self._beginning_at_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back, when the text ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, text: str) -> int:
        """Return the length of the longest end of `text` that is the beginning of a stop string, but not all of it."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
