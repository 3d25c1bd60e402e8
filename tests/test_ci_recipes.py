"""The recipes in docs/ci: their shell lines, as they stand there, run in bash on a tiny model.

Left out: the lines that install. Not run, as only the services have it: runners and images, caches, artifacts, Git LFS,
and the reading of JUnit files. That those parts name what the lines write is held here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_export
import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is what reads the recipes")
pytest.importorskip("torch", reason="the recipes build")

RECIPES = Path(llama_export.__file__).parent / "docs" / "ci"
JOBS = ("reference", "fresh", "committed")
INSTALL = "python -m pip install "


@dataclass(frozen=True)
class Recipe:
    """A recipe's shell lines by job, the variables at its top, and the paths that the service is told to keep."""

    scripts: Mapping[str, list[str]]
    variables: Mapping[str, str]
    kept: Mapping[str, list[str]]


def github() -> Recipe:
    found = read("github.yml")
    steps = {name: job["steps"] for name, job in found["jobs"].items()}
    return Recipe(
        {name: [step["run"] for step in own if "run" in step] for name, own in steps.items()},
        found["env"],
        {
            name: [step["with"]["path"] for step in own if "upload-artifact" in step.get("uses", "")]
            for name, own in steps.items()
        },
    )


def gitlab() -> Recipe:
    found = read("gitlab.yml")
    jobs = {name: job for name, job in found.items() if isinstance(job, dict) and "script" in job}
    return Recipe(
        {name: [*job["before_script"], *job["script"]] for name, job in jobs.items()},
        found["variables"],
        {name: [*job["artifacts"]["paths"], *reports(job)] for name, job in jobs.items()},
    )


def reports(job: Mapping[str, Any]) -> list[str]:
    return [path for path in [job["artifacts"].get("reports", {}).get("junit")] if path is not None]


def read(name: str) -> Any:
    return yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))


@pytest.fixture(params=[github, gitlab], ids=["github", "gitlab"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param()


@dataclass
class Checkout:
    """What a job begins with: a folder with the checkpoint, and the variables, which stand for the user's own."""

    path: Path
    variables: dict[str, str]

    def run(self, script: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """As both services do: in bash, ended by the first error, in a pipe too."""
        folder = Path(sys.executable).parent
        environment = {**os.environ, **self.variables, **changed, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def job(self, scripts: list[str]) -> None:
        for script in scripts:
            if not script.startswith(INSTALL):
                done = self.run(script)
                assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def checkout(recipe: Recipe, tmp_path: Path) -> Checkout:
    from support.hf_models import write_llama_folder

    path = tmp_path / "checkout"
    path.mkdir()
    write_llama_folder(path / "model")
    own = {"MODEL": "model", "MAX_KL": "1", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    own |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    return Checkout(path, {name: str(value) for name, value in {**recipe.variables, **own}.items()})


def test_every_job_installs_and_nothing_else_does(recipe: Recipe) -> None:
    assert tuple(recipe.scripts) == JOBS
    for scripts in recipe.scripts.values():
        assert scripts[0].startswith(INSTALL)
        assert sum("install" in script for script in scripts) == 1


def test_lines_take_all_that_changes_from_variables(recipe: Recipe) -> None:
    """So they run here as they stand there; `${{ }}` would be the service's own."""
    for script in (script for scripts in recipe.scripts.values() for script in scripts):
        assert "${{" not in script
        assert not any(str(value) in script for name, value in recipe.variables.items() if name != "TARGET")


def test_the_lines_run_in_order_and_notice_a_fault(recipe: Recipe, checkout: Checkout) -> None:
    own, path = checkout.variables, checkout.path
    checkout.job(recipe.scripts["reference"])
    assert (path / own["REFERENCE"]).stat().st_size > 1000

    checkout.job(recipe.scripts["fresh"])
    made = {"verdict.json", "verify.xml", "verify.html"}
    assert made <= {file.name for file in (path / "reports").iterdir()}
    verdict = json.loads((path / "reports/verdict.json").read_text())
    assert verdict["passed"]
    assert {"weights", "full", "cost"} <= {check["id"] for check in verdict["runs"][0]["checks"]}
    suites = ET.parse(path / "reports/verify.xml").getroot()
    assert (int(suites.get("tests", "0")) > 50, suites.get("failures")) == (True, "0")

    manifest = path / own["BUNDLE"] / "manifest.json"
    before = manifest.stat().st_mtime_ns
    if any(script.startswith("test -f") for script in recipe.scripts["fresh"]):  # GitHub leaves its step out
        checkout.job(recipe.scripts["fresh"])
        assert manifest.stat().st_mtime_ns == before

    shutil.copytree(path / own["BUNDLE"], path / own["COMMITTED"])
    checkout.job(recipe.scripts["committed"])
    tests = ET.parse(path / "reports/pytest.xml").getroot()
    assert len(list(tests.iter("testcase"))) > 50

    for job, files in recipe.kept.items():
        for file in files:
            name = file.replace("${{ env.REFERENCE }}", own["REFERENCE"]).replace("$REFERENCE", own["REFERENCE"])
            assert (path / name).exists(), f"{job} keeps {file}"
    summary = Path(own["GITHUB_STEP_SUMMARY"])
    assert not summary.exists() or "\npassed\n" in summary.read_text()
    notice_a_fault(recipe, checkout)


def notice_a_fault(recipe: Recipe, checkout: Checkout) -> None:
    """A changed byte in the weights fails both jobs, which leave their reports all the same."""
    own, path = checkout.variables, checkout.path
    with (path / own["COMMITTED"] / "model.onnx.data").open("r+b") as file:
        file.seek(64)
        file.write(b"\x01\x02\x03\x04")
    verify = next(script for script in recipe.scripts["fresh"] if "llama-export verify" in script)
    done = checkout.run(verify, BUNDLE=own["COMMITTED"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: Files: " in done.stdout
    assert int(ET.parse(path / "reports/verify.xml").getroot().get("failures", "0")) >= 1
    done = checkout.run(recipe.scripts["committed"][-1])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "::files[different]" in done.stdout


def test_what_was_not_run_is_told() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8").partition("## What was tried")[2]
    for part in ("runners and images", "caches", "artifacts", "Git LFS", "JUnit"):
        assert part in text
