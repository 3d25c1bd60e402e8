"""How many threads to compute with: one for each physical core that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores(*, cpus: Path = _CPUS, quota: Path = _QUOTA) -> int:
    """Return the number of physical cores, at least 1: hyper-threads share arithmetic units and only contend.

    Linux: the cores of the CPUs in this process' affinity, read from the kernel's topology, no more than its control
    group's quota (as in `docker run --cpus 2`). Elsewhere, or where the topology is not told: the logical CPUs.
    """
    allowed = _allowed_cpus()
    cores = {_core_of(cpus / f"cpu{index}" / "topology", index) for index in allowed}
    return max(1, min(len(cores), _quota_cpus(quota) or len(cores)))


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core_of(topology: Path, index: int) -> str:
    """Return a name for the core of one CPU: the list of CPUs that share it, or its own index when that is not told."""
    try:
        return (topology / "thread_siblings_list").read_text().strip() or str(index)
    except OSError:
        return str(index)


def _quota_cpus(path: Path) -> int | None:
    """Return the whole CPUs that a cgroup v2 quota grants, rounded up, or None where there is no quota."""
    try:
        granted, period = path.read_text().split()
        return None if granted == "max" else max(1, -(-int(granted) // int(period)))
    except (OSError, ValueError):
        return None
