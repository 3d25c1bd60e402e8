"""Measures how fast a bundle runs, ours beside the peers: prefill, decoding, and the time to the first token.

    python benchmarks/run.py BUNDLE [--genai PYTHON] [--genai-model FOLDER] [--llamacpp PYTHON] [--gguf FILE]
                             [--transformers PYTHON] [--checkpoint FOLDER] [--threads N] [--rounds 5] [--json FILE]

Every engine runs in a process of its own with the same number of threads and the same prompt ids; the engines take
turns, and medians over the rounds are reported. onnxruntime-genai runs its own export (--genai-model) and our bundle.
The time to the first token is that from starting the process to the first byte on its stdout, with a text for a prompt;
of llama-export it is that of the command `llama-export run`. Memory bandwidth is measured in the same run
(bandwidth.py): the bytes of weights that a token reads, times tokens a second, over it, is the share of what memory
allows. A small model may stay in the processor's cache and pass 100 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_export.runtime.onnx_file import external_initializers

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import report
    from .bandwidth import read_bandwidth
else:
    import report
    from bandwidth import read_bandwidth

WORKERS = Path(__file__).parent / "workers"
TEXT = "The capital of France is a city that"


@dataclass(frozen=True)
class Side:
    """One engine with one model: `worker` runs it in the environment of `python`, which has `package`.

    start: the command that is timed to its first byte, with MODEL, TEXT and THREADS in place of those; none leaves the
    worker to do it.
    """

    name: str
    python: str
    package: str
    worker: str
    model: Path
    start: tuple[str, ...] = ()


def sides(arguments: argparse.Namespace) -> list[Side]:
    """The engines that were asked for, ours first.

    Raises ValueError when a peer is named without its model.
    """
    bundle = arguments.bundle.resolve()
    command = ("-m", "llama_export", "run", "MODEL", "TEXT", "--max-new-tokens", "1", "--threads", "THREADS")
    result = [Side("llama-export", sys.executable, "llama-export", "ours.py", bundle, command)]
    if arguments.genai:
        peer = (arguments.genai, "onnxruntime-genai", "genai.py")
        if arguments.genai_model:
            result.append(Side("onnxruntime-genai, its own export", *peer, arguments.genai_model.resolve()))
        result.append(Side("onnxruntime-genai, our bundle", *peer, bundle))
    if arguments.llamacpp:
        file = needed(arguments.gguf, "--llamacpp needs --gguf FILE").resolve()
        result.append(Side("llama.cpp", arguments.llamacpp, "llama-cpp-python", "llamacpp.py", file))
    if arguments.transformers:
        folder = needed(arguments.checkpoint, "--transformers needs --checkpoint FOLDER").resolve()
        result.append(Side("transformers", arguments.transformers, "transformers", "torch_transformers.py", folder))
    return result


def needed(path: Path | None, message: str) -> Path:
    if path is None:
        raise ValueError(message)
    return path


def speed(side: Side, threads: int, prompt: Path, count: int) -> dict[str, Any]:
    """Run the worker of one side once.

    Raises RuntimeError with the end of what it said when it fails.
    """
    options = ("--threads", str(threads), "--prompt", str(prompt), "--new-tokens", str(count))
    command = [side.python, str(WORKERS / side.worker), "speed", str(side.model), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if result.returncode:
        raise RuntimeError(f"{side.name} ended with status {result.returncode}:\n{result.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return measured


def seconds_to_first_token(side: Side, threads: int) -> float:
    """Seconds from starting a process to the first byte of its answer to TEXT.

    Raises RuntimeError when there is no answer.
    """
    worker = (
        str(WORKERS / side.worker),
        "start",
        "MODEL",
        "--text",
        "TEXT",
        "--threads",
        "THREADS",
        "--new-tokens",
        "1",
    )
    words = {"MODEL": str(side.model), "TEXT": TEXT, "THREADS": str(threads)}
    command = [side.python, *(words.get(word, word) for word in side.start or worker)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if not first or process.returncode:
        raise RuntimeError(f"{side.name} gave no answer (status {process.returncode}):\n{errors.decode()[-2000:]}")
    return seconds


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def prompt_ids(count: int, vocab: int) -> list[int]:
    """Token ids spread over the first half of the vocabulary, which holds ordinary text; always the same."""
    return [100 + (7919 * position) % (vocab // 2 - 100) for position in range(count)]


def bytes_per_token(model: Path, *, tied: bool) -> int:
    """Bytes of the weights that one token reads, from the model's file or folder.

    Of an ONNX model the rotary tables do not count, nor an embedding that is not the head too (`tied`): a token reads
    one row of either.
    """
    graph, data = model / "model.onnx", model / "model.onnx.data"
    if model.is_file():
        return model.stat().st_size
    if not graph.is_file():
        return sum(path.stat().st_size for path in model.glob("*.safetensors"))
    beside = ("cos_cache", "sin_cache") if tied else ("cos_cache", "sin_cache", "embed_tokens")
    stored = external_initializers(graph.read_bytes(), data.stat().st_size).values()
    # by offset, since a tied embedding and head are two names for the same bytes
    read = {tensor.offset: tensor.size for tensor in stored if not any(word in tensor.name for word in beside)}
    return sum(read.values())


def row(
    side: Side, speeds: Sequence[dict[str, Any]], starts: Sequence[float], size: int, bandwidth: float
) -> dict[str, Any]:
    """The medians of one side, with every round beside them; `size`: bytes that a token reads."""
    names = ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss")
    medians = {name: statistics.median(speed[name] for speed in speeds) for name in names}
    return {
        "engine": side.name,
        "version": report.version(side.python, side.package),
        **medians,
        "start_to_first_token_seconds": statistics.median(starts),
        "bytes_per_token": size,
        "bandwidth_share": size * medians["decode_tokens_per_second"] / bandwidth,
        "rounds": [{name: speed[name] for name in names} for speed in speeds],
        "starts": list(starts),
        "tokens": speeds[-1]["tokens"],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        "engine",
        "prefill, tokens/s",
        "decode, tokens/s",
        "of bandwidth",
        "start to first token, s",
        "peak RSS, MB",
    )
    return report.table(
        header,
        [
            [
                f"{row['engine']} {row['version']}",
                f"{row['prefill_tokens_per_second']:.1f}",
                f"{row['decode_tokens_per_second']:.2f}",
                f"{row['bandwidth_share']:.0%}",
                f"{row['start_to_first_token_seconds']:.2f}",
                f"{row['peak_rss'] / 1e6:,.0f}",
            ]
            for row in rows
        ],
    )


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every side in turn, `rounds` times; returns the result that is written as JSON."""
    todo = sides(arguments)
    for side in todo:
        report.version(side.python, side.package)
    config = json.loads((arguments.bundle / "config.json").read_text(encoding="utf-8"))
    before = read_bandwidth(arguments.threads)
    speeds: dict[Side, list[dict[str, Any]]] = {side: [] for side in todo}
    starts: dict[Side, list[float]] = {side: [] for side in todo}
    with tempfile.TemporaryDirectory() as work:
        prompt = Path(work) / "prompt.json"
        prompt.write_text(json.dumps(prompt_ids(arguments.prompt_tokens, config["vocab_size"])))
        for number in range(arguments.rounds):
            for side in todo:
                print(f"round {number + 1}: {side.name}", file=sys.stderr)
                speeds[side].append(speed(side, arguments.threads, prompt, arguments.new_tokens))
                starts[side].append(seconds_to_first_token(side, arguments.threads))
    tied = bool(config.get("tie_word_embeddings", False))
    bandwidth = max(before, read_bandwidth(arguments.threads))
    return {
        "machine": report.machine(),
        "threads": arguments.threads,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "read_bandwidth": bandwidth,
        "engines": [
            row(side, speeds[side], starts[side], bytes_per_token(side.model, tied=tied), bandwidth) for side in todo
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--genai", metavar="PYTHON", help="interpreter that has onnxruntime-genai")
    parser.add_argument("--genai-model", type=Path, help="what its own builder made of the same checkpoint")
    parser.add_argument("--llamacpp", metavar="PYTHON", help="interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the same checkpoint as GGUF (gguf_export.py)")
    parser.add_argument("--transformers", metavar="PYTHON", help="interpreter that has transformers and torch")
    parser.add_argument("--checkpoint", type=Path, help="the Hugging Face folder, for transformers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    try:
        result = compare(arguments)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    heading = (
        f"{arguments.prompt_tokens} prompt tokens, {arguments.new_tokens} new ones, {arguments.threads} threads, "
        f"memory read at {result['read_bandwidth'] / 1e9:.1f} GB/s\n\n"
    )
    report.write(result, heading + markdown(result["engines"]), arguments.json, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
