"""`pytest --llama-bundle DIR`: one test for each gate of `verify`, in anybody's test suite.

pytest loads this module at every start, in projects too that have nothing to do with bundles: without the option it
imports nothing of this package. The tests' names are planned from the bundle and its reference, without running
anything; the first test that runs does the verification, and all others of the bundle read its verdict.

With pytest-xdist, `--dist loadfile` keeps a bundle's tests in one process; otherwise each worker that gets one of them
verifies for itself.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .runtime.proof.verdict import Check, Gate, Verdict

MARK = "llama_bundle"
REST = "rest"
"""The last test of a bundle: whatever was compared and has no test of its own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the options."""
    group = parser.getgroup("llama-export", "bundles of llama-export")
    group.addoption("--llama-bundle", action="append", default=[], metavar="DIR", help="Verify this bundle; several.")
    group.addoption(
        "--llama-reference", action="append", default=[], metavar="FILE", help="Against this reference too; several."
    )
    group.addoption("--llama-backend", metavar="NAME", help="On this backend; default: what `run` would take.")
    group.addoption("--llama-threads", type=int, metavar="N", help="Threads; default: as `verify` takes.")
    group.addoption("--llama-max-kl", type=float, metavar="X", help="The most that quantisation may cost.")


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known, for `-m llama_bundle` and `--strict-markers`."""
    config.addinivalue_line("markers", f"{MARK}: a gate of `llama-export verify`")


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    """Add the bundles to what the session collects. They are no folders of tests: no conftest.py of theirs is run."""
    report = (yield).get_result()
    if isinstance(collector, pytest.Session) and report.result is not None:
        for folder in dict.fromkeys(collector.config.getoption("--llama-bundle")):
            report.result.append(BundleTests.from_parent(collector, path=Path(folder).resolve()))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Look for no test files in a bundle that lies among somebody's tests."""
    folders = config.getoption("--llama-bundle")
    return True if any(collection_path == Path(folder).resolve() for folder in folders) else None


class GateError(Exception):
    """A gate that failed or could not be asked; the message says why."""


class BundleTests(pytest.File):
    """The tests of one bundle, and its verification. Each test's id begins with its folder."""

    planned: tuple[str, ...] = ()
    _found: Verdict | Exception | None = None

    def collect(self) -> list[pytest.Item]:
        """Name the tests; raises CollectError when there is no bundle, or nothing to compare it with."""
        from .errors import LlamaExportError  # noqa: PLC0415 (see the module's docstring)

        try:
            self.planned = planned_tests(self)
        except LlamaExportError as error:
            raise self.CollectError(str(error)) from error
        self.add_marker(MARK)
        return [GateTest.from_parent(self, name=name) for name in (*self.planned, REST)]

    def verdict(self) -> Verdict:
        """What the verification found, which the first call does; raises what ended it, every time."""
        if self._found is None:
            try:
                self._found = verify_bundle(self)
            except Exception as error:  # all tests tell it
                self._found = error
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


class GateTest(pytest.Item):
    """The test of one gate, or of the rest."""

    parent: BundleTests

    def runtest(self) -> None:
        """Raises GateError with what failed."""
        verdict = self.parent.verdict()
        failed = _rest(verdict, self.parent.planned) if self.name == REST else _own(verdict, self.name)
        if failed:
            raise GateError("\n".join(failed))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """One sentence for each failure; a traceback only where the fault is in the program."""
        from .errors import LlamaExportError  # noqa: PLC0415 (see the module's docstring)

        if isinstance(excinfo.value, (GateError, LlamaExportError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """A test has a name, and no line in a file."""
        return self.path, None, self.name


def planned_tests(tests: BundleTests) -> tuple[str, ...]:
    """The names of all gates that a verification will ask about, without running anything."""
    from .runtime.proof.reports.words import gate_id, one_line  # noqa: PLC0415 (see the module's docstring)
    from .runtime.proof.verify import planned  # noqa: PLC0415

    gates = planned(tests.path, **_options(tests.config))
    return tuple(dict.fromkeys(one_line(gate_id(one.check, one.way, one.prompt, one.figure)) for one in gates))


def verify_bundle(tests: BundleTests) -> Verdict:
    """Verify the bundle as the options say."""
    from .progress import Silent  # noqa: PLC0415 (see the module's docstring)
    from .runtime.proof.verify import verify  # noqa: PLC0415

    return verify(tests.path, check_hashes=True, progress=Silent(), **_options(tests.config))


def _options(config: pytest.Config) -> dict[str, Any]:
    return {
        "references": tuple(map(Path, config.getoption("--llama-reference"))),
        "backend": config.getoption("--llama-backend"),
        "threads": config.getoption("--llama-threads"),
        "max_kl": config.getoption("--llama-max-kl"),
    }


def _named(verdict: Verdict) -> list[tuple[str, Check, Gate]]:
    from .runtime.proof.reports.words import gate_id, one_line  # noqa: PLC0415 (see the module's docstring)

    return [
        (one_line(gate_id(check.id, case.way, case.prompt, gate.figure)), check, gate)
        for check in verdict.checks
        for case in check.cases
        for gate in case.gates
    ]


def _own(verdict: Verdict, name: str) -> list[str]:
    """Why the gate of this name did not pass, nothing where it did."""
    from .runtime.proof.reports.words import sentence  # noqa: PLC0415 (see the module's docstring)

    gates = [gate for other, _, gate in _named(verdict) if other == name]
    if gates:
        return [sentence(gate) for gate in gates if not gate.passed]
    errors = [(check.id, check.error) for check in verdict.checks if check.error is not None]
    same = [error for check, error in errors if name.startswith(f"{check}[")]
    return [*same, *(error for _, error in errors), "This was not compared."][:1]


def _rest(verdict: Verdict, planned: Sequence[str]) -> list[str]:
    """What failed and has no test of its own."""
    from .runtime.proof.reports.words import sentence  # noqa: PLC0415 (see the module's docstring)

    told = {check.split("[")[0] for check in planned}
    gates = [sentence(gate) for name, _, gate in _named(verdict) if name not in planned and not gate.passed]
    return gates + [check.error for check in verdict.checks if check.error is not None and check.id not in told]
