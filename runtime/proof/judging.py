"""From logits to cases: what was replayed is compared with what was expected, and the gates are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ...progress import Progress
from ..arrays import Float32
from .gates import Limits
from .parity import BEST, Comparison, compare
from .reference import Logits, Prompt, Reference, compress
from .replayer import Replayer
from .verdict import Case, Check, Choice, Gate, Moment
from .ways import GREEDY, ONE_PIECE, WAYS, Piece, Text

MAX_KL = "max_kl"
"""The figure of a user's own gate: the mean over all positions of what quantisation cost."""
MOST_WORST = 3
"""Positions that are told of a case."""

Read = Callable[[int], str]
"""A token's text."""


@dataclass(frozen=True)
class Question:
    """One line of a verdict about logits. id: of the check; ways: in order; prompts: their names; limits: what may be;
    tells: whether its worst positions are told.
    """

    id: str
    title: str
    ways: tuple[str, ...]
    prompts: tuple[str, ...]
    limits: Limits
    details: tuple[str, ...] = ()
    tells: bool = False

    def planned(self) -> Iterator[tuple[str, str, str]]:
        """The way, prompt and figure of every gate."""
        for way in self.ways:
            for prompt in self.prompts:
                yield from ((way, prompt, figure) for figure in self.limits.figures(way))


@dataclass
class Judge:
    """Gathers the comparisons of one question. expected: the logits of each prompt."""

    question: Question
    prompts: Sequence[Prompt]
    expected: Sequence[Logits]
    parts: dict[tuple[str, int], list[tuple[int, Comparison]]] = field(default_factory=dict)

    @cached_property
    def largest(self) -> float:
        """The magnitude of what is expected."""
        return max(float(np.abs(logits.top_logits).max(initial=0)) for logits in self.expected)

    def add(self, way: str, piece: Piece) -> None:
        """Compare a piece, if the way is asked about."""
        if way in self.question.ways:
            compared = compare(self.expected[piece.text].rows(piece.start, piece.stop), piece.logits)
            self.parts.setdefault((way, piece.text), []).append((piece.start, compared))

    def cases(self, read: Read) -> Iterator[Case]:
        """One for each way and prompt; none of ways that no gate is about, which are told in words."""
        for way in self.question.ways:
            if self.question.limits.figures(way):
                yield from (self._case(way, number, read) for number in range(len(self.prompts)))

    def compared(self, way: str) -> Comparison | None:
        """All positions of a way; None where it has not been gone."""
        parts = [part for (own, _), found in self.parts.items() if own == way for _, part in found]
        return Comparison.joined(parts) if parts else None

    def budgeted(self, check: Check, max_kl: float) -> Check:
        """The check with the user's own limit of the price: of the mean over all positions, in nats."""
        compared = self.compared(self.question.ways[0])
        assert compared is not None
        name, reason = "mean KL divergence over all positions", "the limit of --max-kl"
        gate = Gate(MAX_KL, name, float(compared.kl.mean()), max_kl, reason=reason)
        return replace(check, cases=(*check.cases, *whole([gate])))

    def written(self) -> tuple[int, int]:
        """Of the tokens of all continuations, how many greedy decoding wrote before it parted; and all."""
        own = 0
        for number, prompt in enumerate(self.prompts):
            for position, part in self.parts.get((GREEDY, number), []):
                follows = prompt.ids[position + 1 : position + 2]
                own += follows == (int(part.best_ids[0, 0]),)
        return own, sum(len(prompt.ids) - prompt.prompt_tokens for prompt in self.prompts)

    def _case(self, way: str, number: int, read: Read) -> Case:
        prompt, question = self.prompts[number], self.question
        found = sorted(self.parts[way, number], key=lambda part: part[0])
        positions = np.concatenate([np.arange(start, start + len(part)) for start, part in found])
        compared = Comparison.joined([part for _, part in found])
        case = Case(question.limits.judge(compared, self.largest, way), way, prompt.name)
        if way == GREEDY:
            return case
        kl = tuple(float(value) for value in compared.kl)
        own = int((positions < prompt.prompt_tokens).sum())
        worst = self._worst(number, positions, compared, read)
        return replace(case, kl=kl, prompt_tokens=own, first=int(positions[0]), worst=worst)

    def _worst(self, number: int, positions: np.ndarray, compared: Comparison, read: Read) -> tuple[Moment, ...]:
        """The positions with the largest KL divergence, none where it is 0."""
        if not self.question.tells:
            return ()
        ids, moments = self.prompts[number].ids, []
        for at in np.argsort(-compared.kl, kind="stable")[:MOST_WORST]:
            if compared.kl[at] == 0:
                break
            position = int(positions[at])
            expected = self.expected[number].rows(position, position + 1)
            moments.append(
                Moment(
                    position,
                    read(ids[position]),
                    float(compared.kl[at]),
                    float(compared.difference[at]),
                    _choices(expected.top_ids[0], expected.top_logits[0], read),
                    _choices(compared.best_ids[at], compared.best_logits[at], read),
                )
            )
        return tuple(moments)


class Kept:
    """What is kept of the logits of a run in one piece, to compare others with; for each text."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self._parts: list[list[Logits]] = [[] for _ in texts]

    def add(self, text: int, logits: Float32) -> None:
        """Keep the next logits [n, vocab] of a text; those that are not finite are judged elsewhere."""
        self._parts[text].append(compress(np.nan_to_num(logits)))

    @property
    def logits(self) -> list[Logits]:
        return [Logits.joined(parts) for parts in self._parts]


def by_prompt(reference: Reference) -> list[Logits]:
    """The logits of each prompt."""
    return [reference.of_prompt(number) for number in range(len(reference.index.prompts))]


def ways_of(judges: Sequence[Judge]) -> list[str]:
    """The ways that any of the questions is about, in order."""
    return [way for way in WAYS if any(way in judge.question.ways for judge in judges)]


def replay(
    replayer: Replayer,
    texts: Sequence[Text],
    ways: Sequence[str],
    chunk: int,
    progress: Progress,
    judges: Sequence[Judge] = (),
    kept: Kept | None = None,
) -> None:
    """Go all ways once, for all judges; `kept` takes what comes of `ONE_PIECE`. chunk: tokens of a piece."""
    for done, way in enumerate(ways):
        progress.share(done / len(ways))
        for piece in WAYS[way](replayer, texts, chunk):
            if kept is not None and way == ONE_PIECE:
                kept.add(piece.text, piece.logits)
            for judge in judges:
                judge.add(way, piece)
    progress.share(1.0)


def _choices(ids: Sequence[int], logits: Sequence[float], read: Read) -> tuple[Choice, ...]:
    pairs = zip(ids[:BEST], logits[:BEST], strict=True)
    return tuple(Choice(int(token), read(int(token)), float(logit)) for token, logit in pairs)


def whole(gates: Sequence[Gate]) -> tuple[Case, ...]:
    """The case of a check that has no ways or prompts."""
    return (Case(tuple(gates)),)


def told(judge: Judge) -> Iterator[str]:
    """What a check says beside its gates."""
    way = judge.question.ways[0]
    if (compared := judge.compared(way)) is not None:
        same, count = int((compared.shortfall == 0).sum()), len(compared)
        yield (
            f"same argmax at {same} of {count} positions, near ties counted as different; largest logit "
            f"{judge.largest:.3g}, largest difference {compared.difference.max(initial=0):.3g}, mean KL divergence "
            f"{compared.kl.mean():.3g}"
        )
    if GREEDY in judge.question.ways:
        own, count = judge.written()
        yield f"greedy text: {own} of {count} tokens are PyTorch's own choice"
