"""What an evaluation found: figures with their intervals, for programs and for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import LlamaExportError
from .runtime.evaluate.choices import QuestionScore
from .runtime.evaluate.intervals import Estimate, mean, quantile, wilson
from .runtime.evaluate.questions import Question, forms_of
from .runtime.evaluate.scoring import AgainstOriginal, WindowScore
from .runtime.evaluate.windows import Tokens, Window
from .tables import columns

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Figure:
    """One row. key: in JSON; label: for people; shown: how a number of it is written."""

    key: str
    label: str
    estimate: Estimate
    shown: Callable[[float], str]


@dataclass(frozen=True)
class Evaluation:
    """about: what was measured and how, as JSON. figures: what was found. notes: sentences for people."""

    kind: str
    about: Mapping[str, Any]
    figures: Sequence[Figure]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """For programs: `about`, and each figure as `value` and `interval`."""
        figures = {figure.key: figure.estimate.to_json() for figure in self.figures}
        return {"schema_version": SCHEMA_VERSION, "kind": self.kind, **self.about, **figures}

    def lines(self) -> list[str]:
        """For people."""
        return [*columns([_cells(figure) for figure in self.figures]), *self.notes]


def _cells(figure: Figure) -> tuple[str, str, str]:
    found = figure.estimate
    if found.low is None or found.high is None:
        return figure.label, figure.shown(found.value), ""
    return figure.label, figure.shown(found.value), f"({figure.shown(found.low)} to {figure.shown(found.high)})"


def _perplexity(nll: float) -> float:
    """Raises LlamaExportError where it is beyond all numbers, which no sound model's is."""
    try:
        return math.exp(nll)
    except OverflowError as error:
        raise LlamaExportError(
            f"The loss of {nll:.3g} nats a token is too large for a perplexity; run `verify` on the bundle, which "
            "tells whether it is at fault."
        ) from error


def of_text(
    about: Mapping[str, Any], tokens: Tokens, windows: Sequence[Window], scores: Sequence[WindowScore]
) -> Evaluation:
    """The evaluation of a text's windows."""
    counts = [window.scored for window in windows]
    nll = mean([score.nll for score in scores], counts)
    scored, size = sum(counts), sum(map(tokens.bytes_scored, windows))
    figures = [
        Figure("perplexity", "perplexity", nll.mapped(_perplexity), _digits(2)),
        Figure("nll", "loss, nats a token", nll, _digits(4)),
    ]
    if size:
        share = scored / size / math.log(2)
        figures.append(Figure("bits_per_byte", "bits a byte", nll.mapped(lambda value: value * share), _digits(4)))
    against = [score.against for score in scores if score.against is not None]
    if against:
        figures += _against(scores, against, counts)
    return Evaluation("text", {**about, "tokens": scored, "bytes": size}, figures, _text_notes(about, scored))


def _against(scores: Sequence[WindowScore], against: Sequence[AgainstOriginal], counts: Sequence[int]) -> list[Figure]:
    theirs = mean([one.nll for one in against], counts)
    more = mean([score.nll - one.nll for score, one in zip(scores, against, strict=True)], counts)
    kl, places = [one.kl for one in against], mean([math.fsum(one.kl) for one in against], counts)
    same = mean([one.same for one in against], counts)
    return [
        Figure("original_perplexity", "the original's perplexity", theirs.mapped(math.exp), _digits(2)),
        Figure("original_nll", "the original's loss", theirs, _digits(4)),
        Figure("nll_difference", "loss above the original's", more, "{:+.5f}".format),
        Figure("kl_mean", "KL(original || bundle), mean", places, _short),
        Figure("kl_median", "the same, median", quantile(kl, 0.5), _short),
        Figure("kl_p99", "the same, 99th percentile", quantile(kl, 0.99), _short),
        Figure("top1_agreement", "same likeliest token", _within(same), _percent),
    ]


def _text_notes(about: Mapping[str, Any], scored: int) -> list[str]:
    begins = "which begins with BOS" if about["bos"] else "without BOS"
    overlap = "" if about["stride"] == about["window"] else f", each {about['stride']:,} after the one before"
    return [
        f"{scored:,} tokens scored, in {about['windows']:,} of the {about['windows_in_file']:,} windows of "
        f"{about['window']:,} tokens{overlap}; of the text, {begins}.",
        *_interval_note("windows", about["windows"]),
        *_resumed_note("windows", about["resumed"]),
    ]


def of_questions(
    about: Mapping[str, Any], questions: Sequence[Question], scores: Sequence[QuestionScore]
) -> Evaluation:
    """The evaluation of multiple choice."""
    lengths: Mapping[str, Callable[[str], int] | None] = {
        "accuracy": None,
        "accuracy_per_character": len,
        "accuracy_per_byte": lambda text: len(text.encode()),
    }
    labels = ("right by likelihood", "right by likelihood a character", "right by likelihood a byte")
    pairs = list(zip(questions, scores, strict=True))
    figures = []
    for label, (key, length) in zip(labels, lengths.items(), strict=True):
        right = sum(
            score.chosen(None if length is None else [length(choice) for choice in question.choices]) == question.gold
            for question, score in pairs
        )
        figures.append(Figure(key, label, wilson(right, len(pairs)), _percent))
    chance = math.fsum(1 / len(question.choices) for question in questions) / len(questions)
    cut = sum(score.cut > 0 for score in scores)
    found = {"questions": len(questions), "forms": dict(forms_of(questions)), "chance": chance, "cut": cut}
    notes = [
        f"{len(questions):,} of the {about['questions_in_file']:,} questions; who guesses is right in "
        f"{_percent(chance)}.",
        *_interval_note("questions", len(questions)),
        *([f"{cut:,} contexts were too long and lost their beginning."] if cut else []),
        *_resumed_note("questions", about["resumed"]),
    ]
    return Evaluation("tasks", {**about, **found}, figures, notes)


def _interval_note(unit: str, count: int) -> list[str]:
    if count < 2 and unit == "windows":
        return ["One window tells nothing of how figures vary, so there are no intervals."]
    return [f"In brackets: 95 % confidence intervals, over {unit}."]


def _resumed_note(unit: str, count: int) -> list[str]:
    return [f"{count:,} {unit} were computed by an earlier run; --restart computes them again."] if count else []


def _within(share: Estimate) -> Estimate:
    return share.mapped(lambda value: min(1.0, max(0.0, value)))


def _digits(count: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{count}f}"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
