"""Builds one layer of a model as wide as Llama 3.1 405B, and tells how much memory that takes.

    python benchmarks/wide_layer.py [--work FOLDER] [--context 4096] [--limit-gb 2.0] [--json FILE]

A build's memory depends on the width of a model and not on its depth: so one decoder layer of the largest one, between
its embedding and its head (hidden 16384, FFN 53248, 128 heads, 8 KV heads, 128256 tokens, untied), 14.8 GB of random
bf16 in several files, stands for all 126. It is built for the CPU in int4 without a reference, in a process of its own.
Needs 25 GB of free disk, and removes all that it wrote, also when it is interrupted. Ends with status 1 when the peak
is above the limit.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from llama_export.export.published import published_configs

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import checkpoints, export, report
else:
    import checkpoints
    import report

    import export

MODEL = "llama-3.1-405b"
NEEDED_BYTES = 25_000_000_000
SHARD_BYTES = 4_000_000_000


def one_layer(name: str = MODEL) -> checkpoints.Config:
    """The config.json of a published model with one layer instead of all."""
    return {**published_configs()[name], "num_hidden_layers": 1}


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` that is gone afterwards, whether the work ends, fails, or is told to end by a signal."""
    parent.mkdir(parents=True, exist_ok=True)
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with tempfile.TemporaryDirectory(prefix="wide-layer-", dir=parent) as name:
            yield Path(name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def measured(config: checkpoints.Config, work: Path, context: int, seed: int, shard_bytes: int) -> dict[str, Any]:
    """Write a random checkpoint of `config` below `work`, build it, remove both; sizes in bytes.

    Raises OSError when the disk is too full, RuntimeError with the end of the build's output when that fails.
    """
    with own_folder(work) as folder:
        began = time.perf_counter()
        checkpoint = folder / "checkpoint"
        checkpoints.write_checkpoint(config, checkpoint, seed, None, shard_bytes)
        files = sorted(checkpoint.glob("*.safetensors"))
        print(f"{len(files)} files of weights made in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        tool = export.ours(checkpoint, "int4", reference=False)
        tool = replace(tool, command=(*tool.command, "--context", str(context)))
        size = sum(file.stat().st_size for file in files)
        done = export.run(tool, folder)
        return {
            "config": config,
            "context": context,
            "files": len(files),
            "checkpoint_bytes": size,
            "output_bytes": done.output_bytes,
            **asdict(done.measurement),
            "read_bytes_per_second": round(size / done.measurement.seconds),
        }


def table(found: dict[str, Any]) -> str:
    header = ("checkpoint, GB", "files", "seconds", "read, GB/s", "peak RSS, MB", "of it anonymous, MB", "output, MB")
    cells = [
        f"{found['checkpoint_bytes'] / 1e9:.1f}",
        str(found["files"]),
        f"{found['seconds']:.1f}",
        f"{found['read_bytes_per_second'] / 1e9:.2f}",
        *(f"{found[key] / 1e6:,.0f}" for key in ("peak_rss", "peak_anon", "output_bytes")),
    ]
    return report.table(header, [cells])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where 25 GB lie meanwhile")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-gb", type=float, default=2.0, help="largest peak RSS that passes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        arguments.work.mkdir(parents=True, exist_ok=True)
        export.check_space(arguments.work, NEEDED_BYTES)
        found = measured(one_layer(), arguments.work, arguments.context, arguments.seed, SHARD_BYTES)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"wide_layer.py: {error}", file=sys.stderr)
        return 1
    report.write({"machine": report.machine(), **found}, table(found), arguments.json, None)
    if found["peak_rss"] > arguments.limit_gb * 1e9:
        print(f"wide_layer.py: {found['peak_rss'] / 1e9:.2f} GB are above {arguments.limit_gb} GB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
