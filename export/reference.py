"""PyTorch's side of the proof: transformers' own layers over a few texts, one decoder layer in memory, for both kinds
of reference in one pass.

Weights are read from the checkpoint and converted again, not read back from the bundle: what the writer did wrong
shows. A layer's rows are read once: what they are in the checkpoint runs first, and is then converted where it stands
to what the bundle stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedConfig

from ..errors import LlamaExportError
from ..optimize.formats import EMBEDDING, Format
from ..optimize.plan import head_of
from ..optimize.quantise import stored_values
from ..optimize.tensors import Float32, SourceTensor
from ..progress import Progress
from ..runtime.arrays import Int32
from ..runtime.proof.reference import (
    EXACT,
    ORIGINAL,
    Fingerprint,
    Identity,
    Layers,
    Logits,
    PassingLogits,
    chosen_channels,
)
from .layerwise import LAST_NORM, KeptCache, Parts, Texts, cuts, decoder_layer, embedded, float32_bytes, last_norm
from .lora.peft_folder import LowRank

_PIECE = 1 << 19
"""Values that one thread converts at a time: the temporaries stay in the processor's cache."""

Marks = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Original:
    """The checkpoint's own weights. added: what an adapter adds to some of them."""

    tensors: Mapping[str, SourceTensor]
    added: Mapping[str, LowRank] = field(default_factory=dict)
    kind: ClassVar[str] = ORIGINAL

    def rows(self, name: str, start: int, stop: int, read: Float32 | None) -> Float32:
        """Rows [start, stop) in float32. read: the checkpoint's, where they have been read."""
        rows = self.tensors[name].read(start, stop) if read is None else read
        return rows + self.added[name].delta(start, stop) if name in self.added else rows


@dataclass(frozen=True)
class Exact:
    """The weights as a bundle stores them: `formats` applied to `tensors`, scales in `scale_dtype`. added: what an
    adapter adds to stored weights, its matrices in `scale_dtype` too.
    """

    tensors: Mapping[str, SourceTensor]
    formats: Mapping[str, Format]
    scale_dtype: npt.DTypeLike
    added: Mapping[str, LowRank] = field(default_factory=dict)
    kind: ClassVar[str] = EXACT

    def rows(self, name: str, start: int, stop: int, read: Float32 | None) -> Float32:
        """As of `Original`."""
        rows = stored_values(self.tensors[name], self.formats[name], start, stop, self.scale_dtype, read)
        return rows + self.added[name].delta(start, stop, self.scale_dtype) if name in self.added else rows


Side = Original | Exact


@dataclass(frozen=True)
class Computed:
    """What PyTorch computed with the weights of one side. logits: of every position of every sequence, in order;
    layers: the samples from inside, None where none were asked for; fingerprints: of every tensor that was used, by
    name: sha256 and norm of its values, for the weights as a bundle stores them.
    """

    logits: Logits
    layers: Layers | None
    fingerprints: Mapping[str, tuple[str, float]]


@dataclass(frozen=True)
class Samples:
    """What is wanted from inside: of `layers` at the positions `marks` of each sequence."""

    layers: Sequence[int]
    marks: Marks
    identity: Identity


class Watch(Protocol):
    """What looks on while two sides pass: `Original` first, then `Exact`."""

    def layer(self, index: int, layer: torch.nn.Module, hidden: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Around a decoder layer's run over the first side's `hidden` [1, length, hidden size] of each sequence."""

    def converted(self, name: str, before: Float32, after: Float32) -> None:
        """All of a tensor of the layer that ran, in the first side and in the second."""

    def last(self, hidden: Sequence[torch.Tensor]) -> None:
        """What the first side's last layer leaves; the head comes next."""

    def head(self, side: int, start: int, rows: Float32, logits: Float32) -> None:
        """The head's rows from `start` on, and their logits [positions, rows]: of the first side, 0, then of the
        second, 1, which may share the memory of `rows`.
        """


@dataclass
class _Running:
    """One side on its way through the layers. same: so far it is the first side bit for bit. seen: of each layer that
    is sampled: hidden, keys, values [marks, channels].
    """

    side: Side
    hidden: list[torch.Tensor]
    same: bool
    fingerprints: dict[str, tuple[str, float]] = field(default_factory=dict)
    seen: list[tuple[Float32, Float32, Float32]] = field(default_factory=list)


class StreamedModel:
    """A model in float32 whose weights pass by.

    context: of the bundle, for which the frequencies of the dynamic rope type are fixed. sides: which weights it
    computes with; of two, the checkpoint's own come first.
    """

    def __init__(
        self, config: PreTrainedConfig, tensors: Mapping[str, SourceTensor], context: int, sides: Sequence[Side]
    ) -> None:
        self._config, self._tensors, self._context, self._sides = config, tensors, context, sides

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        progress: Progress,
        samples: Samples | None = None,
        full: Mapping[str, Path] | None = None,
    ) -> dict[str, Computed]:
        """What each side computes after every token of every sequence, by kind, in one pass over the weights.

        full: where all logits of a kind go, float32 [positions, vocab] in a file that is made and mapped. Raises
        LlamaExportError where logits are not finite.
        """
        with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="reference") as pool, torch.no_grad():
            one = _Pass(self._config, self._tensors, self._context, sequences, samples, progress, pool)
            return one.run(self._sides, full or {})

    def show(self, sequences: Sequence[Sequence[int]], progress: Progress, watch: Watch) -> None:
        """Let `watch` look on in one pass over the weights, of which nothing else is kept."""
        with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="reference") as pool, torch.no_grad():
            one = _Pass(self._config, self._tensors, self._context, sequences, None, progress, pool, watch)
            one.show(self._sides)


class _Pass:
    """One pass over the weights."""

    def __init__(
        self,
        config: PreTrainedConfig,
        tensors: Mapping[str, SourceTensor],
        context: int,
        sequences: Sequence[Sequence[int]],
        samples: Samples | None,
        progress: Progress,
        pool: ThreadPoolExecutor,
        watch: Watch | None = None,
    ) -> None:
        self._config, self._tensors, self._sequences = config, tensors, sequences
        self._texts, self._samples = Texts(config, context, sequences), samples
        self._progress, self._pool, self._passed, self._watch = progress, pool, set[str](), watch

    def run(self, sides: Sequence[Side], full: Mapping[str, Path]) -> dict[str, Computed]:
        running = self._decoded(sides)
        logits = self._head(running, full)
        self._advance(*self._tensors)
        return {
            one.side.kind: Computed(kept, self._layers(one), one.fingerprints)
            for one, kept in zip(running, logits, strict=True)
        }

    def show(self, sides: Sequence[Side]) -> None:
        """All of it to the watch."""
        assert self._watch is not None
        running = self._decoded(sides)
        self._watch.last(running[0].hidden)
        for side, start, rows, logits in self._logits(running, self._normed(running)):
            self._watch.head(side, start, rows, logits)
        self._advance(*self._tensors)

    def _decoded(self, sides: Sequence[Side]) -> list[_Running]:
        """Every side behind the last layer."""
        running = self._embedded(sides)
        for index in range(self._config.num_hidden_layers):
            self._layer(index, running)
        return running

    def _advance(self, *names: str) -> None:
        self._passed.update(names)
        total = float32_bytes(self._tensors)
        self._progress.advance(float32_bytes({name: self._tensors[name] for name in self._passed}), total)

    def _embedded(self, sides: Sequence[Side]) -> list[_Running]:
        """Every side with the embedding's rows of its own. Where it is the head too, all of it passes there."""
        running: list[_Running] = []
        tied = head_of(self._tensors) == EMBEDDING
        for side in sides:
            one = _Running(side, [], same=True)
            parts = self._noted if self._fingerprinted(side) and not tied else self._wanted
            one.hidden = embedded(self._sequences, partial(parts, one))
            if running:
                one.same = all(map(torch.equal, one.hidden, running[0].hidden))
            running.append(one)
        if not tied:
            self._advance(EMBEDDING)
        return running

    def _wanted(self, one: _Running, name: str) -> Parts:
        """The rows of the tokens that are there."""
        for token in sorted({token for sequence in self._sequences for token in sequence}):
            yield token, one.side.rows(name, token, token + 1, None)

    def _noted(self, one: _Running, name: str) -> Parts:
        """All rows, whose fingerprint is known when they have passed."""
        passed = Fingerprint()
        for start, stop in cuts(self._tensors[name]):
            rows = np.empty((stop - start, *self._tensors[name].shape[1:]), np.float32)
            self._fill(rows, one.side, name, start, None)
            passed.add(rows)
            yield start, rows
        one.fingerprints[name] = passed.value

    def _layer(self, index: int, running: Sequence[_Running]) -> None:
        first, values = running[0], dict[str, Float32]()

        def whole(name: str) -> torch.Tensor:
            values[name] = self._whole(first, name)
            return torch.from_numpy(values[name])

        layer = decoder_layer(self._config, index, whole)
        with nullcontext() if self._watch is None else self._watch.layer(index, layer, first.hidden):
            self._through(index, layer, first)
        for other in running[1:]:
            changed = [self._convert(first.side, other, name, array) for name, array in values.items()]
            other.same = other.same and not any(changed)
            if other.same:
                other.hidden, other.seen = list(first.hidden), list(first.seen)
            else:
                self._through(index, layer, other)
        self._advance(*values)

    def _through(self, index: int, layer: torch.nn.Module, one: _Running) -> None:
        samples = self._samples
        if samples is None or index not in samples.layers:
            self._texts.run(layer, one.hidden)
            return
        caches = [KeptCache() for _ in one.hidden]
        self._texts.run(layer, one.hidden, caches)
        hidden_ids, cache_ids = chosen_channels(samples.identity)

        def taken(states: Iterable[torch.Tensor], channels: Int32) -> Float32:
            """Of [length, channels] each."""
            rows = [state.numpy()[np.asarray(mark)] for state, mark in zip(states, samples.marks, strict=True)]
            found: Float32 = np.concatenate(rows)[:, channels]
            return found

        hidden = taken((state[0] for state in one.hidden), hidden_ids)
        keys = taken((cache.keys[0].transpose(0, 1).flatten(1) for cache in caches), cache_ids)
        values = taken((cache.values[0].transpose(0, 1).flatten(1) for cache in caches), cache_ids)
        one.seen.append((hidden, keys, values))

    def _layers(self, one: _Running) -> Layers | None:
        if self._samples is None or not one.seen:
            return None
        hidden, keys, values = (np.stack(part) for part in zip(*one.seen, strict=True))
        return Layers(*chosen_channels(self._samples.identity), hidden, keys, values)

    def _head(self, running: Sequence[_Running], full: Mapping[str, Path]) -> list[Logits]:
        name, normed = head_of(self._tensors), self._normed(running)
        positions, vocab = len(normed[0]), self._tensors[name].shape[0]
        kept = [PassingLogits(positions, vocab) for _ in running]
        maps = [_new_map(full.get(one.side.kind), (positions, vocab)) for one in running]
        passed = [Fingerprint() for _ in running]
        for number, start, rows, logits in self._logits(running, normed):
            kept[number].add(start, logits)
            passed[number].add(rows)
            if (whole := maps[number]) is not None:
                whole[:, start : start + len(rows)] = logits
        for number, one in enumerate(running):
            if one.side.kind == EXACT:
                one.fingerprints[name] = passed[number].value
        return [_finite(one.value) for one in kept]

    def _logits(
        self, running: Sequence[_Running], normed: Sequence[torch.Tensor]
    ) -> Iterator[tuple[int, int, Float32, Float32]]:
        """The head's rows, a few at a time, of each side in turn: the side's number, the first row's, the rows, and
        their logits [positions, rows]. The next side's rows take the place of those before.
        """
        name, first = head_of(self._tensors), running[0]
        for start, stop in cuts(self._tensors[name]):
            rows = np.empty((stop - start, self._tensors[name].shape[1]), np.float32)
            logits = np.empty((len(normed[0]), stop - start), np.float32)
            for number, one in enumerate(running):
                changed = self._fill(rows, one.side, name, start, first.side if number else None)
                if not (number and one.same and not changed):
                    logits = (normed[number] @ torch.from_numpy(rows).T).numpy()
                yield number, start, rows, logits

    def _normed(self, running: Sequence[_Running]) -> list[torch.Tensor]:
        """What enters the head, [positions, hidden], of each side."""
        found, norm = [], self._whole(running[0], LAST_NORM)
        for number, one in enumerate(running):
            if number:
                one.same = not self._convert(running[0].side, one, LAST_NORM, norm) and one.same
            hidden = torch.cat([state[0] for state in one.hidden])
            found.append(last_norm(self._config, hidden, torch.from_numpy(norm)))
        return found

    def _whole(self, one: _Running, name: str) -> Float32:
        """All of a tensor, as this side computes with it."""
        values = np.empty(self._tensors[name].shape, np.float32)
        self._fill(values, one.side, name, 0, None)
        self._note(one, name, values)
        return values

    def _convert(self, first: Side, other: _Running, name: str, values: Float32) -> bool:
        """Make of all of a tensor, as the first side has it, what another computes with; tell whether it differs."""
        before = values if self._watch is None else values.copy()
        changed = self._fill(values, other.side, name, 0, first)
        self._note(other, name, values)
        if self._watch is not None:
            self._watch.converted(name, before, values)
        return changed

    def _fingerprinted(self, side: Side) -> bool:
        """Whether all values of its tensors are to be told apart from others'; that takes a while."""
        return side.kind == EXACT and self._watch is None

    def _note(self, one: _Running, name: str, values: Float32) -> None:
        """All of a tensor's values are known."""
        if self._fingerprinted(one.side):
            passed = Fingerprint()
            passed.add(values)
            one.fingerprints[name] = passed.value

    def _fill(self, rows: Float32, side: Side, name: str, start: int, first: Side | None) -> bool:
        """Set `rows`, those from `start` on, to what `side` computes with. first: of which side they are so far, None
        where they are nothing yet. Tells whether any number changed.
        """
        raw = first is not None and name not in first.added and side.tensors[name] is first.tensors[name]
        step = max(1, _PIECE // math.prod(rows.shape[1:]))

        def fill(at: int) -> bool:
            piece = rows[at : at + step]
            new = side.rows(name, start + at, start + at + len(piece), piece if raw else None)
            changed = not raw or not np.array_equal(piece.view(np.uint32), new.view(np.uint32))
            if changed:
                piece[...] = new
            return changed

        return any(list(self._pool.map(fill, range(0, len(rows), step))))


def _new_map(path: Path | None, shape: tuple[int, int]) -> Float32 | None:
    return None if path is None else np.memmap(path, np.dtype("<f4"), "w+", 0, shape)


def _finite(logits: Logits) -> Logits:
    if not (np.isfinite(logits.top_logits).all() and np.isfinite(logits.logsumexp).all()):
        raise LlamaExportError(
            "PyTorch computes logits that are not finite, so they prove nothing; the checkpoint is damaged or its "
            "config.json is another's: download or copy it again."
        )
    return logits
