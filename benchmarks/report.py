"""What the benchmarks write: a table for people, JSON for machines, and on what they were measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The machine that this runs on: processor, cores that may be used, memory in bytes, kernel."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": model[0].partition(":")[2].strip() if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


def version(python: str, package: str) -> str:
    """The version of a distribution in the environment of an interpreter.

    Raises ValueError when the interpreter or the distribution is missing.
    """
    code = "import sys, importlib.metadata; print(importlib.metadata.version(sys.argv[1]))"
    try:
        result = subprocess.run([python, "-c", code, package], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise ValueError(f"{python} is no Python interpreter") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{python} has no {package} installed") from error
    return result.stdout.strip()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column holds names, the others numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def write(result: dict[str, Any], markdown: str, json_file: Path | None, markdown_file: Path | None) -> None:
    """Print the table; write it and the whole result to the files that are named."""
    print(markdown)
    if markdown_file:
        markdown_file.write_text(markdown + "\n", encoding="utf-8")
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
