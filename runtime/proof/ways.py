"""The ways through a graph: how a text's tokens get to the logits after each of them.

One replay is compared with several references at once, piece by piece: all logits of a text are never there together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..arrays import Float32, Int64
from .replayer import Replayer

ONE_PIECE, CHUNKS, DECODE, BATCH, REWIND, GREEDY = "one_piece", "chunks", "decode", "batch", "rewind", "greedy"

_MOST_POSITIONS, _LOGITS_BYTES = 1024, 1 << 28
"""Of one call, and of the logits that it gives."""
_ODD = 7
"""Tokens of the pieces that are smaller than a chunk."""
_ALONE = 8
"""Tokens that each text decodes by itself where `batch` decodes all of them: kernels in full precision take long."""
_BATCHED_PROMPT = 128
"""Tokens of a prompt in a batch, where every row costs what the longest does; those behind it are decoded."""
_UNEVEN = 3
"""Prompts of a batch lose none, one or two tokens at the end, so that their lengths differ where prompts' do not."""
_FOREIGN, _BACK = 5, 3
"""Tokens that a text goes astray for, and how far before that it is taken up again."""


@dataclass(frozen=True)
class Text:
    """ids: all tokens; the first `prompt_tokens` are the prompt."""

    ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The logits [stop - start, vocab] after the tokens at the positions [start, stop) of a text."""

    text: int
    start: int
    stop: int
    logits: Float32


Way = Callable[[Replayer, Sequence[Text], int], Iterator[Piece]]


def why_not(way: str, most_rows: int, texts: int) -> str | None:
    """Why a way cannot be gone with so many texts; None where it can. most_rows: of the replayer."""
    if way == BATCH and most_rows < 2:
        return "batch: what computes here takes one text at a time"
    if way == BATCH and texts < 2:
        return "batch: the reference has one prompt alone"
    return None


def cuts_of(replayer: Replayer, count: int) -> list[int]:
    """Where a text of `count` tokens is cut so that its logits stay within memory: 0, ..., count."""
    return _cuts(0, count, _room(replayer))


def one_piece(replayer: Replayer, texts: Sequence[Text], chunk: int) -> Iterator[Piece]:
    """Each text in one call, prompt and continuation; those beyond the memory for logits in several."""
    for number, text in enumerate(texts):
        replayer.begin(1)
        yield from _run(replayer, number, text, _cuts(0, len(text.ids), _room(replayer)))


def chunks(replayer: Replayer, texts: Sequence[Text], chunk: int) -> Iterator[Piece]:
    """Each text in two odd pieces, one that ends where a chunk does, and then chunk by chunk."""
    odd = min(_ODD, max(1, chunk - 2))
    most = min(chunk, _room(replayer))
    for number, text in enumerate(texts):
        replayer.begin(1)
        aligned = range(-(-2 * odd // most) * most, len(text.ids), most)
        cuts = sorted({0, odd, 2 * odd, *aligned, len(text.ids)})
        yield from _run(replayer, number, text, [cut for cut in cuts if cut <= len(text.ids)])


def decode(replayer: Replayer, texts: Sequence[Text], chunk: int) -> Iterator[Piece]:
    """The prompt, then token by token; only the first few of them where `batch` decodes the rest."""
    for number, text in enumerate(texts):
        replayer.begin(1)
        stop = len(text.ids)
        if replayer.most_rows > 1 and len(texts) > 1:
            stop = min(stop, text.prompt_tokens + _ALONE)
        cuts = _cuts(0, text.prompt_tokens, _room(replayer))
        yield from _run(replayer, number, text, [*cuts, *range(text.prompt_tokens + 1, stop + 1)])


def batch(replayer: Replayer, texts: Sequence[Text], chunk: int) -> Iterator[Piece]:
    """Texts of different lengths together: prompts padded at the end, then token by token, each at its own place. A
    text that has ended runs its last token again.
    """
    most = min(_BATCHED_PROMPT, replayer.chunk, _positions(replayer) // 2)
    prompts = [max(1, min(text.prompt_tokens, most) - number % _UNEVEN) for number, text in enumerate(texts)]
    steps = max(len(text.ids) - text.prompt_tokens for text in texts) + _UNEVEN - 1
    groups = _groups(prompts, replayer)
    if len(groups) > 1 and len(groups[-1]) == 1 and len(groups[-2]) > 2:
        groups[-1].insert(0, groups[-2].pop())
    for group in groups:
        starts = [prompts[number] for number in group]
        heads = [texts[number].ids[:start] for number, start in zip(group, starts, strict=True)]
        yield from _prefilled(replayer, heads, group)
        for step in range(steps):
            last = [len(texts[number].ids) - 1 for number in group]
            places = [min(start + step, end) for start, end in zip(starts, last, strict=True)]
            ids = [[texts[number].ids[place]] for number, place in zip(group, places, strict=True)]
            logits = replayer.run(np.array(ids, np.int64), places, [1] * len(group))
            for row, (number, place) in enumerate(zip(group, places, strict=True)):
                if place == starts[row] + step:
                    yield Piece(number, place, place + 1, logits[row])


def rewind(replayer: Replayer, texts: Sequence[Text], chunk: int) -> Iterator[Piece]:
    """Half of a text, then other tokens, then from a little before the half on with its own: as if the others had
    never been there. Only what comes after the rewind is given.
    """
    for number, text in enumerate(texts):
        count = len(text.ids)
        half = max(1, count // 2)
        astray = text.ids[::-1][: max(0, min(_FOREIGN, replayer.context - half))]
        replayer.begin(1)
        for _ in _run(replayer, number, text, _cuts(0, half, _room(replayer))):
            pass
        if astray:
            replayer.run(np.array([astray], np.int64), [half], [len(astray)])
        back = max(0, min(half - _BACK, count - 1))
        yield from _run(replayer, number, text, [*_cuts(back, count - 1, _room(replayer)), count])


def greedy(replayer: Replayer, texts: Sequence[Text], chunk: int) -> Iterator[Piece]:
    """What the graph writes by itself after each prompt, until it parts from the text: the logits that it chose by, the
    last of them those by which it parted.
    """
    for group in _groups([text.prompt_tokens for text in texts], replayer):
        heads = [texts[number].ids[: texts[number].prompt_tokens] for number in group]
        chosen: dict[int, Piece] = {}
        for number, head, row in zip(group, heads, _read(replayer, heads), strict=True):
            chosen[number] = Piece(number, len(head) - 1, len(head), row[None].copy())
        while True:
            yield from chosen.values()
            going = {
                number: piece.stop
                for number, piece in chosen.items()
                if piece.stop < len(texts[number].ids) and piece.logits[0].argmax() == texts[number].ids[piece.stop]
            }
            if not going:
                break
            places = [going.get(number, 0) for number in group]
            ids = [[texts[number].ids[place]] for number, place in zip(group, places, strict=True)]
            logits = replayer.run(np.array(ids, np.int64), places, [1] * len(group))
            rows = dict(zip(group, logits, strict=True))
            chosen = {number: Piece(number, place, place + 1, rows[number]) for number, place in going.items()}


def _run(replayer: Replayer, number: int, text: Text, cuts: Sequence[int]) -> Iterator[Piece]:
    """One text, from each of the cuts to the next in a call."""
    for start, stop in pairwise(cuts):
        ids = np.array([text.ids[start:stop]], np.int64)
        yield Piece(number, start, stop, replayer.run(ids, [start], [stop - start])[0])


def _prefilled(replayer: Replayer, heads: Sequence[Sequence[int]], group: Sequence[int]) -> Iterator[Piece]:
    """The beginnings of all texts of a group: together, padded at the end; one text as long as it is."""
    replayer.begin(len(heads))
    if len(heads) == 1:
        text = Text(tuple(heads[0]), len(heads[0]))
        yield from _run(replayer, group[0], text, _cuts(0, len(text.ids), _room(replayer)))
        return
    ids, counts = _padded(heads)
    logits = replayer.run(ids, [0] * len(heads), counts)
    for number, count, row in zip(group, counts, logits, strict=True):
        yield Piece(number, 0, count, row[:count])


def _read(replayer: Replayer, heads: Sequence[Sequence[int]]) -> Float32:
    """The logits [rows, vocab] after the beginnings of all texts of a group, asked for alone: a graph that gives all
    positions rightly may pick the wrong one.
    """
    replayer.begin(len(heads))
    start = 0
    if len(heads) == 1:
        text = Text(tuple(heads[0]), len(heads[0]))
        *before, start, _ = _cuts(0, len(text.ids), _room(replayer))
        for _ in _run(replayer, 0, text, [*before, start]):
            pass
    ids, counts = _padded([head[start:] for head in heads])
    return replayer.last(ids, [start] * len(heads), counts)


def _padded(heads: Sequence[Sequence[int]]) -> tuple[Int64, list[int]]:
    """ids [rows, n], with padding at the end, and how many of a row are its own."""
    counts = [len(head) for head in heads]
    ids = np.zeros((len(heads), max(counts)), np.int64)
    for row, head in enumerate(heads):
        ids[row, : len(head)] = head
    return ids, counts


def _groups(lengths: Sequence[int], replayer: Replayer) -> list[list[int]]:
    """The numbers of texts that are read together, shortest first: as many rows as the replayer takes, and as many
    padded positions as one call may have.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda one: lengths[one]):
        fits = groups and len(groups[-1]) < replayer.most_rows
        if (
            fits
            and (len(groups[-1]) + 1) * lengths[number] <= _positions(replayer)
            and lengths[number] <= replayer.chunk
        ):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _cuts(start: int, stop: int, most: int) -> list[int]:
    """From start to stop in steps of `most`; both once where they are one."""
    return [*range(start, stop, most), stop]


def _room(replayer: Replayer) -> int:
    """Tokens of one text in a call."""
    return min(replayer.chunk, _positions(replayer))


def _positions(replayer: Replayer) -> int:
    """Of all rows in a call."""
    return max(2, min(_MOST_POSITIONS, _LOGITS_BYTES // (4 * replayer.vocab)))


WAYS: Mapping[str, Way] = {
    ONE_PIECE: one_piece,
    CHUNKS: chunks,
    DECODE: decode,
    BATCH: batch,
    REWIND: rewind,
    GREEDY: greedy,
}
