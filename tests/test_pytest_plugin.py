"""`pytest --llama-bundle`, in pytest processes of their own: a test for each gate, one verification, no tracebacks."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.verdicts import PROMPTS, WAYS

TESTS = Path(__file__).parent
GATES = 1 + len(WAYS) * len(PROMPTS) * 7 + 1 + 1
"""In the stub's verdict: the files, the full-precision kernels', their greedy text, the shipped kernels'."""

_STUB = '''
"""Stands in for the verification: a verdict that a file says how to break, and a line in a log for each run."""

import dataclasses, json, os, sys, types
from pathlib import Path
from llama_export.errors import LlamaExportError
from llama_export.runtime.proof.verdict import Case, Check, Gate
from support.verdicts import verdict

HERE = Path(__file__).parent
SAYS = json.loads((HERE / "says.json").read_text())


def gates(found):
    return [
        types.SimpleNamespace(check=check.id, way=case.way, prompt=case.prompt, figure=gate.figure)
        for check in found.checks for case in check.cases for gate in case.gates
    ]


def planned(bundle, **options):
    if not bundle.is_dir():
        raise LlamaExportError(f"There is no bundle at {bundle}.")
    return gates(verdict())


def verify(bundle, **options):
    with (HERE / "log").open("a") as log:
        print(bundle, *(f"{name}={options[name]}" for name in sorted(options) if name != "progress"), file=log)
    if "error" in SAYS:
        raise LlamaExportError(SAYS["error"])
    if "bug" in SAYS:
        raise RuntimeError(SAYS["bug"])
    found = verdict(broken=tuple(SAYS["broken"]) if "broken" in SAYS else None)
    checks = list(found.checks)
    if "unplanned" in SAYS:
        checks.append(Check("more", "More", (Case((Gate("new", "a new figure", 2, 1),)),)))
    if "stopped" in SAYS:
        checks = [checks[0], Check("full", "Not compared any further", error=SAYS["stopped"])]
    return dataclasses.replace(found, checks=tuple(checks))


stub = types.ModuleType("llama_export.runtime.proof.verify")
stub.planned, stub.verify = planned, verify
sys.modules[stub.__name__] = stub
'''


@dataclass
class Project:
    """A folder with somebody's tests and two bundles, of which nothing is real."""

    path: Path
    says: str = "{}"
    """How the stub's verdict is broken, as JSON."""

    def pytest(self, *arguments: str, stub: bool = True) -> subprocess.CompletedProcess[str]:
        (self.path / "says.json").write_text(self.says)
        (self.path / "log").unlink(missing_ok=True)
        plugins = () if _installed() else ("-p", "llama_export.pytest_plugin")
        plugins += ("-p", "stub_verify") if stub else ()
        paths = [str(self.path), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = ("PYTEST_", "COV_", "GITHUB_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", *plugins, *arguments],
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def runs(self) -> list[str]:
        log = self.path / "log"
        return log.read_text().splitlines() if log.exists() else []


def _installed() -> bool:
    points = importlib.metadata.entry_points(group="pytest11")
    return any(point.value == "llama_export.pytest_plugin" for point in points)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "stub_verify.py").write_text(_STUB)
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return Project(tmp_path)


def counted(done: subprocess.CompletedProcess[str], **expected: int) -> None:
    """Hold the last line of a run of pytest to so many of each outcome."""
    last = re.findall(r"(\d+) (passed|failed|error|skipped|deselected)", done.stdout.splitlines()[-1])
    assert {word: int(number) for number, word in last} == expected, done.stdout + done.stderr


# Names


def test_each_gate_is_a_test_and_naming_them_runs_nothing(project: Project) -> None:
    done = project.pytest("--llama-bundle=one", "--collect-only", "-q")
    names = [line for line in done.stdout.splitlines() if line.startswith("one::")]
    assert len(set(names)) == len(names) == GATES + 1
    assert names[0] == "one::files[differing]"
    assert "one::full[chunks-short-kl]" in names
    assert f"one::full[decode-{PROMPTS[2]}-top10]" in names
    assert names[-1] == "one::rest"
    assert "test_mine.py::test_mine" in done.stdout
    assert project.runs == []
    assert "collected 0 items" not in project.pytest("--llama-bundle=one", "--collect-only").stdout


def test_a_folder_that_is_no_bundle_is_told_in_one_sentence(project: Project) -> None:
    done = project.pytest("--llama-bundle=absent")
    assert done.returncode == 2
    assert f"There is no bundle at {project.path / 'absent'}." in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "pytest_plugin" not in done.stdout


def test_the_real_verification_says_so_too(project: Project) -> None:
    (project.path / "one" / "manifest.json").write_text("{")
    done = project.pytest("--llama-bundle=one", stub=False)
    assert done.returncode == 2
    errors = [line for line in done.stdout.splitlines() if "manifest.json" in line]
    assert len(errors) == 1, done.stdout
    assert "pytest_plugin" not in done.stdout


# Outcomes


def test_all_gates_pass_after_one_verification(project: Project) -> None:
    done = project.pytest("--llama-bundle=one")
    counted(done, passed=GATES + 2)
    assert done.returncode == 0
    assert project.runs == [
        f"{project.path / 'one'} backend=None check_hashes=True max_kl=None references=() threads=None"
    ]


def test_a_gate_that_fails_says_so_without_a_traceback(project: Project) -> None:
    project.says = '{"broken": ["chunks", "short"]}'
    done = project.pytest("--llama-bundle=one")
    counted(done, failed=1, passed=GATES + 1)
    assert "FAILED one::full[chunks-short-difference]" in done.stdout
    told = "Largest difference of a logit: 0.25, where at most 0.00137 is allowed (another order of sums)."
    assert told in done.stdout
    assert "pytest_plugin" not in done.stdout
    assert "Error" not in done.stdout


def test_a_verification_that_ends_early_fails_every_test_with_its_sentence(project: Project) -> None:
    project.says = '{"error": "The bundle needs ONNX Runtime 9."}'
    done = project.pytest("--llama-bundle=one")
    counted(done, failed=GATES + 1, passed=1)
    assert done.stdout.count("The bundle needs ONNX Runtime 9.") >= GATES + 1
    assert "pytest_plugin" not in done.stdout
    assert len(project.runs) == 1


def test_a_fault_in_the_program_shows_its_traceback(project: Project) -> None:
    project.says = '{"bug": "a bug"}'
    done = project.pytest("--llama-bundle=one", "-k", "rest")
    counted(done, failed=1, deselected=GATES + 1)
    assert "RuntimeError: a bug" in done.stdout
    assert "stub_verify.py" in done.stdout


def test_what_was_planned_and_not_compared_fails(project: Project) -> None:
    project.says = '{"stopped": "The graph does not load."}'
    done = project.pytest("--llama-bundle=one")
    counted(done, failed=GATES - 1, passed=3)
    assert done.stdout.count("The graph does not load.") >= GATES - 1


def test_what_was_compared_and_not_planned_is_not_lost(project: Project) -> None:
    project.says = '{"unplanned": true}'
    done = project.pytest("--llama-bundle=one")
    counted(done, failed=1, passed=GATES + 1)
    assert "FAILED one::rest" in done.stdout
    assert "A new figure: 2, where at most 1 is allowed." in done.stdout


# As any other test


@pytest.mark.parametrize(
    ("selection", "passed"),
    [
        (("-k", "chunks and short and mean_kl"), 0),
        (("-k", "batch and short and cosine"), 1),
        (("-m", "llama_bundle"), GATES + 1),
    ],
)
def test_tests_are_selected_as_others_are(project: Project, selection: tuple[str, str], passed: int) -> None:
    done = project.pytest("--llama-bundle=one", *selection)
    counted(done, deselected=GATES + 2 - passed, **({"passed": passed} if passed else {}))
    assert len(project.runs) == (passed > 0)


def test_several_bundles_are_verified_once_each(project: Project) -> None:
    counted(project.pytest("--llama-bundle=one", "--llama-bundle=two", "--llama-bundle=one"), passed=2 * GATES + 3)
    assert [Path(run.split()[0]).name for run in project.runs] == ["one", "two"]


def test_options_reach_the_verification(project: Project) -> None:
    given = ("--llama-reference=a.npz", "--llama-reference=b.npz", "--llama-backend=onnxruntime", "--llama-threads=2")
    project.pytest("--llama-bundle=one", *given, "--llama-max-kl=0.25", "-k", "rest")
    references = (Path("a.npz"), Path("b.npz"))
    assert project.runs == [
        f"{project.path / 'one'} backend=onnxruntime check_hashes=True max_kl=0.25 {references=} threads=2"
    ]


def test_workers_share_a_verification_where_they_are_told_to(project: Project) -> None:
    pytest.importorskip("xdist")
    counted(project.pytest("--llama-bundle=one", "-n", "2", "--dist", "loadfile"), passed=GATES + 2)
    assert len(project.runs) == 1
    counted(project.pytest("--llama-bundle=one", "-n", "2"), passed=GATES + 2)
    assert 1 <= len(project.runs) <= 2


def test_pytests_own_xml_has_the_sentences(project: Project) -> None:
    project.says = '{"broken": ["chunks", "short"]}'
    project.pytest("--llama-bundle=one", "--junitxml", "found.xml")
    root = ET.parse(project.path / "found.xml").getroot()
    (failure,) = root.iter("failure")
    assert failure.get("message", "").startswith("Largest difference of a logit: 0.25")
    assert len(list(root.iter("testcase"))) == GATES + 2


@pytest.mark.parametrize("option", ["--llama-bundle=one", "--llama-bundle=./one/"])
def test_nothing_in_a_bundle_is_taken_for_code(project: Project, option: str) -> None:
    for name in ("conftest.py", "test_one.py"):
        (project.path / "one" / name).write_text("raise SystemExit('a bundle is no code')\n")
    counted(project.pytest(option), passed=GATES + 2)


# Without the option


def test_without_the_option_nothing_of_ours_is_loaded(project: Project) -> None:
    (project.path / "test_mine.py").write_text(
        "import sys\n"
        "def test_loaded():\n"
        "    ours = sorted(name for name in sys.modules if name.startswith('llama_export'))\n"
        "    assert ours == ['llama_export', 'llama_export.pytest_plugin']\n"
        "    assert 'numpy' not in sys.modules and 'click' not in sys.modules\n"
    )
    counted(project.pytest(stub=False), passed=1)


# A real bundle


def test_a_real_bundle(project: Project, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(project.path / "cache"))
    done = project.pytest(f"--llama-bundle={built('int4')}", stub=False)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50
