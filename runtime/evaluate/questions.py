"""Multiple choice, one JSON object a line: the forms that datasets have, and how each is asked.

Prompts are those of lm-evaluation-harness 0.4 (tasks piqa, arc_easy, arc_challenge and hellaswag), without examples
before them. A choice follows the context after one space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError, did_you_mean
from ...tables import listed

MAX_CHOICES = 256
_KEYS_TOLD = 8


@dataclass(frozen=True)
class Question:
    """line: in its file, from 1. form: a key of `FORMS`. context: what the model reads before each of the choices.
    gold: the index of the right one.
    """

    line: int
    form: str
    context: str
    choices: tuple[str, ...]
    gold: int


class _UnfitError(Exception):
    """What a line lacks."""

    def __init__(self, lack: str, hint: str = "") -> None:
        super().__init__(f"{lack}.{hint}")


_Parts = tuple[str, list[str], int]


def read_questions(text: str, name: str) -> list[Question]:
    """The questions of a file's text; lines of white space alone are passed over. name: of the file, for messages.

    Raises UsageError with the number of the first line that is no question.
    """
    questions = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{name}, line {number}: this is no JSON object; give one question a line.") from error
        except _UnfitError as error:
            raise UsageError(f"{name}, line {number}: {error}") from error
    return questions


def _question(line: int, value: object) -> Question:
    if not isinstance(value, dict):
        raise _UnfitError("this is no JSON object; give one question a line")
    form = next((name for name, form in FORMS.items() if value.keys() >= set(form.keys)), None)
    if form is None:
        raise _unknown(value)
    context, choices, gold = FORMS[form].read(value)
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise _UnfitError(f"there are {len(choices)} choices, expected 2 to {MAX_CHOICES}")
    if not 0 <= gold < len(choices):
        raise _UnfitError(f"the answer is number {gold} (from 0), but there are {len(choices)} choices")
    for number, choice in enumerate(choices):
        if not choice.strip():
            raise _UnfitError(f"choice {number} (from 0) is empty")
    try:
        "".join((context, *choices)).encode()
    except UnicodeEncodeError as error:
        raise _UnfitError("the text is not valid Unicode") from error
    return Question(line, form, context, tuple(choices), gold)


def _unknown(value: Mapping[str, Any]) -> _UnfitError:
    found = listed([repr(key[:40]) for key in list(value)[:_KEYS_TOLD]]) or "none"
    known = {key for form in FORMS.values() for key in form.keys}
    hints = (did_you_mean(key, known - value.keys()) for key in value if key not in known)
    forms = "; ".join(", ".join(form.keys) for form in FORMS.values())
    return _UnfitError(
        f"the keys {found} are of no known form, expected all of one of: {forms}", next(filter(None, hints), "")
    )


def _ready(value: Mapping[str, Any]) -> _Parts:
    query = _text(value, "query")
    if query.startswith("Question:") and not query.rstrip().endswith("Answer:"):
        query += "\nAnswer:"
    return query, _texts(value["choices"], "choices"), _index(value["gold"], "gold")


def _piqa(value: Mapping[str, Any]) -> _Parts:
    context = f"Question: {_text(value, 'goal')}\nAnswer:"
    return context, [_text(value, "sol1"), _text(value, "sol2")], _index(value["label"], "label")


def _arc(value: Mapping[str, Any]) -> _Parts:
    choices = value["choices"]
    if not isinstance(choices, dict) or not choices.keys() >= {"text", "label"}:
        raise _UnfitError("choices must be an object with the lists text and label")
    labels, texts = _texts(choices["label"], "choices.label"), _texts(choices["text"], "choices.text")
    if len(labels) != len(texts):
        raise _UnfitError(f"choices has {len(texts)} texts and {len(labels)} labels")
    key = str(value["answerKey"]).strip()
    # Some of these files number the choices and letter the answer, or the other way round.
    other = key.translate(_OTHER_LABELS) if len(key) == 1 else key
    gold = next((labels.index(one) for one in (key, other) if one in labels), None)
    if gold is None:
        raise _UnfitError(f"answerKey is {key[:20]!r}, which is none of the labels {listed(labels[:_KEYS_TOLD])}")
    return f"Question: {_text(value, 'question')}\nAnswer:", texts, gold


_OTHER_LABELS = str.maketrans("12345ABCDE", "ABCDE12345")


def _hellaswag(value: Mapping[str, Any]) -> _Parts:
    context = _text(value, "ctx")
    if {"ctx_a", "ctx_b"} <= value.keys():
        context = f"{_text(value, 'ctx_a')} {_text(value, 'ctx_b').capitalize()}"
    if "activity_label" in value:
        context = f"{_text(value, 'activity_label')}: {context}"
    endings = [_unbracketed(ending) for ending in _texts(value["endings"], "endings")]
    return _unbracketed(context), endings, _index(value["label"], "label")


def _unbracketed(text: str) -> str:
    """Without the brackets that WikiHow's part of HellaSwag has, as lm-evaluation-harness removes them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _text(value: Mapping[str, Any], key: str) -> str:
    if not isinstance(value.get(key), str):
        raise _UnfitError(f"{key} must be a text")
    found: str = value[key]
    return found


def _texts(value: object, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _UnfitError(f"{key} must be a list of texts")
    return value


def _index(value: object, key: str) -> int:
    """The right choice's number, which some files write as text."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return int(value)
    if type(value) is not int:
        raise _UnfitError(f"{key} must be the number of the right choice, from 0; a test set without answers has none")
    return value


@dataclass(frozen=True)
class Form:
    """keys: by which it is recognised. read: context, choices and the index of the right one."""

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], _Parts]


FORMS: Mapping[str, Form] = {
    "ready": Form(("query", "choices", "gold"), _ready),
    "piqa": Form(("goal", "sol1", "sol2", "label"), _piqa),
    "arc": Form(("question", "choices", "answerKey"), _arc),
    "hellaswag": Form(("ctx", "endings", "label"), _hellaswag),
}
"""By name, in the order in which they are tried."""


def forms_of(questions: Sequence[Question]) -> Iterator[tuple[str, int]]:
    """The forms that there are, each with its number of questions."""
    for name in FORMS:
        count = sum(question.form == name for question in questions)
        if count:
            yield name, count
