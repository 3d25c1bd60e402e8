"""Measures what a model's depth costs before its weights are read: tracing one layer, stamping it, lowering the graph.

    python benchmarks/depth.py [MODEL...] [--context 4096] [--rounds 3] [--json FILE] [--markdown FILE]

MODEL is a published size (all depths are covered when none is named). Each runs in a process of its own, in turns;
medians are reported, seconds without importing PyTorch, peak memory with it. No weights are needed or made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_export.export.published import published, published_configs

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import report
    from .measure import measure
else:
    import report
    from measure import measure

T = TypeVar("T")

STAGES = ("trace", "fuse", "stamp", "lower", "lay out")


def one(name: str, context: int) -> dict[str, Any]:
    """Seconds of each stage for one published model in `ort` and int4, and what came out."""
    from llama_export.export.config import (  # noqa: PLC0415 (seconds, not to be measured)
        expected_tensors,
        transformers_config,
    )
    from llama_export.export.rotary import rotary_tables  # noqa: PLC0415
    from llama_export.export.trace import trace  # noqa: PLC0415
    from llama_export.export.write import lay_out  # noqa: PLC0415
    from llama_export.optimize.formats import BF16  # noqa: PLC0415
    from llama_export.optimize.fuse import fuse  # noqa: PLC0415
    from llama_export.optimize.ort import OrtOptions, lower  # noqa: PLC0415
    from llama_export.optimize.plan import plan_formats  # noqa: PLC0415
    from llama_export.optimize.stamp import stamp  # noqa: PLC0415
    from llama_export.optimize.tensors import Float32, SourceTensor  # noqa: PLC0415

    def unread(start: int, stop: int) -> Float32:
        raise AssertionError(f"rows {start} to {stop} of a weight were read")

    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        seconds[stage] = time.perf_counter() - began
        return result

    given = published_configs()[name]
    tensors = {key: SourceTensor(key, shape, "BF16", BF16, unread) for key, shape in expected_tensors(given).items()}
    formats, config = plan_formats(tensors, "int4"), transformers_config(given)
    model = timed("trace", lambda: trace(config, context=context))
    timed("fuse", lambda: fuse(model))
    timed("stamp", lambda: stamp(model, config.num_hidden_layers))
    timed("lower", lambda: lower(model, OrtOptions(formats, rotary_tables(config, context), 4)))
    layout = timed("lay out", lambda: lay_out(model))
    return {"seconds": seconds, "nodes": len(list(model.graph)), "data_bytes": layout.size}


def depths() -> list[str]:
    """The smallest published model of every depth."""
    found: dict[int, str] = {}
    for name, model in sorted(published().items(), key=lambda entry: entry[1].parameters):
        found.setdefault(model.config["num_hidden_layers"], name)
    return [found[layers] for layers in sorted(found)]


def run(name: str, context: int) -> dict[str, Any]:
    """Measure one model in a new process. Raises RuntimeError with what it printed when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log.txt"
        command = [sys.executable, __file__, name, "--context", str(context), "--here", "--json", str(result)]
        with log.open("w") as output:
            done = measure(command, output=output)
        if done.status:
            raise RuntimeError(f"{name} ended with status {done.status}:\n{log.read_text()[-2000:]}")
        return {**json.loads(result.read_text()), "peak_rss": done.peak_rss}


def row(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians of one model."""
    seconds = {stage: statistics.median(run["seconds"][stage] for run in runs) for stage in STAGES}
    return {
        "model": name,
        "layers": published()[name].config["num_hidden_layers"],
        "nodes": runs[-1]["nodes"],
        "data_bytes": runs[-1]["data_bytes"],
        "seconds": seconds,
        "total": sum(seconds.values()),
        "peak_rss": statistics.median(run["peak_rss"] for run in runs),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    header = ("model", "layers", "nodes", *(f"{stage}, s" for stage in STAGES), "together, s", "peak RSS, MB")
    return report.table(
        header,
        [
            [
                row["model"],
                str(row["layers"]),
                f"{row['nodes']:,}",
                *(f"{row['seconds'][stage]:.2f}" for stage in STAGES),
                f"{row['total']:.1f}",
                f"{row['peak_rss'] / 1e6:,.0f}",
            ]
            for row in rows
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", choices=[[], *published()])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure the one MODEL in this process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    models: list[str] = arguments.models or depths()
    if arguments.here:
        arguments.json.write_text(json.dumps(one(models[0], arguments.context)), encoding="utf-8")
        return 0
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    try:
        for number in range(arguments.rounds):
            for name in models:
                print(f"round {number + 1}: {name}", file=sys.stderr)
                runs[name].append(run(name, arguments.context))
    except (OSError, RuntimeError) as error:
        print(f"depth.py: {error}", file=sys.stderr)
        return 1
    rows = [row(name, found) for name, found in runs.items()]
    result = {"machine": report.machine(), "context": arguments.context, "models": rows}
    report.write(result, markdown(rows), arguments.json, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
