"""What all reports say alike: the names of ways, figures and tests, the sentence of a failure, and the outcome."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ....tables import plain
from ..verdict import Case, Check, Gate, Verdict, number

WAYS: Mapping[str, str] = {"one_piece": "one piece"}
"""The ways through a graph whose id is no words."""
HEADS: Mapping[str, str] = {
    "difference": "logit",
    "norm_ratio": "norm",
    "kl": "KL",
    "mean_kl": "mean KL",
    "agreement": "agree",
    "top10": "top 10",
}
"""Figures that are columns, where the id is not short enough or no words."""


def way_name(way: str) -> str:
    """A way for people."""
    return WAYS.get(way, way)


def head(figure: str) -> str:
    """A figure as the head of a column."""
    return HEADS.get(figure, figure)


def one_line(text: str) -> str:
    """`text` with nothing that a terminal obeys, nor line ends."""
    return plain(text).replace("\n", " ").replace("\t", " ")


def brief(value: float) -> str:
    """A figure for a narrow column: two digits, those near 1 to seven decimals, and exponents without zeros."""
    if not math.isfinite(value):
        return number(value)
    if 0 < abs(1 - value) < 0.01:
        return f"{value:.7f}".rstrip("0").rstrip(".")
    if abs(value) >= 100:
        return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.2g}"


def bound(gate: Gate) -> str:
    """ "at most 0.05"."""
    return f"at {'least' if gate.at_least else 'most'} {number(gate.limit)}"


def sentence(gate: Gate) -> str:
    """What a gate found, in one sentence, with the reason for its limit where there is one."""
    reason = f" ({gate.reason})" if gate.reason else ""
    return f"{gate.name[:1].upper()}{gate.name[1:]}: {number(gate.measured)}, where {bound(gate)} is allowed{reason}."


def place(case: Case) -> str:
    """Of a case among those of its check: way and prompt."""
    return ", ".join(filter(None, (way_name(case.way), case.prompt)))


def gate_id(check: str, way: str, prompt: str, figure: str) -> str:
    """The name of one gate's test, which stays the same from run to run: "full[chunks-code-kl]"."""
    return f"{check}[{'-'.join(filter(None, (way, prompt, figure)))}]"


def worst(gates: Iterable[Gate]) -> Gate:
    """The one of several gates on the same figure that is furthest beyond its limit, or nearest to it."""
    return max(gates, key=_excess)


def _excess(gate: Gate) -> float:
    beyond = gate.limit - gate.measured if gate.at_least else gate.measured - gate.limit
    return math.inf if math.isnan(beyond) else beyond / (abs(gate.limit) or 1)


@dataclass(frozen=True)
class WayRow:
    """One way of a check over all prompts: of each figure the worst gate."""

    way: str
    passed: bool
    gates: Mapping[str, Gate]


def whole(check: Check) -> tuple[Gate, ...]:
    """The gates that are of no way or prompt."""
    return tuple(gate for case in check.cases if not case.way and not case.prompt for gate in case.gates)


def by_way(check: Check) -> list[WayRow]:
    """The other cases of a check, by way in the order they come."""
    cases: dict[str, list[Case]] = {}
    for case in check.cases:
        if case.way or case.prompt:
            cases.setdefault(case.way, []).append(case)
    rows = []
    for way, own in cases.items():
        gates: dict[str, list[Gate]] = {}
        for gate in (gate for case in own for gate in case.gates):
            gates.setdefault(gate.figure, []).append(gate)
        passed = all(case.passed for case in own)
        rows.append(WayRow(way, passed, {figure: worst(same) for figure, same in gates.items()}))
    return rows


def limit_of(gates: Sequence[Gate]) -> str:
    """The limit that several gates on one figure share, for the head of a column."""
    limits = {gate.limit for gate in gates}
    return (">=" if gates[0].at_least else "<=") + (brief(limits.pop()) if len(limits) == 1 else "...")


def run_names(verdicts: Sequence[Verdict]) -> list[str]:
    """What tells several runs apart: the backend, numbered where that is not enough."""
    return distinct(one_line(verdict.backend) for verdict in verdicts)


def distinct(names: Iterable[str]) -> list[str]:
    """`names` with " (2)" and so on behind those that came before."""
    taken: set[str] = set()
    found = []
    for name in names:
        different, count = name, 1
        while different in taken:
            count += 1
            different = f"{name} ({count})"
        taken.add(different)
        found.append(different)
    return found


def outcome(verdicts: Sequence[Verdict]) -> str:
    """The last line: "passed", what that does not mean, or what failed."""
    if not verdicts:
        return "FAILED: nothing was verified"
    names = run_names(verdicts)
    failed = [
        f"{name}: {what}" if len(verdicts) > 1 else what
        for name, verdict in zip(names, verdicts, strict=True)
        for what in dict.fromkeys(_failures(verdict))
    ]
    if failed:
        return f"FAILED: {'; '.join(failed)}"
    engines = {verdict.engine for verdict in verdicts}
    return "passed on the CPU; no engine was checked" if False in engines and True not in engines else "passed"


def _failures(verdict: Verdict) -> Iterator[str]:
    for check in verdict.checks:
        title = one_line(check.title)
        yield from (f"{title}: {one_line(gate.name)}" for case in check.cases for gate in case.gates if not gate.passed)
        if check.error is not None:
            yield f"{title}: not answered"
