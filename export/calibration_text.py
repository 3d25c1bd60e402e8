"""The text that `--calibrate` names: read, checked and cut into sequences of tokens before anything long begins."""

from __future__ import annotations

import codecs
import hashlib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import accumulate
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import LlamaExportError, UsageError
from ..names import BUILT_IN
from .source import Source

LENGTH = 512
"""Most tokens of a sequence."""

TOKENS = 4096
"""Most tokens in all for scales of activations. From 2,048 to 4,096 of WikiText, SmolLM2-135M's largest magnitudes grow
by 0.6 % in the middle, by 8 % for one projection in ten; from 512 to 2,048 by 2 % and 10 %.
"""

SOLVED_TOKENS = 16_384
"""Most tokens in all for methods that solve for weights over what enters them, whose sums have a side for each column.
"""

CACHE_TOKENS = 2048
"""Most tokens in all for scales of a cache, which are bounds of what a few channels reach."""

_LEAST = 32
"""The part of the tokens asked for below which a text says little of others: 128 of 4,096."""

_TOKEN_BYTES = 64
"""Most bytes that are read for a token: text takes 1 to 8, and a file may be larger than memory."""

_CALIBRATED = 0.88
"""Of the built-in text, so much is for calibration; what it never sees is left to measure by."""


@cache
def built_in_text() -> tuple[str, str]:
    """The built-in text in two parts, cut between two paragraphs: what calibrates, and what is held out from it to
    measure quality with.
    """
    content = files(__package__).joinpath("calibration_default.txt").read_bytes()
    cut = content.index(b"\n\n", int(len(content) * _CALIBRATED)) + 2
    return content[:cut].decode(), content[cut:].decode()


@dataclass(frozen=True)
class CalibrationText:
    """Sequences of token ids as the model meets them, each with what its tokenizer puts before a text.

    sha256: of the file's first `read_bytes` bytes, more than which are not looked at. built_in: it is our own.
    """

    file: Path
    sequences: tuple[tuple[int, ...], ...]
    sha256: str
    read_bytes: int
    built_in: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return "the built-in text" if self.built_in else self.file.name

    def first(self, tokens: int) -> CalibrationText:
        """Its first sequences, of so many tokens together at most, but one at least."""
        ends = accumulate(map(len, self.sequences))
        count = max(1, sum(end <= tokens for end in ends))
        return replace(self, sequences=self.sequences[:count])

    @property
    def tokens(self) -> int:
        """In all sequences."""
        return sum(map(len, self.sequences))

    @property
    def note(self) -> str:
        """A sentence for the manifest."""
        return f"Inputs of projections were calibrated on {self.tokens:,} tokens of {self.name}."


def calibration_text(source: Source, file: Path | str, context: int, tokens: int = TOKENS) -> CalibrationText:
    """Read as much of a UTF-8 text as calibration uses: at most `tokens` tokens, in sequences of at most `LENGTH` and
    the context. file: or `names.BUILT_IN`, for the part of our own text that calibrates.

    Special tokens that the text spells out count as such, so that a text may hold conversations as the chat template
    writes them. Raises UsageError where the file is none that can be read, LlamaExportError where it holds no text, or
    too little.
    """
    built_in, most, least = file == BUILT_IN, tokens * _TOKEN_BYTES, tokens // _LEAST
    file = Path(file)
    content = built_in_text()[0].encode() if built_in else _read(file, most)
    ids = _encoded(source, _decoded(file, content, most))
    if len(ids) < least:
        raise LlamaExportError(
            f"{file} holds {len(ids)} tokens, but calibrating takes at least {least}; name a longer text, such as what "
            f"the model will be asked, a few thousand words of it, or --calibrate {BUILT_IN}."
        )
    if max(ids) >= source.shape.vocab:
        raise LlamaExportError(
            f"The tokenizer of {source.model_id} gives tokens beyond the model's {source.shape.vocab} for {file}, so "
            "they do not belong together; take the model's own tokenizer.json."
        )
    before = (source.tokens.bos,) if source.tokens.add_bos and source.tokens.bos is not None else ()
    length = max(1, min(context, LENGTH) - len(before))
    ids = ids[: tokens // (length + len(before)) * length]
    sequences = tuple((*before, *ids[start : start + length]) for start in range(0, len(ids), length))
    return CalibrationText(file, sequences, hashlib.sha256(content).hexdigest(), len(content), built_in)


def _encoded(source: Source, text: str) -> list[int]:
    """The tokens of a text, without what the tokenizer puts before one."""
    tokenizer = Tokenizer.from_str(source.content("tokenizer.json").decode())
    tokenizer.no_truncation()  # a tokenizer.json may come with the length that it was trained at
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


def _read(file: Path, most: int) -> bytes:
    """The first bytes of the file."""
    if not file.exists():
        raise UsageError(f"There is no {file}; --calibrate takes a text file in UTF-8, or {BUILT_IN}.")
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "no plain file"
        raise UsageError(f"{file} is {kind}; --calibrate takes a text file in UTF-8.")
    try:
        with file.open("rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise LlamaExportError(f"{file} cannot be read ({error.strerror}); --calibrate takes a text file.") from error


def _decoded(file: Path, content: bytes, most: int) -> str:
    if not content.strip():
        raise LlamaExportError(f"{file} is empty; name a text of a few thousand words to calibrate with.")
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        text = decoder.decode(content, final=len(content) < most)  # the last character may be cut
    except UnicodeDecodeError as error:
        raise LlamaExportError(
            f"{file} is no UTF-8 text (byte {error.start} does not fit); save it as UTF-8, or name another text."
        ) from error
    if "\0" in text:
        raise LlamaExportError(f"{file} is no text (it holds zero bytes); name a text in UTF-8 to calibrate with.")
    return text
