"""Runs a command and reports its seconds and its peak memory, children included.

    python benchmarks/measure.py [--json FILE] -- COMMAND [ARGUMENT...]

Every 20 ms VmRSS and RssAnon of the process and all its descendants are summed (proc(5), Linux); the largest sums are
reported. VmRSS counts resident pages of mapped files too; RssAnon leaves them out. A page that two processes share
counts twice. The exit status is that of the command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

INTERVAL = 0.02


@dataclass(frozen=True)
class Measurement:
    """One run of a command: exit status, wall seconds, largest sums of VmRSS and of RssAnon in bytes."""

    status: int
    seconds: float
    peak_rss: int
    peak_anon: int


def memory(pid: int) -> tuple[int, int]:
    """VmRSS and RssAnon of one process in bytes; zeros for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS:", "RssAnon:"))}
    return kilobytes.get("VmRSS", 0) << 10, kilobytes.get("RssAnon", 0) << 10


def family(pid: int) -> set[int]:
    """The process and its descendants, from the kernel's list of each thread's children (CONFIG_PROC_CHILDREN)."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        found.add(member := waiting.pop())
        try:
            for task in Path(f"/proc/{member}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended between two looks
    return found


def measure(
    command: Sequence[str],
    *,
    output: IO[str] | int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Measurement:
    """Run `command` to its end and sample its memory; `output` takes what it prints, both streams.

    Raises OSError when the command cannot be started or the kernel does not list children.
    """
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        raise OSError("this kernel has no /proc/PID/task/TID/children, which memory is summed by")
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    rss = anon = 0
    try:
        while process.poll() is None:
            samples = [memory(member) for member in family(process.pid)]
            rss = max(rss, sum(sample[0] for sample in samples))
            anon = max(anon, sum(sample[1] for sample in samples))
            time.sleep(INTERVAL)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return Measurement(process.returncode, time.perf_counter() - start, rss, anon)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file instead of stderr")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    try:
        result = measure(arguments.command)
    except OSError as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 1
    text = json.dumps(asdict(result))
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text, file=sys.stderr)
    return result.status if result.status >= 0 else 128 - result.status


if __name__ == "__main__":
    sys.exit(main())
