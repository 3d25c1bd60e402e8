"""Physical cores from the kernel's topology, and versions compared as numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime import threads
from llama_export.runtime.requirements import parse_version, require, require_python
from llama_export.runtime.threads import MAX_THREADS, choose_threads, physical_cores, usable_cpus


def machine(folder: Path, siblings: list[str]) -> None:
    for index, shared in enumerate(siblings):
        topology = folder / f"cpu{index}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{shared}\n")


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No topology and no quota, unless the test writes them."""
    monkeypatch.setattr(threads, "usable_cpus", lambda: set(range(8)))
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")


def test_hyper_threads_count_once(tmp_path: Path) -> None:
    machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)
    assert physical_cores() == 4


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("?", 4), ("1 0", 4)],
)
def test_a_containers_quota_counts(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)
    assert physical_cores() == cores


def test_only_cpus_that_may_be_used_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, ["0-1", "0-1", "2-3", "2-3"])
    monkeypatch.setattr(threads, "usable_cpus", lambda: {0, 1, 2})
    assert physical_cores() == 2
    monkeypatch.setattr(threads, "usable_cpus", lambda: {1})
    assert physical_cores() == 1


def test_without_a_topology_every_cpu_counts() -> None:
    assert physical_cores() == 8


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= physical_cores() <= len(usable_cpus()) <= (os.cpu_count() or 1)


def test_the_number_asked_for_is_taken_within_reason() -> None:
    assert [choose_threads(asked) for asked in (None, 1, MAX_THREADS)] == [8, 1, MAX_THREADS]
    for asked in (0, -1, MAX_THREADS + 1):
        with pytest.raises(UsageError, match=f"threads must be from 1 to 1024, not {asked}"):
            choose_threads(asked)


@pytest.mark.parametrize(
    ("older", "newer"), [("1.9.0", "1.23.2"), ("1.23.2", "1.23.10"), ("1.23", "1.23.1"), ("1.22.9+cu12", "1.23.0.dev3")]
)
def test_versions_compare_as_numbers(older: str, newer: str) -> None:
    assert parse_version(older) < parse_version(newer)
    require("x", newer, older, "")
    with pytest.raises(LlamaExportError, match=r"needs x .* or newer, but here is .*; do so"):
        require("x", older, newer.split(".dev", maxsplit=1)[0], "do so")


def test_equal_versions_of_unequal_length() -> None:
    assert parse_version("1.23") == parse_version("1.23.0")
    require("x", "anything", None, "")


def test_python() -> None:
    require_python(None)
    require_python("3.10")
    with pytest.raises(LlamaExportError, match=r"needs Python 4\.0 or newer"):
        require_python("4.0")
