"""A build that is killed, at any time, leaves the destination as it was; the next one clears up and works."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import call, start
from support.hf_models import write_llama_folder

Built = Callable[[str], Path]

MOMENTS = {"Opening": 2.0, "Tracing": 0.8, "Recording": 0.1}
"""Stages whose end a build tells on stderr, and the most seconds after it at which it is killed: while it traces, while
it writes or computes the reference, while it hashes the files or puts the bundle in its place.
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))


def kill_after(child: subprocess.Popen[str], stage: str, seconds: float) -> bool:
    """Kill the child that long after it has told of a stage's end; return whether it was still alive."""
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith(stage):
            break
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    return child.returncode == -signal.SIGKILL


def version(bundle: Path) -> bytes | None:
    """The hashes of all its files, or None where there is nothing; fails where they are not what the manifest says."""
    if not bundle.exists():
        return None
    result = call("verify", bundle, "--quiet")
    assert result.exit_code == 0, result.output
    return (bundle / "manifest.json").read_bytes()


@pytest.mark.parametrize("replaces", [False, True], ids=["first", "replacement"])
def test_sigkill(replaces: bool, built: Built, tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama", seed=5, layers=4, hidden=256, ffn=512, vocab=2000)
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ("build", "-m", folder, "-t", "cpu", "--force", "--quiet")
    assert call(*options, "-o", whole).exit_code == 0
    if replaces:
        shutil.copytree(built("int4"), out)
    before, new, chance, killed = version(out), version(whole), random.Random(replaces), 0
    for stage, most in MOMENTS.items():
        with start(*options[:-1], "-o", out, cwd=tmp_path) as child:
            killed += kill_after(child, stage, chance.uniform(0, most))
        assert version(out) in ((before,) if stage == "Opening" else (before, new))
        assert len([path for path in tmp_path.iterdir() if ".partial-" in path.name]) <= 1
    assert killed >= 2  # or nothing was proven
    result = call(*options, "-o", out)
    assert result.exit_code == 0, result.output
    assert version(out) == new
    assert {path.name for path in tmp_path.iterdir()} - {".cache"} == {"llama", "out", "whole"}


def test_ctrl_c(tmp_path: Path) -> None:
    """One line, the shell's exit code, and nothing left."""
    folder = write_llama_folder(tmp_path / "llama")
    with start("build", "-m", folder, "-t", "cpu", "-o", tmp_path / "out", cwd=tmp_path) as child:
        assert child.stderr is not None
        assert child.stderr.readline().startswith("Opening")
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=60)
    assert (child.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} - {".cache"} == {"llama"}
