"""The seam between proving and what computes: tokens at places in, logits after each of them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..arrays import Float32, Int64


@dataclass(frozen=True)
class CacheView:
    """A layer's cache, [rows, kv_heads, at least the tokens run, head_dim] each."""

    keys: Float32
    values: Float32


class Replayer(Protocol):
    """A loaded graph that is to be proven.

    name: what computes ("onnxruntime 1.32.0 cpu"). context: positions are below it. most_rows: texts at once. chunk:
    the most tokens of a text that one call takes, which callers keep to.
    """

    name: str
    vocab: int
    context: int
    most_rows: int
    chunk: int

    def begin(self, rows: int) -> None:
        """Forget everything; `rows` texts come next, 1 to `most_rows`."""

    def run(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """Run the next tokens of every text.

        ids: int64 [rows, n]. Row r's tokens are ids[r, :counts[r]], counts from 1 to n, at the positions firsts[r],
        firsts[r] + 1, ...; what stands behind them is padding. Every position before firsts[r] has been run; whatever
        was run from there on is forgotten, so a smaller first is a rewind. Where rows differ in counts, or there are
        several rows and n is above 1, firsts are all 0. Returns float32 [rows, n, vocab], of any value for padding.
        Raises LlamaExportError when the engine fails.
        """

    def last(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """As `run`, asking for no logits but those after each text's last token, as whoever writes text does: float32
        [rows, vocab].
        """

    def cache(self, layer: int) -> CacheView | None:
        """The cache of a layer as it is now; None where it cannot be read."""
