"""What `verify` finds: figures with their limits, by question, way and prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEMA_VERSION = 2
_NEAR_ONE = 0.01


def number(value: float) -> str:
    """A figure for people, to three digits; those just below or above 1 by how far they are from it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    away = abs(1 - value)
    if 0 < away < _NEAR_ONE:
        return f"{value:.{min(1 - math.floor(math.log10(away)), 12)}f}".rstrip("0").rstrip(".")
    return f"{value:.3g}"


@dataclass(frozen=True)
class Gate:
    """One figure and what it may be: at most `limit`, or at least where `at_least`. figure: its id in files; name: for
    people; reason: why that limit.
    """

    figure: str
    name: str
    measured: float
    limit: float
    at_least: bool = False
    reason: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.measured >= self.limit if self.at_least else self.measured <= self.limit)

    def __str__(self) -> str:
        mark, bound = "ok  " if self.passed else "FAIL", "at least" if self.at_least else "at most"
        return f"{mark} {self.name}: {number(self.measured)} ({bound} {number(self.limit)})"

    def to_json(self) -> dict[str, object]:
        """For programs; figures that are not finite (NaN logits) are null."""
        return {
            "figure": self.figure,
            "name": self.name,
            "measured": _finite(self.measured),
            "limit": self.limit,
            "at_least": self.at_least,
            "passed": self.passed,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Choice:
    """One of the likeliest tokens of a position: its id, its text and its logit."""

    token: int
    text: str
    logit: float


@dataclass(frozen=True)
class Moment:
    """A position that is worth looking at: the token there, and the five likeliest next ones on both sides."""

    position: int
    token: str
    kl: float
    difference: float
    expected: tuple[Choice, ...]
    found: tuple[Choice, ...]


@dataclass(frozen=True)
class Case:
    """One prompt in one way through the graph ("" where a check has none): its gates. kl: of each position; worst: the
    positions with the largest. prompt_tokens: so many of `kl` come first that are the prompt's, 0 where it is not said.
    first: the position of its first in the text.
    """

    gates: tuple[Gate, ...]
    way: str = ""
    prompt: str = ""
    kl: tuple[float, ...] = ()
    worst: tuple[Moment, ...] = ()
    prompt_tokens: int = 0
    first: int = 0

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class LayerFigure:
    """How far a layer is from PyTorch, at most, relative to the largest number there: hidden state, keys, values; None
    where it cannot be read.
    """

    layer: int
    hidden: float | None
    keys: float | None
    values: float | None


@dataclass(frozen=True)
class Check:
    """One question. id: "files", "weights", "full", "shipped", "engine", "cost", "layers", with the adapter's name
    behind a colon where one is asked about; title: for people. error: why it could not be answered, a failure.
    seconds: it took, 0 where that was not measured apart.
    """

    id: str
    title: str
    cases: tuple[Case, ...] = ()
    details: tuple[str, ...] = ()
    layers: tuple[LayerFigure, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error is None and all(case.passed for case in self.cases)


@dataclass(frozen=True)
class Verdict:
    """What one backend found. longest: tokens of the longest text that was replayed; notes: the manifest's; engine:
    whether one of TensorRT computed, None for a bundle that has none.
    """

    bundle: str
    backend: str
    positions: int
    checks: tuple[Check, ...]
    seconds: float
    longest: int
    notes: tuple[str, ...]
    engine: bool | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """What did not pass, a few words each; of a figure that fails in several ways and prompts, once."""
        told = {}
        for check in self.checks:
            gates = [gate for case in check.cases for gate in case.gates if not gate.passed]
            told.update({(check.id, gate.figure): str(gate).removeprefix("FAIL ") for gate in reversed(gates)})
            if check.error is not None:
                told[check.id, ""] = check.error
        return tuple(told.values())

    def to_json(self) -> dict[str, object]:
        """For programs: one of the runs of `verify --json`."""
        return {
            "backend": self.backend,
            "engine": self.engine,
            "passed": self.passed,
            "positions": self.positions,
            "longest": self.longest,
            "seconds": round(self.seconds, 3),
            "checks": [_check_json(check) for check in self.checks],
            "notes": list(self.notes),
        }


def to_json(verdicts: tuple[Verdict, ...]) -> dict[str, object]:
    """What `verify --json` writes: all runs of one bundle."""
    return {
        "schema_version": SCHEMA_VERSION,
        "bundle": verdicts[0].bundle,
        "passed": all(verdict.passed for verdict in verdicts),
        "runs": [verdict.to_json() for verdict in verdicts],
    }


def _finite(value: float | None) -> float | None:
    """JSON has no other numbers."""
    return value if value is not None and math.isfinite(value) else None


def _check_json(check: Check) -> dict[str, object]:
    return {
        "id": check.id,
        "title": check.title,
        "passed": check.passed,
        "error": check.error,
        "cases": [
            {
                "way": case.way,
                "prompt": case.prompt,
                "passed": case.passed,
                "gates": [gate.to_json() for gate in case.gates],
            }
            for case in check.cases
        ],
        "layers": [
            {"layer": one.layer, **{name: _finite(getattr(one, name)) for name in ("hidden", "keys", "values")}}
            for one in check.layers
        ],
        "details": list(check.details),
    }
