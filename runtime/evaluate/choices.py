"""Multiple choice on a backend: how likely each choice is after its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import LlamaExportError, UsageError
from ...progress import Progress
from ..sequence import Backend
from ..text import Tokenizer
from .ledger import Ledger
from .likelihood import log_probabilities, logits_after
from .questions import Question

_Ids = Sequence[int]


@dataclass(frozen=True)
class Encoded:
    """A question as token ids. contexts, choices: of each choice; contexts differ only where a choice leaves less room.
    cut: how many of them had to lose their beginning.
    """

    contexts: tuple[_Ids, ...]
    choices: tuple[_Ids, ...]
    cut: int


@dataclass(frozen=True)
class QuestionScore:
    """item: its number. log_p: of each choice, in nats, summed over its tokens. cut: as of `Encoded`."""

    item: int
    log_p: tuple[float, ...]
    cut: int

    def chosen(self, lengths: Sequence[int] | None = None) -> int:
        """The likeliest choice, or the likeliest per unit of `lengths`; the first of several."""
        log_p = np.asarray(self.log_p)
        return int(np.argmax(log_p if lengths is None else log_p / np.asarray(lengths)))


def score_questions(
    backend: Backend,
    tokenizer: Tokenizer,
    begin: int | None,
    questions: Sequence[Question],
    ledger: Ledger,
    progress: Progress,
) -> list[QuestionScore]:
    """Score the questions that the ledger has not; return all scores. begin: the token that stands for an empty
    context.

    Raises UsageError naming the line of a choice without tokens or of more than the context takes, LlamaExportError
    naming the line whose logits are not finite.
    """
    done = min(len(ledger.items), len(questions))
    for number in range(done, len(questions)):
        question = questions[number]
        encoded = encode(question, tokenizer, begin, backend.capacity)
        log_p = _log_probabilities(backend, encoded)
        if not np.isfinite(log_p).all():
            raise LlamaExportError(
                f"Logits are not finite: the bundle's, for the question in line {question.line}; run `verify` on the "
                "bundle, which tells whether it is at fault."
            )
        ledger.append({"log_p": log_p, "cut": encoded.cut})
        progress.count(number + 1, len(questions), done)
    return ledger.read(QuestionScore, len(questions))


def encode(question: Question, tokenizer: Tokenizer, begin: int | None, capacity: int) -> Encoded:
    """Context and choices as lm-evaluation-harness splits them: spaces at the context's end belong to the choice, both
    are tokenised together, and what lies behind as many tokens as the context has alone is the choice's. Where both are
    too long for the cache, the context loses its beginning.
    """
    context = question.context.rstrip()
    gap = question.context[len(context) :] + " "
    own = tokenizer.encode(context) if context else [] if begin is None else [begin]
    if not own:
        raise UsageError(f"Line {question.line}: the context is empty, and the model has no token to begin with.")
    contexts, choices = [], []
    for number, text in enumerate(question.choices):
        choice = tokenizer.encode(context + gap + text)[len(own) :] if context else _alone(tokenizer, gap + text)
        if not choice:
            raise UsageError(f"Line {question.line}: choice {number} (from 0) has no token of its own; give it text.")
        room = capacity - len(choice) + 1  # nothing is predicted after the last token
        if room < 1:
            raise UsageError(
                f"Line {question.line}: choice {number} (from 0) has {len(choice)} tokens, more than the context of "
                f"{capacity} takes; shorten it, or build with a larger --context."
            )
        contexts.append(own[-room:])
        choices.append(choice)
    return Encoded(tuple(contexts), tuple(choices), sum(len(cut) < len(own) for cut in contexts))


def _alone(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, special=False)


def _log_probabilities(backend: Backend, encoded: Encoded) -> list[float]:
    """Of each choice; a context that several share is computed once."""
    found, context, after = [], None, None
    for own, choice in zip(encoded.contexts, encoded.choices, strict=True):
        if after is None or own != context:
            backend.rewind(0)
            after, context = backend.extend(own), own
        backend.rewind(len(own))
        log_p = float(log_probabilities(after, choice[:1])[0])
        for start, logits in logits_after(backend, choice[:-1], 0):
            log_p += float(log_probabilities(logits, choice[start + 1 : start + 1 + len(logits)]).sum())
        found.append(log_p)
    return found
