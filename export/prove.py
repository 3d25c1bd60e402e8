"""One pass of PyTorch over prompts and proposed continuations, and the references that come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..progress import Progress
from ..runtime.arrays import Float32
from ..runtime.proof.reference import (
    EXACT,
    SCHEMA_VERSION,
    Identity,
    Index,
    Layers,
    Logits,
    Prompt,
    Reference,
)
from .prompts import Asked
from .reference import Computed, Samples, StreamedModel

MOST_LAYERS = 8
"""Layers that are sampled where nobody chooses them."""
_SAMPLED = ("hidden", "keys", "values")


@dataclass(frozen=True)
class About:
    """What a reference says of its model and of how it was made, see `Index`."""

    model_id: str
    revision: str | None
    dtype: str
    identity: Identity
    tools: Mapping[str, str]
    precision: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Proposed:
    """A prompt with the continuation that a graph proposes for it."""

    asked: Asked
    continuation: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.asked.ids + self.continuation

    @property
    def prompt_tokens(self) -> int:
        return len(self.asked.ids)


@dataclass(frozen=True)
class Proven:
    """What came of one prompt: its continuation as far as PyTorch would write it, and of each kind the logits of every
    position and the samples at the prompt's last token and at all after it.
    """

    proposed: Proposed
    logits: Mapping[str, Logits]
    samples: Mapping[str, Layers | None]

    def agreeing(self, kind: str) -> int:
        """Leading tokens of the continuation that are the argmax of this kind's logits."""
        chosen = self.logits[kind].top_ids[self.proposed.prompt_tokens - 1 :, 0].tolist()
        same = [token == own for token, own in zip(self.proposed.continuation, chosen, strict=False)]
        return same.index(False) if False in same else len(same)

    def cut(self, length: int) -> Proven:
        """The same with no more than `length` tokens of the continuation."""
        shorter = replace(self.proposed, continuation=self.proposed.continuation[:length])
        logits = {kind: one.rows(0, len(shorter.ids)) for kind, one in self.logits.items()}
        samples = {kind: None if one is None else _picked(one, range(length + 1)) for kind, one in self.samples.items()}
        return Proven(shorter, logits, samples)


def spread_layers(layers: int) -> tuple[int, ...]:
    """The layers that are sampled where nobody chooses them: evenly spread, the first and the last among them."""
    return tuple(sorted({round(place) for place in np.linspace(0, layers - 1, min(MOST_LAYERS, layers)).tolist()}))


def prove(
    model: StreamedModel,
    about: About,
    proposals: Sequence[Proposed],
    layers: Sequence[int],
    progress: Progress,
    full: Mapping[str, Path] | None = None,
) -> tuple[dict[str, Reference], dict[str, Computed]]:
    """The references of the kinds that `model` has sides for, by kind, and what was computed for them.

    Every continuation ends before the first token that PyTorch would have chosen otherwise, by the exact kind where it
    is there. Where that leaves none of it, PyTorch's own first token takes its place, and the weights pass a second
    time for these prompts alone. layers: whose samples are kept. full: where all logits of a kind are put, in a file
    that is mapped; the reference's `full` is it. Their weights are empty: `Index.weights` is for the caller to fill.
    """
    computed = _run(model, about, proposals, layers, progress, full)
    kind = EXACT if EXACT in computed else next(iter(computed))
    found = _by_prompt(proposals, computed)
    wrong = [number for number, one in enumerate(found) if one.proposed.continuation and not one.agreeing(kind)]
    full_again = {one: path.with_name(f"{path.name}.again") for one, path in (full or {}).items()}
    if wrong:
        own = [replace(proposals[number], continuation=(_own_token(found[number], kind),)) for number in wrong]
        again = _by_prompt(own, _run(model, about, own, layers, progress, full_again))
        for number, one in zip(wrong, again, strict=True):
            found[number] = one
    kept = [one.cut(one.agreeing(kind)) for one in found]
    whole = {
        one: _gathered(path, full_again[one], about.identity.vocab, proposals, kept, wrong)
        for one, path in (full or {}).items()
    }
    return {one: _reference(one, about, kept, layers, whole.get(one)) for one in computed}, computed


def _run(
    model: StreamedModel,
    about: About,
    proposals: Sequence[Proposed],
    layers: Sequence[int],
    progress: Progress,
    full: Mapping[str, Path] | None,
) -> dict[str, Computed]:
    """One pass, sampled at each prompt's last token and at all after it, as nobody knows yet where a text will end."""
    marks = [range(one.prompt_tokens - 1, len(one.ids)) for one in proposals]
    samples = Samples(tuple(layers), marks, about.identity) if layers else None
    return model.run([one.ids for one in proposals], progress, samples, full)


def _by_prompt(proposals: Sequence[Proposed], computed: Mapping[str, Computed]) -> list[Proven]:
    found, row, mark = [], 0, 0
    for one in proposals:
        rows, marks = row + len(one.ids), mark + len(one.continuation) + 1
        logits = {kind: side.logits.rows(row, rows) for kind, side in computed.items()}
        samples = {
            kind: None if side.layers is None else _picked(side.layers, range(mark, marks))
            for kind, side in computed.items()
        }
        found.append(Proven(one, logits, samples))
        row, mark = rows, marks
    return found


def _own_token(one: Proven, kind: str) -> int:
    return int(one.logits[kind].top_ids[one.proposed.prompt_tokens - 1, 0])


def _picked(layers: Layers, marks: Sequence[int]) -> Layers:
    """The samples at some of the marks."""
    picked = {name: getattr(layers, name)[:, np.asarray(marks)] for name in _SAMPLED}
    return replace(layers, **picked)


def _reference(
    kind: str, about: About, kept: Sequence[Proven], layers: Sequence[int], full: Float32 | None
) -> Reference:
    prompts = []
    for one in kept:
        asked, ids = one.proposed.asked, one.proposed.ids
        prompts.append(Prompt(asked.name, asked.text, ids, len(asked.ids), one.agreeing(kind)))
    index = Index(
        schema_version=SCHEMA_VERSION,
        kind=kind,
        model_id=about.model_id,
        revision=about.revision,
        dtype=about.dtype,
        precision=about.precision if kind == EXACT else None,
        adapter=about.adapter,
        identity=about.identity,
        prompts=tuple(prompts),
        weights=(),
        tables=(),
        layers=tuple(layers),
        full=full is not None,
        tools=about.tools,
    )
    logits = replace(Logits.joined([one.logits[kind] for one in kept]), full=full)
    return Reference(index, logits, _joined([one.samples[kind] for one in kept]))


def _joined(samples: Sequence[Layers | None]) -> Layers | None:
    """Of every prompt the first and the last mark, which are `Index.marks`."""
    ends = [_picked(one, sorted({0, one.hidden.shape[1] - 1})) for one in samples if one is not None]
    if not ends:
        return None
    joined = {name: np.concatenate([getattr(one, name) for one in ends], axis=1) for name in _SAMPLED}
    return replace(ends[0], **joined)


def _gathered(
    path: Path, again: Path, vocab: int, proposals: Sequence[Proposed], kept: Sequence[Proven], wrong: Sequence[int]
) -> Float32:
    """The full logits of what was kept, moved to the front of the mapped file; row by row, as they may be more than
    memory. again: where those of the prompts `wrong` are.
    """
    rows = sum(len(one.ids) for one in proposals)
    whole: Float32 = np.memmap(path, np.dtype("<f4"), "r+", 0, (rows, vocab))
    starts = np.cumsum([0, *(len(one.ids) for one in proposals)])
    second = np.memmap(again, np.dtype("<f4"), "r") if wrong else np.empty(0, np.float32)
    to, used = 0, 0
    for number, one in enumerate(kept):
        for row in range(len(one.proposed.ids)):
            if number in wrong:
                whole[to] = second[(used + row) * vocab : (used + row + 1) * vocab]
            else:
                whole[to] = whole[starts[number] + row]
            to += 1
        if number in wrong:
            used += one.proposed.prompt_tokens + 1
    return whole[:to]
