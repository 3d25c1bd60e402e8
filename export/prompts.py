"""What a reference records: the built-in texts, or those of a user's file, as tokens of a model.

The built-in set (prompt_texts.toml) covers what graphs get wrong apart from each other: a text of a token or two,
prose, scripts other than Latin, code, repeated tokens, a conversation as the chat template writes it, and a text beyond
one prefill chunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomllib
from tokenizers import Tokenizer

from ..errors import LlamaExportError, UsageError
from ..runtime.chat import TEMPLATE_FILE, ChatTemplate, configured_template, special_tokens
from ..runtime.proof.reference_checks import MOST_POSITIONS
from .source import Source

CONTINUATION = 16
"""Greedy tokens after a prompt of a user's file."""

_MOST_BYTES = 16 << 20
_SURROGATES = re.compile("[\ud800-\udfff]")
"""Of a file of prompts."""
_USUAL = 48
"""Tokens of a prompt that is no long one."""
_DATE = "01 Jan 2025"
"""Told to chat templates that would otherwise put today's into a conversation: the same text every day."""


@dataclass(frozen=True)
class Text:
    """A prompt as it is written down: a text, or messages for the chat template. tokens: where it is cut, None where it
    has to fit as a whole; continuation: greedy tokens after it.
    """

    name: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tokens: int | None = None
    continuation: int = CONTINUATION


@dataclass(frozen=True)
class Asked:
    """A prompt for a model. text: what its tokenizer was given; ids: of the prompt; continuation: greedy tokens that
    are wanted after it, for which the context has room.
    """

    name: str
    text: str
    ids: tuple[int, ...]
    continuation: int


def built_in_prompts(source: Source, context: int, continuation: int | None = None) -> tuple[Asked, ...]:
    """The built-in texts for a model and a context, in which every one has room, and its continuation where any has.
    continuation: greedy tokens after each; default: as each text says.

    Left out are: the conversation where the checkpoint has no chat template, or one that fails; texts whose tokens lie
    outside of the model's vocabulary; and those that, where the context is small, are cut to what another one is.
    Raises LlamaExportError when nothing is left.
    """
    encoder = _Encoder(source)
    found: dict[tuple[int, ...], Asked] = {}
    for text in _built_in():
        wanted = min(text.continuation if continuation is None else continuation, context // 2)
        written = encoder.built_in(text)
        ids = written[1][: max(1, min(text.tokens or context, context - wanted))] if written is not None else ()
        if written is not None and ids and max(ids) < source.shape.vocab:
            asked = Asked(text.name, written[0], ids, min(wanted, context - len(ids)))
            found.setdefault(ids, asked)
    if not found:
        raise LlamaExportError(
            f"The tokenizer of {source.model_id} gives no token of the model's {source.shape.vocab} for "
            "any text, so they do not belong together; take the model's own tokenizer.json, or use --no-reference."
        )
    return tuple(found.values())


def prompts_of_file(source: Source, file: Path, context: int, continuation: int = CONTINUATION) -> tuple[Asked, ...]:
    """The prompts of a user's file, whole, each with as much of the continuation as the context has room for.

    A file called *.jsonl has an object on each line, with `text`, or `messages` for the chat template, and `name` where
    it likes; any other file has a prompt on each line. Raises UsageError where the file cannot be read, and
    LlamaExportError, naming the line, for what cannot be a prompt of this model.
    """
    encoder, asked = _Encoder(source), []
    for text in texts_of_file(file):
        written, ids = encoder.encode(text)
        where = f"The prompt {text.name!r} of {file}"
        if not ids:
            raise LlamaExportError(f"{where} has no tokens; write something there, or remove it.")
        if max(ids) >= source.shape.vocab:
            raise LlamaExportError(
                f"{where} has the token {max(ids)}, outside of the model's vocabulary of {source.shape.vocab}; take "
                "the model's own tokenizer.json, or another prompt."
            )
        if len(ids) > context:
            raise LlamaExportError(
                f"{where} has {len(ids)} tokens, more than the context of {context}; shorten it, or raise --context "
                "as far as the model knows."
            )
        asked.append(Asked(text.name, written, ids, min(continuation, context - len(ids))))
    if (total := sum(len(one.ids) + one.continuation for one in asked)) > MOST_POSITIONS:
        raise LlamaExportError(
            f"The prompts of {file} have {total} tokens, more than the {MOST_POSITIONS} of one reference; make several."
        )
    return tuple(asked)


def texts_of_file(file: Path) -> tuple[Text, ...]:
    """What a user's file of prompts says, see `prompts_of_file`."""
    content = _content(file)
    read = _objects if file.suffix.lower() == ".jsonl" else _lines
    texts = tuple(read(file, content.splitlines()))
    if not texts:
        raise LlamaExportError(f"{file} is empty; write a prompt on each line.")
    seen: set[str] = set()
    for text in texts:
        if text.name in seen:
            raise LlamaExportError(
                f"{file} calls two prompts {text.name!r}, by which they are told apart; rename one of them."
            )
        seen.add(text.name)
    return texts


def _built_in() -> Iterator[Text]:
    tables = tomllib.loads(files(__package__).joinpath("prompt_texts.toml").read_text(encoding="utf-8"))["prompts"]
    for table in tables:
        yield Text(**{**table, "messages": tuple(table.get("messages", ()))})


def _content(file: Path) -> str:
    if not file.is_file():
        kind = "is a folder" if file.is_dir() else "is no plain file" if file.exists() else "is not there"
        raise UsageError(f"{file} {kind}; --prompts takes a file with a prompt on each line, or JSON objects (.jsonl).")
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}); --prompts takes a text file.") from error
    if len(data) > _MOST_BYTES:
        raise LlamaExportError(f"{file} has more than {_MOST_BYTES >> 20} MB, too many prompts; name a smaller file.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LlamaExportError(
            f"{file} is no UTF-8 text (byte {error.start} does not fit); save it as UTF-8, or name another file."
        ) from error
    if not text.strip():
        raise LlamaExportError(f"{file} is empty; write a prompt on each line.")
    return text


def _lines(file: Path, lines: Sequence[str]) -> Iterator[Text]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise LlamaExportError(f"Line {number} of {file} is an empty prompt; remove it, or write one there.")
        yield Text(f"line {number}", line)


def _objects(file: Path, lines: Sequence[str]) -> Iterator[Text]:
    for number, line in enumerate(lines, 1):
        where = f"Line {number} of {file}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LlamaExportError(f'{where} is no JSON ({error}); write {{"text": "..."}} on each line.') from error
        yield _object(where, number, value)


def _object(where: str, number: int, value: object) -> Text:
    if not isinstance(value, dict) or not value.keys() <= {"name", "text", "messages"}:
        raise LlamaExportError(f"{where} must be an object with `text` or `messages`, and `name` if you like.")
    name, text, messages = value.get("name", f"line {number}"), value.get("text"), value.get("messages")
    if not isinstance(name, str) or not name.strip():
        raise LlamaExportError(f"{where} has the name {name!r}, which must be a text of some characters.")
    if _SURROGATES.search(name):
        raise LlamaExportError(f"{where} has the name {name!r}, which is no Unicode text: half of a surrogate pair.")
    if (text is None) == (messages is None):
        raise LlamaExportError(f"{where} must have either `text` or `messages`.")
    if messages is None:
        if not isinstance(text, str) or not text.strip():
            raise LlamaExportError(f"{where} has an empty prompt; `text` must be a text of some characters.")
        return Text(name, text)
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise LlamaExportError(f"{where} has `messages` that are no list of objects with `role` and `content`.")
    return Text(name, messages=tuple(messages))


class _Encoder:
    """A model's tokenizer and chat template."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._tokenizer = Tokenizer.from_str(source.content("tokenizer.json").decode())
        self._tokenizer.no_truncation()  # a tokenizer.json may come with the length that it was trained at
        self._tokenizer.no_padding()

    def encode(self, text: Text) -> tuple[str, tuple[int, ...]]:
        """What the tokenizer is given, and its ids; LlamaExportError where the chat template fails or there is none."""
        if text.text is not None:
            return text.text, self._ids(text.text, special=True)
        template = self._template()
        if template is None:
            raise LlamaExportError(
                f"The prompt {text.name!r} is a conversation, but {self._source.model_id} has no chat template; write "
                "it as `text`, or take a chat model."
            )
        written = template.render(text.messages, date_string=_DATE)
        return written, self._ids(written, special=False)

    def built_in(self, text: Text) -> tuple[str, tuple[int, ...]] | None:
        """The same; None where the checkpoint has no chat template, or one that cannot write this conversation."""
        try:
            return self.encode(text)
        except LlamaExportError:
            return None

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise LlamaExportError("A prompt holds half of a surrogate pair, which is no Unicode text.") from error

    def _template(self) -> ChatTemplate | None:
        settings = self._source.json("tokenizer_config.json")
        written = configured_template(settings)
        if TEMPLATE_FILE in self._source.files:
            written = self._source.content(TEMPLATE_FILE).decode("utf-8", "replace")
        return None if written is None else ChatTemplate(written, special_tokens(settings))


def without_long(prompts: Sequence[Asked], most: int) -> tuple[Asked, ...]:
    """The first `most` prompts that are no longer than a usual one."""
    return tuple(one for one in prompts if len(one.ids) <= _USUAL)[:most]
