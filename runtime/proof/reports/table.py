"""What `verify` prints: tables of at most 80 columns, and what failed by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ....tables import clipped, columns, width
from ..verdict import Check, LayerFigure, Verdict, number
from .words import WayRow, bound, brief, by_way, head, limit_of, one_line, outcome, place, run_names, way_name, whole

_COLUMNS = 80
_NAME = 36  # columns of a prompt's name
_TOLD = 12  # failures of a check
_LAYERS = 8
_INDENT = "  "


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The verdicts of one bundle for people, line by line; the last line is the outcome.

    Nothing in them is obeyed by a terminal, whatever the bundle says. Tables keep to 80 columns; sentences are left to
    the terminal to wrap.
    """
    found = _matrix(verdicts) if len(verdicts) > 1 else []
    for verdict in verdicts:
        found += [*_run(verdict), ""]
    notes = dict.fromkeys(one_line(note) for verdict in verdicts for note in verdict.notes)
    longest = max((verdict.longest for verdict in verdicts), default=0)
    told = [f"Texts of {longest} tokens were replayed; docs/parity.md tells what they cannot reach."] if longest else []
    return [*found, *told, *notes, "", outcome(verdicts)]


def _run(verdict: Verdict) -> list[str]:
    described = f"{one_line(verdict.bundle)} on {one_line(verdict.backend)}"
    found = [f"{described}, {verdict.positions} positions, {verdict.seconds:.1f} s"]
    for check in verdict.checks:
        found += ["", *_check(check)]
    return found


def _check(check: Check) -> Iterator[str]:
    yield one_line(check.title)
    if check.error is not None:
        yield f"{_INDENT}FAIL {one_line(check.error)}"
    yield from (f"{_INDENT}{one_line(str(gate))}" for gate in whole(check))
    rows = by_way(check)
    for figures in dict.fromkeys(tuple(row.gates) for row in rows):
        yield from _ways([row for row in rows if tuple(row.gates) == figures], figures)
    if rows:
        yield from _failures(check)
    yield from _layers(check.layers)
    yield from (f"{_INDENT}{one_line(text)}" for text in check.details)


def _ways(rows: Sequence[WayRow], figures: Sequence[str]) -> list[str]:
    """A table of ways that have the same figures; a sentence each where a table would be mostly heads."""
    if len(rows) == 1 and len(figures) < 3:
        (row,) = rows
        return [
            f"{_INDENT}{'ok  ' if gate.passed else 'FAIL'} {one_line(way_name(row.way))}: {one_line(gate.name)}: "
            f"{number(gate.measured)} ({bound(gate)})"
            for gate in row.gates.values()
        ]
    names = [["", ""], ["", ""], *(["ok" if row.passed else "FAIL", clipped(way_name(row.way), 20)] for row in rows)]
    cells = [
        [clipped(head(figure), 20), limit_of([row.gates[figure] for row in rows])]
        + [brief(row.gates[figure].measured) + ("" if row.gates[figure].passed else " !") for row in rows]
        for figure in figures
    ]
    return fitted(names, cells)


def fitted(names: Sequence[Sequence[str]], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table of the rows `names` and the columns `cells`, in as many blocks below each other as 80 columns need.

    The blocks have about as many columns each, and each begins with `names` again.
    """
    for blocks in range(1, len(cells) + 1):
        size = math.ceil(len(cells) / blocks)
        found: list[str] = []
        for start in range(0, len(cells), size):
            part = cells[start : start + size]
            rows = [[*name, *(column[number] for column in part)] for number, name in enumerate(names)]
            found += columns(rows, indent=_INDENT)
        if size == 1 or max(map(width, found)) <= _COLUMNS:
            break
    return found


def _failures(check: Check) -> Iterator[str]:
    """The gates that failed, by way and prompt."""
    failed = [(case, gate) for case in check.cases for gate in case.gates if not gate.passed and place(case)]
    for case, gate in failed[:_TOLD]:
        where = clipped(place(case), _NAME)
        yield f"{_INDENT}FAIL {where}: {one_line(gate.name)}: {number(gate.measured)} ({bound(gate)})"
    if len(failed) > _TOLD:
        yield f"{_INDENT}FAIL and {len(failed) - _TOLD} more"
    for name, reason in {gate.name: gate.reason for _, gate in failed if gate.reason}.items():
        yield f"{_INDENT}why {one_line(name)} has that limit: {one_line(reason)}"


def _layers(layers: Sequence[LayerFigure]) -> list[str]:
    """The layers that are furthest from PyTorch, in their order."""
    if not layers:
        return []
    told = sorted(sorted(layers, key=_largest, reverse=True)[:_LAYERS], key=lambda one: one.layer)
    rows = [["layer", "hidden", "keys", "values"]]
    rows += [[str(one.layer), *map(_figure, (one.hidden, one.keys, one.values))] for one in told]
    more = len(layers) - len(told)
    return [*columns(rows, indent=_INDENT), *([f"{_INDENT}and {more} layers that differ less"] if more else [])]


def _largest(layer: LayerFigure) -> float:
    known = [value for value in (layer.hidden, layer.keys, layer.values) if value is not None]
    return math.inf if any(map(math.isnan, known)) else max(known, default=-1.0)


def _figure(value: float | None) -> str:
    return "-" if value is None else brief(value)


def _matrix(verdicts: Sequence[Verdict]) -> list[str]:
    """Which way of which check passed on which backend, of several."""
    found = [_marks(verdict) for verdict in verdicts]
    keys = list(dict.fromkeys(key for marks in found for key in marks))
    names = [["", ""], *([check, way_name(way)] for check, way in keys)]
    names = [[clipped(word, 20) for word in name] for name in names]
    cells = [
        [clipped(name, 24), *(marks.get(key, "-") for key in keys)]
        for name, marks in zip(run_names(verdicts), found, strict=True)
    ]
    return [f"{one_line(verdicts[0].bundle)} on {len(verdicts)} backends", *fitted(names, cells), ""]


def _marks(verdict: Verdict) -> dict[tuple[str, str], str]:
    """By check and way; a check's own gates, and an error, under no way."""
    passed: dict[tuple[str, str], bool] = {}
    for check in verdict.checks:
        rows, own = by_way(check), whole(check)
        if own or check.error is not None or not rows:
            passed[check.id, ""] = check.error is None and all(gate.passed for gate in own)
        passed.update({(check.id, row.way): row.passed for row in rows})
    return {key: "ok" if fine else "FAIL" for key, fine in passed.items()}
