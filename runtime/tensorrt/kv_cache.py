"""The key-value cache on the GPU, in the forms that the two TensorRT dialects take it.

All layers lie in one allocation, so that what changes in all of them is copied by few calls.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UsageError
from ..bundle import Limits, Shape
from ..session import PAST, PRESENT, cache_names
from .cuda import ALIGNMENT, Block, Cuda

_LEAST_BUCKET, _BUCKET_STEP = 256, 128
"""Tokens. A multiple of the step keeps every tensor aligned and lets a bucket grow in place, see `_Move`."""


@dataclass(frozen=True)
class Bound:
    """Where a tensor lies, and its shape."""

    name: str
    address: int
    shape: tuple[int, ...]


class Cache(ABC):
    """Keys and values of `rows` texts, in all layers. length: tokens of the past as the graph is given it."""

    length: int

    def __init__(self, cuda: Cuda, shape: Shape, limits: Limits, rows: int) -> None:
        """Raises CudaError when the GPU has no room, UsageError when rows cannot be told apart in memory."""
        self._cuda = cuda
        self._names = cache_names(shape)
        self._rows, self._heads = rows, shape.kv_heads
        self._token = shape.head_dim * np.dtype(shape.cache_dtype).itemsize  # bytes of a token in one head
        self._head_dim = shape.head_dim
        self._context = limits.context
        if rows > 1 and (limits.context * self._heads * self._token) % ALIGNMENT:
            raise UsageError(
                f"Several texts at once need a context that is a multiple of {_BUCKET_STEP}, not {limits.context}; "
                "build the bundle with another --context."
            )
        self._base = cuda.allocate(len(self._names) * self._stride(rows, limits.context), "the cache")

    @abstractmethod
    def fit(self, used: int, end: int) -> None:
        """Make room for tokens before `end`, keeping those before `used`; `length` may be another afterwards."""

    @abstractmethod
    def inputs(self, row: int | None, *, empty: bool = False) -> Iterator[Bound]:
        """The past of one row, or of all. empty: nothing in it is visible, so the shortest will do."""

    @abstractmethod
    def outputs(self, row: int | None, count: int) -> Iterator[Bound]:
        """Where the graph puts its `present` when it runs `count` tokens."""

    @abstractmethod
    def keep(self, row: int | None, starts: Sequence[int], count: int) -> None:
        """Take over the `count` new tokens of a run, the first of each row at its place in `starts`."""

    def _stride(self, rows: int, tokens: int) -> int:
        """Bytes from one tensor [rows, heads, tokens, head_dim] to the next."""
        return -(-rows * self._heads * tokens * self._token // ALIGNMENT) * ALIGNMENT

    def _bound(self, side: str, base: int, row: int | None, rows: int, tokens: int) -> Iterator[Bound]:
        """Tensors [rows, heads, tokens, head_dim] from `base` on, whole or one row of them."""
        stride, offset = self._stride(rows, tokens), (row or 0) * self._heads * tokens * self._token
        shape = (rows if row is None else 1, self._heads, tokens, self._head_dim)
        for index, name in enumerate(self._names):
            yield Bound(side + name, base + index * stride + offset, shape)


class StaticCache(Cache):
    """For `trt`: as long as the context, updated in place by TensorScatter, whose output is its input's memory."""

    def __init__(self, cuda: Cuda, shape: Shape, limits: Limits, rows: int) -> None:
        super().__init__(cuda, shape, limits, rows)
        self.length = limits.context

    def fit(self, used: int, end: int) -> None:
        """It always fits."""

    def inputs(self, row: int | None, *, empty: bool = False) -> Iterator[Bound]:
        """The whole context: its length is fixed in the graph."""
        return self._bound(PAST, self._base, row, self._rows, self.length)

    def outputs(self, row: int | None, count: int) -> Iterator[Bound]:
        """The inputs' memory."""
        return self._bound(PRESENT, self._base, row, self._rows, self.length)

    def keep(self, row: int | None, starts: Sequence[int], count: int) -> None:
        """Nothing is left to do: the graph wrote them in place."""


@dataclass
class _Move:
    """A bucket that grows in place: head after head, the last first, to where it lies in the longer bucket.

    A bucket is at least twice as long as the one before, so no head lands on one that has not moved yet. `left` counts
    those; an interrupted move goes on where it was.
    """

    to: int
    used: int
    left: int


class GrowingCache(Cache):
    """For `trt-primitive`: the past in a bucket that is just long enough, and the new rows beside it.

    Attention costs what the past is long, and the graph copies the past once a step, so a short text shall have a short
    one. The memory is that of the longest from the beginning: what fits at the start fits to the end.
    """

    def __init__(self, cuda: Cuda, shape: Shape, limits: Limits, rows: int) -> None:
        super().__init__(cuda, shape, limits, rows)
        self._buckets = buckets(limits.context)
        self.length = self._buckets[0]
        fresh = max(self._stride(rows, 1), self._stride(1, min(limits.prefill_chunk, limits.context)))
        self._fresh = cuda.allocate(len(self._names) * fresh, "new keys and values")
        self._move: _Move | None = None

    def fit(self, used: int, end: int) -> None:
        """See `Cache.fit`. A text that begins anew starts in the shortest bucket again."""
        self._finish_move()
        least = next(length for length in self._buckets if length >= end)
        if not used:
            self.length = least
        elif least > self.length:
            self._move = _Move(least, used, len(self._names) * self._rows * self._heads)
            self._finish_move()

    def inputs(self, row: int | None, *, empty: bool = False) -> Iterator[Bound]:
        """A past of one token where none is visible: the graph takes no fewer."""
        bounds = self._bound(PAST, self._base, row, self._rows, self.length)
        if not empty:
            return bounds
        return (Bound(one.name, one.address, (*one.shape[:2], 1, one.shape[3])) for one in bounds)

    def outputs(self, row: int | None, count: int) -> Iterator[Bound]:
        """Beside the past, packed."""
        return self._bound(PRESENT, self._fresh, None, self._rows if row is None else 1, count)

    def keep(self, row: int | None, starts: Sequence[int], count: int) -> None:
        """Copy the new tokens behind the past of every row: one copy where all rows stand at the same place."""
        rows = self._rows if row is None else 1
        first = row or 0
        together = len(set(starts)) == 1
        for index in range(1 if together else rows):
            for block in self._rows_of(first + index, rows if together else 1, index, rows, starts[index], count):
                self._cuda.copy(block)

    def _rows_of(self, row: int, rows: int, fresh_row: int, fresh_rows: int, start: int, count: int) -> Iterator[Block]:
        """The copies that take `rows` rows, the first of them `fresh_row` of `fresh_rows`, to `row` at `start`."""
        head, fresh_head = self.length * self._token, count * self._token
        return blocks(
            (len(self._names), rows, self._heads),
            self._base + row * self._heads * head + start * self._token,
            (self._stride(self._rows, self.length), self._heads * head, head),
            self._fresh + fresh_row * self._heads * fresh_head,
            (self._stride(fresh_rows, count), self._heads * fresh_head, fresh_head),
            fresh_head,
        )

    def _finish_move(self) -> None:
        if (move := self._move) is None:
            return
        heads, width = self._rows * self._heads, move.used * self._token
        while move.left:
            tensor, head = divmod(move.left - 1, heads)
            source, target = (
                self._base + tensor * self._stride(self._rows, length) + head * length * self._token
                for length in (self.length, move.to)
            )
            if source != target:
                self._cuda.copy(Block(target, width, source, width, width, 1))
            move.left -= 1
        self.length, self._move = move.to, None


def buckets(context: int) -> tuple[int, ...]:
    """The lengths that a past may have, shortest first: each at least twice the one before, the last the context."""
    lengths = [context]
    while (half := lengths[-1] // 2 // _BUCKET_STEP * _BUCKET_STEP) >= _LEAST_BUCKET:
        lengths.append(half)
    return tuple(reversed(lengths))


def blocks(
    sizes: tuple[int, ...],
    target: int,
    target_strides: tuple[int, ...],
    source: int,
    source_strides: tuple[int, ...],
    width: int,
) -> Iterator[Block]:
    """The fewest copies of `width` bytes for every index into `sizes`, from a place that strides give to another."""
    axes: list[tuple[int, int, int]] = []
    for count, to, of in zip(sizes, target_strides, source_strides, strict=True):
        if axes and axes[-1][1:] == (count * to, count * of):  # goes on where the axis around it does
            axes[-1] = (axes[-1][0] * count, to, of)
        elif count > 1:
            axes.append((count, to, of))
    longest = max(axes, default=(1, width, width))
    others = [axis for axis in axes if axis is not longest]
    for index in itertools.product(*(range(count) for count, _, _ in others)):
        shift = [sum(at * axis[side] for at, axis in zip(index, others, strict=True)) for side in (1, 2)]
        yield Block(target + shift[0], longest[1], source + shift[1], longest[2], width, longest[0])
