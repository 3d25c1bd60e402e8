"""What every worker does with its engine: the same prompt ids, the same clock, one JSON line on stdout.

    WORKER.py speed MODEL --threads N --prompt IDS.json --new-tokens M
    WORKER.py start MODEL --threads N --text TEXT --new-tokens 1

`speed` times the prompt up to the first new token (prefill) and each token after it (decode), greedily, after a short
warm-up. `start` prints the text of the first tokens as soon as they are there, for the caller to time from outside.
Imports nothing beyond the standard library, since each worker has its engine's own environment.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """A loaded model."""

    def encode(self, text: str) -> Sequence[int]:
        """The token ids of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        ...

    def generate(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """Up to `count` greedy tokens after `prompt`, each as soon as it is known, with an empty cache at the start."""
        ...


Load = Callable[[Path, int, int], Engine]
"""Model folder or file, threads, positions that prompt and new tokens need -> the loaded model."""


def peak_rss() -> int:
    """The largest resident set of this process in bytes, file-mapped pages included (VmHWM of proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def speed(load: Load, model: Path, threads: int, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Load the model and time one prompt; raises RuntimeError when fewer than `count` tokens came."""
    start = time.perf_counter()
    engine = load(model, threads, len(prompt) + count)
    loaded = time.perf_counter()
    for _ in engine.generate(prompt[-1:-9:-1], 2):
        pass
    times = [time.perf_counter()]
    tokens = []
    for token in engine.generate(prompt, count):
        times.append(time.perf_counter())
        tokens.append(token)
    if len(tokens) < count:
        raise RuntimeError(f"generation ended after {len(tokens)} of {count} tokens; choose another prompt")
    return {
        "load_seconds": loaded - start,
        "prefill_tokens_per_second": len(prompt) / (times[1] - times[0]),
        "decode_tokens_per_second": (count - 1) / (times[-1] - times[1]),
        "peak_rss": peak_rss(),
        "tokens": tokens,
    }


def main(load: Load) -> None:
    """Be a worker for the engine that `load` opens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("speed", "start"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--new-tokens", type=int, required=True)
    job = parser.parse_args()
    if job.mode == "speed":
        prompt = json.loads(job.prompt.read_text())
        print(json.dumps(speed(load, job.model, job.threads, prompt, job.new_tokens)))
        return
    engine = load(job.model, job.threads, 256)
    tokens: list[int] = []
    for token in engine.generate(engine.encode(job.text), job.new_tokens):
        tokens.append(token)
        print(engine.decode(tokens), flush=True)
