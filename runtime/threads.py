"""How many threads to compute with: one for each physical core that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError

MAX_THREADS = 1024

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def choose_threads(asked: int | None) -> int:
    """Return `asked`, or the physical cores for None; UsageError when it is not from 1 to MAX_THREADS."""
    if asked is None:
        return physical_cores()
    if not 1 <= asked <= MAX_THREADS:
        raise UsageError(f"threads must be from 1 to {MAX_THREADS}, not {asked}.")
    return asked


def physical_cores() -> int:
    """Return the number of physical cores, at least 1: hyper-threads share arithmetic units and only contend.

    Linux: the cores of the CPUs in this process' affinity, read from the kernel's topology, no more than its control
    group's quota (as in `docker run --cpus 2`). Elsewhere, or where the topology is not told: the logical CPUs.
    """
    cores = {_core_of(index) for index in usable_cpus()}
    return max(1, min(len(cores), _quota_cpus() or len(cores)))


def usable_cpus() -> set[int]:
    """Return the logical CPUs, hyper-threads each, that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core_of(index: int) -> str:
    """Return a name for the core of one CPU: the list of CPUs that share it, or its own index when that is not told."""
    try:
        return (_CPUS / f"cpu{index}" / "topology" / "thread_siblings_list").read_text("ascii").strip() or str(index)
    except OSError:
        return str(index)


def _quota_cpus() -> int | None:
    """Return the whole CPUs that a cgroup v2 quota grants, rounded up, or None where there is no quota."""
    try:
        granted, period = _QUOTA.read_text("ascii").split()
        return None if granted == "max" else max(1, -(-int(granted) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None
