"""The text that quality is measured on, in windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import LlamaExportError
from ..names import BUILT_IN
from ..runtime.evaluate.inputs import read_text
from .calibration_text import built_in_text
from .source import Source

WINDOW = 256
"""Most tokens of a window."""

LEAST_WINDOWS = 4
"""Windows for which windows are made shorter: an interval takes several."""

_LEAST_TOKENS, _MOST_TOKENS = 256, 2048
_WEIGHTS = 320_000_000_000
"""Weights times tokens, within these limits: 2,048 tokens up to 156 million weights, 256 from 1.25 billion on."""

_LEAST_CONTEXT = 2
_SHORTEST = 16
"""Tokens of a window, where the context takes so many."""


@dataclass(frozen=True)
class QualityText:
    """Windows of token ids, each with what the model's tokenizer puts before a text. name, sha256: of the whole text,
    "built-in" where it is ours.
    """

    name: str
    sha256: str
    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """In all windows."""
        return sum(map(len, self.windows))


def quality_text(source: Source, file: Path | None, context: int) -> QualityText:
    """The beginning of a text in as many windows as measuring in reasonable time allows. file: None for the part of the
    built-in text that calibration never sees.

    Raises UsageError where the file is no text in UTF-8, LlamaExportError where it cannot be read or is too short, and
    where its tokens are none of the model's.
    """
    if context < _LEAST_CONTEXT:
        raise LlamaExportError(
            f"a context of {context} has no token after another; give --context, or add --no-quality."
        )
    if file is None:
        name, text = BUILT_IN, built_in_text()[1]
        sha256 = hashlib.sha256(text.encode()).hexdigest()
    else:
        read = read_text(file)
        name, text, sha256 = file.name, read.text, read.sha256
    before = (source.tokens.bos,) if source.tokens.add_bos and source.tokens.bos is not None else ()
    length, count = _windows(_tokens(source), context)
    body = max(1, length - len(before))
    ids = _ids(source, text, body * count, name)
    windows = tuple((*before, *part) for part in _parts(ids, body) if len(before) + len(part) > 1)
    if not windows:
        raise LlamaExportError(
            f"{name} holds {len(ids)} tokens, but measuring quality takes 2 at least; name a text of a few hundred "
            "words, or add --no-quality."
        )
    return QualityText(name, sha256, windows)


def _tokens(source: Source) -> int:
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in source.tensors.values() if len(tensor.shape) > 1)
    return min(max(_WEIGHTS // max(1, weights), _LEAST_TOKENS), _MOST_TOKENS)


def _windows(tokens: int, context: int) -> tuple[int, int]:
    """Length and number of windows."""
    length = min(WINDOW, max(_SHORTEST, tokens // LEAST_WINDOWS), context)
    return length, max(LEAST_WINDOWS, tokens // max(1, length))


def _ids(source: Source, text: str, most: int, name: str) -> list[int]:
    tokenizer = Tokenizer.from_str(source.content("tokenizer.json").decode())
    tokenizer.no_truncation()  # a tokenizer.json may come with the length that it was trained at
    tokenizer.no_padding()
    # No token is of more than a few hundred characters; a whole book would take a while.
    ids: list[int] = tokenizer.encode(text[: most * 64], add_special_tokens=False).ids[:most]
    if ids and max(ids) >= source.shape.vocab:
        raise LlamaExportError(
            f"The tokenizer of {source.model_id} gives tokens beyond the model's {source.shape.vocab} for {name}, so "
            "they do not belong together; take the model's own tokenizer.json."
        )
    return ids


def _parts(ids: list[int], length: int) -> Iterator[list[int]]:
    """Consecutive windows; a last one of less than half of the length is left out, unless it is the only one."""
    for start in range(0, len(ids), length):
        part = ids[start : start + length]
        if start == 0 or 2 * len(part) >= length:
            yield part
