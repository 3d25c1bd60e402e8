"""What `verify` finds: figures with their limits, by question, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Gate:
    """One figure and what it may be: at most `limit`, or at least where `at_least`."""

    name: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return bool(self.measured >= self.limit if self.at_least else self.measured <= self.limit)

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        return (
            f"{mark} {self.name}: {self.measured:.3g} ({'at least' if self.at_least else 'at most'} {self.limit:.3g})"
        )


@dataclass(frozen=True)
class Check:
    """One question: a title, its gates, and what else is worth saying."""

    title: str
    gates: tuple[Gate, ...]
    details: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class Verdict:
    """longest: tokens of the longest text that was replayed; notes: the manifest's; engine: whether one of TensorRT
    computed, None for a bundle that has none.
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

    def lines(self) -> list[str]:
        """The verdict for people."""
        lines = [f"{self.bundle} on {self.backend}, {self.positions} positions, {self.seconds:.1f} s"]
        for check in self.checks:
            lines += ["", check.title, *(f"  {gate}" for gate in check.gates), *(f"  {text}" for text in check.details)]
        failed = [f"{check.title}: {gate.name}" for check in self.checks for gate in check.gates if not gate.passed]
        told = [
            f"Texts of {self.longest} tokens were replayed; docs/parity.md tells what they cannot reach.",
            *self.notes,
        ]
        passed = "passed on the CPU; no engine was checked" if self.engine is False else "passed"
        return [*lines, "", *told, "", f"FAILED: {'; '.join(failed)}" if failed else passed]

    def to_json(self) -> dict[str, object]:
        """The verdict for programs; infinite figures (NaN logits) are null."""
        checks = []
        for check in self.checks:
            gates = [
                {
                    **asdict(gate),
                    "measured": gate.measured if np.isfinite(gate.measured) else None,
                    "passed": gate.passed,
                }
                for gate in check.gates
            ]
            checks.append({"title": check.title, "gates": gates, "details": list(check.details)})
        return {
            "schema_version": 1,
            "bundle": self.bundle,
            "backend": self.backend,
            "positions": self.positions,
            "seconds": round(self.seconds, 3),
            "passed": self.passed,
            "checks": checks,
            "longest": self.longest,
            "engine": self.engine,
            "notes": list(self.notes),
        }
