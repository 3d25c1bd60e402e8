"""Measures what it takes to build a bundle from a checkpoint: seconds and peak memory, ours beside the peers'.

    python benchmarks/export.py CHECKPOINT [--genai PYTHON] [--optimum PYTHON] [--rounds 3] [--json FILE]

CHECKPOINT is a Hugging Face folder, for example one made by checkpoints.py. A peer is measured when the interpreter of
an environment that has it is named. Each tool runs in a process of its own and at its defaults, int4 against int4 and
fp32 against fp32; the tools take turns, and medians over the rounds are reported. Outputs are removed at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import report
    from .measure import Measurement, measure
else:
    import report
    from measure import Measurement, measure


@dataclass(frozen=True)
class Tool:
    """One way to export: `command` with OUTPUT and SCRATCH in place of two folders, of `package` in `python`.

    note: what it does that the others do not.
    """

    name: str
    precision: str
    python: str
    package: str
    command: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One export: how it went, and the bytes that it wrote."""

    measurement: Measurement
    output_bytes: int


def ours(checkpoint: Path, precision: str, *, reference: bool) -> Tool:
    command = ("-m", "llama_export", "build", "-m", str(checkpoint), "-t", "cpu", "-o", "OUTPUT")
    options = ("--precision", precision, *(() if reference else ("--no-reference",)))
    note = ", with PyTorch's reference" if reference else ""
    return Tool("llama-export", precision, sys.executable, "llama-export", command + options, note)


def genai(checkpoint: Path, python: str) -> Tool:
    folders = ("-m", str(checkpoint), "-i", str(checkpoint), "-o", "OUTPUT", "-c", "SCRATCH")
    command = ("-m", "onnxruntime_genai.models.builder", *folders, "-p", "int4", "-e", "cpu")
    return Tool("onnxruntime-genai", "int4", python, "onnxruntime-genai", command)


def optimum(checkpoint: Path, python: str) -> Tool:
    task = ("--task", "text-generation-with-past", "--dtype", "fp32")
    command = ("-m", "optimum.exporters.onnx", "--model", str(checkpoint), *task, "OUTPUT")
    return Tool("optimum-onnx", "fp32", python, "optimum-onnx", command)


def tools(checkpoint: Path, genai_python: str | None, optimum_python: str | None) -> list[Tool]:
    """What is measured, in turn: ours in each precision that a peer is measured in, int4 in any case."""
    result = [ours(checkpoint, "int4", reference=False), ours(checkpoint, "int4", reference=True)]
    if genai_python:
        result.insert(1, genai(checkpoint, genai_python))
    if optimum_python:
        result += [ours(checkpoint, "fp32", reference=False), optimum(checkpoint, optimum_python)]
    return result


def run(tool: Tool, work: Path) -> Run:
    """Export once inside `work` and remove what came of it.

    Raises RuntimeError with the end of the tool's output when it fails.
    """
    with tempfile.TemporaryDirectory(dir=work) as name:
        folders = {"OUTPUT": str(Path(name) / "output"), "SCRATCH": str(Path(name) / "scratch")}
        log = Path(name) / "log.txt"
        with log.open("w") as output:
            measurement = measure(
                [tool.python, *(folders.get(word, word) for word in tool.command)],
                output=output,
                environment={**os.environ, "HF_HUB_OFFLINE": "1"},
                folder=Path(name),
            )
        if measurement.status:
            raise RuntimeError(f"{tool.name} ended with status {measurement.status}:\n{log.read_text()[-2000:]}")
        files = (path for path in Path(folders["OUTPUT"]).rglob("*") if path.is_file())
        return Run(measurement, sum(path.stat().st_size for path in files))


def warm(checkpoint: Path) -> int:
    """Read every file of the checkpoint, so that all tools find it in the page cache; returns the bytes."""
    total = 0
    for path in checkpoint.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                while piece := file.read(1 << 24):
                    total += len(piece)
    return total


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError when the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free >> 20} MiB free, but needs {needed >> 20} MiB; choose another --work")


def row(tool: Tool, runs: Sequence[Run]) -> dict[str, Any]:
    """The medians of one tool, with every run beside them."""
    return {
        "tool": tool.name,
        "version": report.version(tool.python, tool.package),
        "note": tool.note,
        "precision": tool.precision,
        "seconds": statistics.median(run.measurement.seconds for run in runs),
        "peak_rss": statistics.median(run.measurement.peak_rss for run in runs),
        "peak_anon": statistics.median(run.measurement.peak_anon for run in runs),
        "output_bytes": runs[-1].output_bytes,
        "runs": [asdict(run.measurement) for run in runs],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    header = ("tool", "weights", "seconds", "peak RSS, MB", "of it anonymous, MB", "output, MB")
    return report.table(
        header,
        [
            [
                f"{row['tool']} {row['version']}{row['note']}",
                row["precision"],
                f"{row['seconds']:.1f}",
                *(f"{row[key] / 1e6:,.0f}" for key in ("peak_rss", "peak_anon", "output_bytes")),
            ]
            for row in rows
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--genai", metavar="PYTHON", help="interpreter that has onnxruntime-genai and torch")
    parser.add_argument("--optimum", metavar="PYTHON", help="interpreter that has optimum-onnx")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where outputs lie meanwhile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint.resolve()
    try:
        todo = tools(checkpoint, arguments.genai, arguments.optimum)
        for tool in todo:
            report.version(tool.python, tool.package)
        size = warm(checkpoint)
        arguments.work.mkdir(parents=True, exist_ok=True)
        check_space(arguments.work, 5 * size)  # fp32 doubles bf16, and peers write twice
        runs: dict[Tool, list[Run]] = {tool: [] for tool in todo}
        for number in range(arguments.rounds):
            for tool in todo:
                print(f"round {number + 1}: {tool.name}, {tool.precision}{tool.note}", file=sys.stderr)
                runs[tool].append(run(tool, arguments.work))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    rows = [row(tool, found) for tool, found in runs.items()]
    result = {"machine": report.machine(), "checkpoint": checkpoint.name, "checkpoint_bytes": size, "tools": rows}
    report.write(result, markdown(rows), arguments.json, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
