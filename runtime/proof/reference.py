"""What PyTorch computed: the facts of a reference. `reference_file` stores them.

Two kinds, never mixed. `exact`: with the weights as a bundle stores them, dequantised; it answers whether the bundle is
correct. `original`: with the checkpoint's own weights; it answers what quantisation cost.

Of each position's logits a reference keeps the top 64 with exact values, the log of the sum of exponentials, and a
fixed random set of 256 vocabulary entries, which catches errors in the tail. So hundreds of positions stay below 1 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import Float32, Float64, Int32

SCHEMA_VERSION = 2
EXACT, ORIGINAL = "exact", "original"
KINDS = (EXACT, ORIGINAL)
ORDER = "order"
"""The role of the initializer that says which column each stored column is, and the format of such initializers."""
INDEX = "index"
"""The format of tables that hold 0, 1, 2, ...: the positions that a mask compares."""
GLOBAL = "global"
"""The role of the one number by which the scales of a tensor are multiplied."""
TOP = 64
SAMPLES = 256
CHANNELS = 32
"""Numbers that are kept of a hidden state, of the keys and of the values of one position."""


@dataclass(frozen=True)
class Prompt:
    """ids: the prompt's tokens and then the greedy continuation; the first `prompt_tokens` are the prompt. text: what
    the tokenizer was given, with the chat template's words where it was a conversation.

    proven: leading tokens of the continuation that are the argmax of this reference's logits: all of an exact
    reference, of which the original one takes over the ids.
    """

    name: str
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    proven: int


@dataclass(frozen=True)
class WeightRecord:
    """One tensor as PyTorch used it, and where the bundle stores it.

    format: name of the stored format. initializers: by role: values; or codes, scales, zeros, offsets, and `global`
    where one number scales the whole tensor; and `order` where the columns are stored in another order. row: of its
    first row in them; transposed: rows are columns there. shape: of the tensor. sha256: of its dequantised float32
    values, row by row, columns in place. norm: square root of the sum of their squares. A tensor that is stored in two
    layouts has two records.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    row: int
    initializers: Mapping[str, str]
    sha256: str
    norm: float
    transposed: bool = False


@dataclass(frozen=True)
class InputRecord:
    """How what a projection reads is rounded, as calibration found: to `scale` times a number of `dtype`, which is
    "int8" or "float8e4m3fn". name: of the projection's weight among the checkpoint's tensors. scale: float16 holds it.
    """

    name: str
    scale: float
    dtype: str


@dataclass(frozen=True)
class Identity:
    """Which model a reference is of. model_sha256: of the checkpoint, as its manifest's `model.sha256`;
    tokenizer_sha256: of tokenizer.json; the sizes as in the model's config.
    """

    model_sha256: str
    tokenizer_sha256: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class Index:
    """What a reference is, beside its numbers. dtype: of the checkpoint's weights, computed with in float32. precision:
    of the bundle that an exact one is for. adapter: that is laid over the weights, None for none or merged ones.
    weights, tables: of an exact one: the checkpoint's tensors, and what else the graph holds, such as cos and sin of
    the rotary embedding. layers: of which `Layers` keeps something. full: all logits are kept, `Logits.full`. tools:
    versions of what computed them. inputs: of an exact one, how the graph rounds what projections read, where it does.
    """

    schema_version: int
    kind: str
    model_id: str
    revision: str | None
    dtype: str
    precision: str | None
    adapter: str | None
    identity: Identity
    prompts: tuple[Prompt, ...]
    weights: tuple[WeightRecord, ...]
    tables: tuple[WeightRecord, ...]
    layers: tuple[int, ...]
    full: bool
    tools: Mapping[str, str]
    inputs: tuple[InputRecord, ...] = ()

    @property
    def vocab(self) -> int:
        return self.identity.vocab

    @property
    def positions(self) -> int:
        """Of all prompts together."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first position of each prompt among all, and at the end their number."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        return tuple(int(start) for start in np.cumsum([0, *lengths]))

    @property
    def marks(self) -> tuple[tuple[int, ...], ...]:
        """The positions in each prompt of which `Layers` keeps something: the prompt's last token, and the last."""
        return tuple(tuple(sorted({prompt.prompt_tokens - 1, len(prompt.ids) - 1})) for prompt in self.prompts)


@dataclass(frozen=True)
class Logits:
    """Of every position of every prompt, in order: top_ids, top_logits [n, 64]; logsumexp [n]; and sampled [n, 256],
    the logits of the vocabulary entries sample_ids [256]. Fewer columns where the vocabulary is smaller. full: all
    logits [n, vocab], where a reference keeps them.
    """

    top_ids: Int32
    top_logits: Float32
    logsumexp: Float64
    sample_ids: Int32
    sampled: Float32
    full: Float32 | None = None

    def rows(self, start: int, stop: int) -> Logits:
        """The same of the positions [start, stop)."""
        part = slice(start, stop)
        return Logits(
            self.top_ids[part],
            self.top_logits[part],
            self.logsumexp[part],
            self.sample_ids,
            self.sampled[part],
            None if self.full is None else self.full[part],
        )

    @staticmethod
    def joined(parts: Sequence[Logits]) -> Logits:
        """The positions of all parts, in order."""

        def stack(name: str) -> npt.NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        full = stack("full") if all(part.full is not None for part in parts) else None
        ids = parts[0].sample_ids
        return Logits(stack("top_ids"), stack("top_logits"), stack("logsumexp"), ids, stack("sampled"), full)


@dataclass(frozen=True)
class Layers:
    """Samples from inside, of the layers `Index.layers` at the positions `Index.marks`, all prompts' in order: hidden,
    keys, values [layers, marks, channels]. hidden: after the decoder layer, at the channels hidden_ids [channels] of
    its hidden size. keys (after the rotary embedding) and values: at the channels cache_ids [channels] of
    kv_heads * head_dim, head by head.
    """

    hidden_ids: Int32
    cache_ids: Int32
    hidden: Float32
    keys: Float32
    values: Float32


@dataclass(frozen=True)
class Reference:
    """layers: None where nothing from inside is kept."""

    index: Index
    logits: Logits
    layers: Layers | None

    def of_prompt(self, number: int) -> Logits:
        """The logits of one prompt's positions."""
        starts = self.index.starts
        return self.logits.rows(starts[number], starts[number + 1])


def chosen(size: int, count: int) -> Int32:
    """`count` fixed random numbers below `size`, or all where there are fewer, in order."""
    found = np.random.default_rng(0).choice(size, size=min(count, size), replace=False)
    return np.sort(found).astype(np.int32)


def sample_ids(vocab: int) -> Int32:
    """The fixed random vocabulary entries whose logits are kept, in order."""
    return chosen(vocab, SAMPLES)


def chosen_channels(identity: Identity) -> tuple[Int32, Int32]:
    """The fixed random channels that are kept of a hidden state, and of keys and values."""
    return chosen(identity.hidden, CHANNELS), chosen(identity.kv_heads * identity.head_dim, CHANNELS)


def compress(logits: Float32) -> Logits:
    """Keep of full logits [n, vocab] what a reference keeps; of equal ones the first."""
    passing = PassingLogits(*logits.shape)
    passing.add(0, logits)
    return passing.value


class PassingLogits:
    """What a reference keeps of logits [positions, vocab] that pass by in parts of the vocabulary, in order: memory is
    that of what is kept and of one part.
    """

    def __init__(self, positions: int, vocab: int) -> None:
        self._ids = sample_ids(vocab)
        self._top_ids = np.zeros((positions, 0), np.int32)
        self._top = np.zeros((positions, 0), np.float32)
        self._sampled = np.zeros((positions, len(self._ids)), np.float32)
        self._largest = np.full(positions, -np.inf)
        self._sum = np.zeros(positions)

    def add(self, start: int, part: Float32) -> None:
        """part: [positions, n], of the vocabulary entries from `start` on."""
        stop = start + part.shape[1]
        inside = (self._ids >= start) & (self._ids < stop)
        self._sampled[:, inside] = part[:, self._ids[inside] - start]
        largest = np.maximum(self._largest, part.max(axis=1))
        with np.errstate(invalid="ignore"):  # logits that are not finite show in the result
            self._sum *= np.exp(self._largest - largest)
            self._sum += np.array([np.exp(row - top).sum() for row, top in zip(part, largest, strict=True)])
        self._largest = largest
        ids = np.broadcast_to(np.arange(start, stop, dtype=np.int32), part.shape)
        self._keep_best(np.concatenate([self._top, part], axis=1), np.concatenate([self._top_ids, ids], axis=1))

    def _keep_best(self, values: Float32, ids: Int32) -> None:
        """Of values [positions, n] the largest, likeliest first; of equal ones those with the smaller id."""
        count = min(TOP, values.shape[1])
        found = np.argpartition(values, values.shape[1] - count, axis=1)[:, values.shape[1] - count :]
        least = np.take_along_axis(values, found, axis=1).min(axis=1, keepdims=True)
        for row in np.flatnonzero((values >= least).sum(axis=1) > count):  # ties, of which any could have been taken
            found[row] = np.lexsort((ids[row], -values[row]))[:count]
        top, ids = np.take_along_axis(values, found, axis=1), np.take_along_axis(ids, found, axis=1)
        order = np.lexsort((ids, -top), axis=1)
        self._top, self._top_ids = np.take_along_axis(top, order, axis=1), np.take_along_axis(ids, order, axis=1)

    @property
    def value(self) -> Logits:
        with np.errstate(invalid="ignore", divide="ignore"):
            return Logits(self._top_ids, self._top, self._largest + np.log(self._sum), self._ids, self._sampled)


def logsumexp(logits: Float32) -> Float64:
    """log(sum(exp(logits))) of each row, in float64: what the top leaves of the whole is a difference of nearly equal
    numbers.
    """
    largest = logits.max(axis=1).astype(np.float64)
    total = np.array([np.exp(row - top).sum() for row, top in zip(logits, largest, strict=True)])
    result: Float64 = largest + np.log(total)
    return result


class Fingerprint:
    """Made of float32 rows as they pass by, in order."""

    def __init__(self) -> None:
        self._digest, self._squares = hashlib.sha256(), 0.0

    def add(self, rows: Float32) -> None:
        flat = np.ascontiguousarray(rows, dtype="<f4").reshape(-1)
        self._digest.update(flat.data)
        with np.errstate(over="ignore", invalid="ignore"):
            self._squares += float(np.dot(flat, flat))

    @property
    def value(self) -> tuple[str, float]:
        """sha256 over the rows so far, little-endian, and the root of the sum of their squares."""
        return self._digest.hexdigest(), self._squares**0.5


def fingerprint(rows: Iterator[Float32]) -> tuple[str, float]:
    """The `Fingerprint` of all these rows."""
    whole = Fingerprint()
    for part in rows:
        whole.add(part)
    return whole.value
