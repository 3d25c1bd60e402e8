"""What a bisection finds: rows of figures, the first place that fails, and words for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from . import places as at
from .places import IN_LAYER, PLACES, order_of

STORED, LOCAL, GAIN, CACHE, CUMULATIVE = "weights", "local", "gain", "cache", "cumulative"
KINDS = {
    STORED: "the stored values against PyTorch's, bit for bit",
    LOCAL: "transformers' op on the graph's own inputs of this op",
    GAIN: "the factor by which whole rows of a norm differ",
    CACHE: "the rows of earlier tokens, which nothing may change",
    CUMULATIVE: "PyTorch's whole run, which inherits what came before",
}
WEIGHTS_PASS = "weights"


@dataclass(frozen=True)
class Row:
    """One comparison. pass_: "prefill", "chunk", "decode", or "weights"; layer: None outside of layers; place: of
    `places.PLACES`, or a stored tensor's name; op: the node's name in the ONNX file, or the initializer's; kind: of
    `KINDS`; hint: what would explain it, "" where nothing simple does; contains: what else the op does.
    """

    pass_: str
    layer: int | None
    place: str
    op: str
    kind: str
    measured: float
    limit: float
    hint: str = ""
    contains: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.limit)

    @property
    def group(self) -> str:
        return PLACES[self.place].group if self.place in PLACES else self.place

    @property
    def where(self) -> str:
        return self.group if self.layer is None else f"layer {self.layer}, {self.group}"

    def to_json(self) -> dict[str, object]:
        """For programs; figures that are not finite are null."""
        return {
            "pass": self.pass_,
            "layer": self.layer,
            "place": self.place,
            "group": self.group,
            "op": self.op,
            "kind": self.kind,
            "measured": self.measured if math.isfinite(self.measured) else None,
            "limit": self.limit,
            "passed": self.passed,
            "hint": self.hint,
        }


@dataclass(frozen=True)
class Bisection:
    """bundle: its path; engine: what ran the graph; against: where PyTorch's weights came from; layers: of the model;
    pieces: tokens of each call; rows: all comparisons, those of the weights first, then as computed; notes: what was
    not asked.
    """

    bundle: str
    engine: str
    against: str
    dtype: str
    layers: int
    pieces: tuple[int, ...]
    tensors: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Row, ...]:
        """What decides, in the order in which it is computed, the weights first; figures over the whole run are beside
        it, since they inherit.
        """
        wrong = [row for row in self.rows if not row.passed and row.kind != CUMULATIVE]
        return tuple(sorted(wrong, key=self._order))

    @property
    def first(self) -> Row | None:
        return next(iter(self.failed), None)

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def title(self) -> str:
        return f"Where it breaks: {self.bundle}, layer by layer against transformers on {self.against}"

    def lines(self) -> list[str]:
        """For people."""
        cut = " + ".join(map(str, self.pieces))
        lines = [self.title, f"  {sum(self.pieces)} tokens in pieces of {cut}, {self.engine}, full-precision kernels"]
        lines += [f"  {note}" for note in self.notes]
        stored = [row for row in self.failed if row.kind == STORED]
        if self.tensors:
            lines += ["", f"Stored weights: {len(stored)} of {self.tensors} differ from PyTorch's"]
            lines += [f"  FAIL {row.where}: {row.op}{_hint(row)}" for row in stored]
        graph = [row for row in self.failed if row.kind != STORED]
        lines += ["", *(self._graph_lines(graph) if graph else [self._clean_line()])]
        return [*lines, "", self.verdict]

    @property
    def verdict(self) -> str:
        first = self.first
        if first is None:
            return "no place found: every op group is as PyTorch computes it, as far as these tokens show"
        return f"first place: {first.where}: {first.op}"

    def to_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "title": self.title,
            "passed": self.passed,
            "first": None if self.first is None else self.first.to_json(),
            "verdict": self.verdict,
            "engine": self.engine,
            "against": self.against,
            "dtype": self.dtype,
            "pieces": list(self.pieces),
            "tensors": self.tensors,
            "rows": [row.to_json() for row in self.rows],
            "kinds": KINDS,
            "notes": list(self.notes),
        }

    def _order(self, row: Row) -> tuple[int, int]:
        if row.kind == STORED:
            return -2, -1 if row.layer is None else row.layer
        return order_of(row.layer, row.place, self.layers)

    def _clean_line(self) -> str:
        rows = [row for row in self.rows if row.kind in (LOCAL, GAIN)]
        worst = max(rows, key=lambda row: row.measured / (row.limit or 1.0))
        return f"Graph: every op group agrees; nearest to its limit {worst.where}: {_figures(worst, self.dtype)}"

    def _graph_lines(self, failed: list[Row]) -> Iterator[str]:
        first = failed[0]
        yield f"Graph: it breaks first at {first.where}, in {', '.join(_passes(failed, first))}"
        yield f"  op        {first.op}" + (f" ({first.contains})" if first.contains else "")
        yield f"  measured  {_figures(first, self.dtype)}"
        if first.hint:
            yield f"  it fits   {first.hint}"
        yield from (f"  {line}" for line in self._meaning(failed, first))
        yield f"  the places of this {'layer' if first.layer is not None else 'part'}, worst of all passes:"
        yield from self._picture(first.layer)
        others = dict.fromkeys(row.where for row in failed if row.layer != first.layer)
        if others:
            told = list(others)
            more = f" and {len(told) - 5} more" if len(told) > 5 else ""
            yield f"  also: {'; '.join(told[:5])}{more}"

    def _picture(self, layer: int | None) -> Iterator[str]:
        shown = IN_LAYER if layer is not None else at.OUTSIDE
        for place in shown:
            rows = [row for row in self.rows if (row.layer, row.place) == (layer, place.id) and row.kind != CUMULATIVE]
            if rows:
                worst = max(rows, key=lambda row: (not row.passed, row.measured / (row.limit or 1.0)))
                whole = [
                    row.measured
                    for row in self.rows
                    if (row.layer, row.place, row.kind) == (layer, place.id, CUMULATIVE)
                ]
                inherited = f"; whole run {max(whole):.2g}" if whole else ""
                mark = "ok  " if worst.passed else "FAIL"
                yield f"    {mark} {place.group}: {worst.measured:.2g} (at most {worst.limit:.2g}{inherited})"

    def _meaning(self, failed: list[Row], first: Row) -> Iterator[str]:
        """What the places that are seen tell of the ones that are not."""
        here = {row.place for row in failed if row.layer == first.layer}
        if first.kind == CACHE:
            yield "the rows of earlier tokens changed: the cache is written at a wrong place"
        elif first.place == at.CACHED_KEYS:
            values = "values differ too" if at.CACHED_VALUES in here else "values agree"
            yield f"keys after the rotary embedding already differ, {values}: look at tables, positions, order of heads"
        elif first.place == at.ATTENTION:
            yield "keys and values agree; attention's output differs: look at scale, mask, queries' rotation, heads"
        if _passes(failed, first) == ["decode"] or _passes(failed, first) == ["chunk", "decode"]:
            yield "only with tokens in the cache: look at positions and lengths"


def _passes(failed: list[Row], first: Row) -> list[str]:
    key = (first.layer, first.place)
    return list(dict.fromkeys(row.pass_ for row in failed if (row.layer, row.place) == key))


def _figures(row: Row, dtype: str) -> str:
    return f"{row.measured:.3g}, {dtype} explains {row.limit:.3g} ({KINDS[row.kind]})"


def _hint(row: Row) -> str:
    return f" ({row.hint})" if row.hint else ""
