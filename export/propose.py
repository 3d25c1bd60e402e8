"""Greedy text by the exported model, so that PyTorch's weights stream once and not once a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..runtime.arrays import Float32, Int64
from ..runtime.proof.replayer import Replayer
from .prompts import Asked

_TOGETHER = 64
"""Tokens up to which prompts go through the graph as one batch, padded to the longest."""
_LOGITS_BYTES = 1 << 24
"""Of one call, which returns those of all tokens: 32 tokens of a vocabulary of 128,256."""


def propose(replayer: Replayer, prompts: Sequence[Asked]) -> list[tuple[int, ...]]:
    """The continuation of each prompt that the graph finds likeliest, token by token, as long as it asks for.

    Nobody relies on it: PyTorch proves every token. Raises LlamaExportError when the engine fails.
    """
    found: dict[int, tuple[int, ...]] = {}
    for numbers in _batches(replayer, prompts):
        found.update(zip(numbers, _continued(replayer, [prompts[number] for number in numbers]), strict=True))
    return [found[number] for number in range(len(prompts))]


def _batches(replayer: Replayer, prompts: Sequence[Asked]) -> list[list[int]]:
    """Which prompts are read together, by number: short ones, shortest first, and each long one by itself."""
    together, batches = min(_TOGETHER, replayer.chunk), list[list[int]]()
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids)):
        tokens, last = len(prompts[number].ids), batches[-1] if batches else []
        room = last and tokens <= together and len(last) < replayer.most_rows
        if room and (len(last) + 1) * tokens <= _tokens(replayer):
            last.append(number)
        else:
            batches.append([number])
    return batches


def _tokens(replayer: Replayer) -> int:
    """Of all texts, in one call."""
    return max(1, _LOGITS_BYTES // (4 * replayer.vocab))


def _continued(replayer: Replayer, prompts: Sequence[Asked]) -> list[tuple[int, ...]]:
    """The continuations of prompts that are read as one batch, or of a single one."""
    texts = [list(prompt.ids) for prompt in prompts]
    ends = [len(prompt.ids) + prompt.continuation for prompt in prompts]
    replayer.begin(len(prompts))
    last = _read(replayer, [prompt.ids for prompt in prompts])
    while True:
        for text, end, row in zip(texts, ends, last, strict=True):
            if len(text) < end:
                text.append(int(row.argmax()))
        if all(len(text) >= end for text, end in zip(texts, ends, strict=True)):
            break
        firsts = [len(text) - 1 for text in texts]  # of a text that is complete its last token again
        ids = np.array([[text[-1]] for text in texts], np.int64)
        last = replayer.run(ids, firsts, [1] * len(texts))[:, 0]
    return [tuple(text[len(prompt.ids) :]) for text, prompt in zip(texts, prompts, strict=True)]


def _read(replayer: Replayer, texts: Sequence[Sequence[int]]) -> Float32:
    """The logits after the last token of each text, [texts, vocab]."""
    if len(texts) > 1:
        counts = [len(text) for text in texts]
        logits = replayer.run(_padded(texts), [0] * len(texts), counts)
        last: Float32 = logits[np.arange(len(texts)), np.array(counts) - 1]
        return last
    (text,), step = texts, min(_tokens(replayer), replayer.chunk)
    for first in range(0, len(text), step):
        piece = np.array([text[first : first + step]], np.int64)
        logits = replayer.run(piece, [first], [piece.shape[1]])
    return logits[:, -1]


def _padded(texts: Sequence[Sequence[int]]) -> Int64:
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return ids
