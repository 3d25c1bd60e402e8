"""Measures bundles for CUDA on an NVIDIA GPU beside transformers on the same card, and proves that they agree.

    python benchmarks/gpu.py --work FOLDER --json FILE [--markdown FILE] [--models smollm2,llama-3.2-1b,llama-3.1-8b]
                             [--gguf SMOLLM2.gguf] [--precisions fp16,int8,int4] [--verify smollm2,llama-3.2-1b]
                             [--contexts 128,1024] [--prompt 512] [--new 64] [--rounds 5]
    python benchmarks/gpu.py --device cpu --models llama-tiny --work FOLDER --json FILE

Needs the extras `build` and `gpu`, and PyTorch with CUDA; nothing is downloaded. Checkpoints (random weights in the
published shapes, SmolLM2 from its GGUF file) and bundles stay in FOLDER for the next call. With a batch of one and in
turns, round by round: seconds of a prompt, and of greedy tokens behind texts of several lengths; medians are reported.
Engines that do not fit or do not work are reported with what they said. The JSON is written anew after every model, so
that a run cut short leaves what it had. `--device cpu` tries all of it without a GPU, with bundles for the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import torch  # before ONNX Runtime, which finds the CUDA libraries that PyTorch has loaded
except ImportError as error:
    sys.exit(f"gpu.py: {error}; install PyTorch with CUDA")

from llama_export.build_options import BuildOptions
from llama_export.errors import LlamaExportError
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime import open_bundle
from llama_export.runtime.proof.reports.table import lines as table_lines
from llama_export.runtime.proof.verify import verify

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import gpu_card, report
    from .checkpoints import SHAPES, write_checkpoint
    from .gpu_engines import Engine, Ours, Transformers, free
    from .hf_folder import write_folder
    from .run import bytes_per_token, prompt_ids
else:
    import gpu_card
    import report
    from checkpoints import SHAPES, write_checkpoint
    from gpu_engines import Engine, Ours, Transformers, free
    from hf_folder import write_folder
    from run import bytes_per_token, prompt_ids

SMOLLM2 = "smollm2"
EAGER = "transformers, eager"
COMPARED = 64
"""Tokens whose logits are compared with those of transformers."""


@dataclass(frozen=True)
class Plan:
    """What is measured of every engine."""

    device: str
    prompt: int
    contexts: tuple[int, ...]
    new: int
    rounds: int

    @property
    def positions(self) -> int:
        return max(self.prompt, COMPARED, *(context + self.new for context in self.contexts)) + 1


def checkpoint(name: str, work: Path, gguf: Path | None) -> Path:
    """The Hugging Face folder of a model, made unless it is there. Raises ValueError for an unknown name."""
    folder = work / "checkpoints" / name
    if folder.exists():
        return folder
    if name == SMOLLM2:
        if gguf is None:
            raise ValueError("smollm2 needs --gguf FILE, the GGUF file of SmolLM2-135M-Instruct")
        partial = work / f"{name}.partial"
        write_folder(gguf, partial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
        return folder
    if name not in SHAPES:
        raise ValueError(f"there is no model {name!r}, only {SMOLLM2}, {', '.join(SHAPES)}")
    write_checkpoint(SHAPES[name], folder, 0, None, 5_000_000_000)
    return folder


def bundle_of(model: Path, precision: str, work: Path, plan: Plan, *, reference: bool) -> Path:
    """The bundle for the device, built unless it is there."""
    kind = f"{plan.device}-{precision}-{plan.positions}{'-verified' if reference else ''}"
    folder = work / "bundles" / model.name / kind
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        options = BuildOptions(
            str(model), plan.device, folder, precision, context=plan.positions, reference=reference, force=True
        )
        build(options, Silent())
    return folder


def verdict(folder: Path) -> dict[str, Any]:
    """What `llama-export verify` finds."""
    found = verify(open_bundle(folder), check_hashes=False, threads=None, progress=Silent())
    return {"passed": found.passed, "backend": found.backend, "seconds": found.seconds, "lines": table_lines([found])}


def agreement(engine: Engine, expected: Any) -> dict[str, float]:
    """How far logits are from transformers', and the share of positions whose most likely token is the same."""
    found = engine.logits(prompt_ids(len(expected), expected.shape[1]))
    return {
        "largest_difference": float(np.abs(found - expected).max()),
        "standard_deviation": float(expected.std()),
        "same_token": float((found.argmax(-1) == expected.argmax(-1)).mean()),
    }


def measure(engine: Engine, plan: Plan, vocab: int) -> dict[str, float]:
    """Tokens a second of one prompt, and of tokens behind each context."""
    ids = prompt_ids(plan.positions, vocab)
    found = {"prefill": plan.prompt / seconds(lambda: engine.prefill(ids[: plan.prompt]))}
    for context in plan.contexts:
        token = engine.prefill(ids[:context])
        token = engine.step(token)  # the first may record or compile

        def steps(token: int = token) -> None:
            for _ in range(plan.new - 1):
                token = engine.step(token)

        found[f"decode at {context}"] = (plan.new - 1) / seconds(steps)
    return found


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def loaders(model: Path, bundles: dict[str, Path], plan: Plan, *, tied: bool) -> dict[str, Callable[[], Engine]]:
    """How each engine is loaded, the one that others are compared with first."""

    def ours(folder: Path) -> Callable[[], Engine]:
        return lambda: Ours(folder, bytes_per_token(folder, tied=tied))

    def theirs(*, compiled: bool) -> Callable[[], Engine]:
        return lambda: Transformers(model, plan.device, plan.positions, compiled=compiled)

    return {
        EAGER: theirs(compiled=False),
        "transformers, torch.compile": theirs(compiled=True),
        **{f"llama-export {precision}": ours(folder) for precision, folder in bundles.items()},
    }


def compare(todo: dict[str, Callable[[], Engine]], plan: Plan, vocab: int, bandwidth: float) -> list[dict[str, Any]]:
    """Load all engines, compare their logits, measure them in turns; the first round only warms up."""
    engines: dict[str, Engine] = {}
    rows: dict[str, dict[str, Any]] = {name: {"engine": name} for name in todo}
    for name, load in todo.items():
        attempt(rows[name], lambda name=name, load=load: engines.update({name: load()}))  # type: ignore[misc]
    if EAGER in engines:
        expected = engines[EAGER].logits(prompt_ids(COMPARED, vocab))
        for name, engine in engines.items():
            row = rows[name]
            attempt(row, lambda row=row, engine=engine: row.update(agreement=agreement(engine, expected)))  # type: ignore[misc]
    speeds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(plan.rounds + 1):
        for name, engine in engines.items():
            if "error" not in rows[name]:
                found = speeds[name]
                attempt(rows[name], lambda found=found, engine=engine: found.append(measure(engine, plan, vocab)))  # type: ignore[misc]
    for name, engine in engines.items():
        rows[name].update(summary(engine, speeds[name][1:], bandwidth))
    return list(rows.values())


def attempt(row: dict[str, Any], work: Callable[[], object]) -> None:
    """Do it, or note what it said: one engine that fails is no reason to lose the others."""
    try:
        work()
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:500]
        print(f"{row['engine']}: {row['error']}", file=sys.stderr)


def summary(engine: Engine, rounds: Sequence[dict[str, float]], bandwidth: float) -> dict[str, Any]:
    """Medians of tokens a second, and the share of the bandwidth that reading the weights takes."""
    medians = {key: statistics.median(one[key] for one in rounds) for key in (rounds[0] if rounds else ())}
    shares = {key: speed * engine.nbytes / bandwidth for key, speed in medians.items() if key.startswith("decode at ")}
    return {
        "note": engine.note,
        "bytes_per_token": engine.nbytes,
        "tokens_per_second": medians,
        "of_bandwidth": shares,
        "rounds": list(rounds),
    }


def one_model(name: str, arguments: argparse.Namespace, plan: Plan, bandwidth: float) -> dict[str, Any]:
    """All of one model."""
    model = checkpoint(name, arguments.work, arguments.gguf)
    bundles, verdicts, failures = {}, {}, {}
    for precision in arguments.precisions:
        row: dict[str, Any] = {"engine": f"llama-export {precision}"}

        def prepare(precision: str = precision) -> None:
            checked = name in arguments.verify
            bundles[precision] = bundle_of(model, precision, arguments.work, plan, reference=checked)
            if checked:
                verdicts[precision] = verdict(bundles[precision])

        attempt(row, prepare)
        if "error" in row:
            failures[precision] = row["error"]
    shape = open_bundle(next(iter(bundles.values()))).manifest.shape if bundles else None
    if shape is None:
        return {"model": name, "failures": failures, "verify": verdicts, "engines": []}
    tied = "lm_head.weight" not in weights_of(model)
    rows = compare(loaders(model, bundles, plan, tied=tied), plan, shape.vocab, bandwidth)
    free(plan.device)
    return {"model": name, "failures": failures, "verify": verdicts, "engines": rows}


def weights_of(model: Path) -> set[str]:
    """The names of a checkpoint's tensors."""
    from llama_export.export.source import open_source  # noqa: PLC0415 (loads packages that only building needs)

    return set(open_source(str(model)).tensors)


def markdown(result: dict[str, Any]) -> str:
    """One table for each model, and what was found beside it."""
    keys = ("prefill", *(f"decode at {context}" for context in result["plan"]["contexts"]))
    share = f"of the bandwidth at {result['plan']['contexts'][0]}"
    card = result["facts"]["card"] or {"name": "no GPU: a dry run on the CPU"}
    lines = [
        f"{card['name']}, driver {card.get('driver_version', 'unknown')}, {result['facts']['date']}, "
        f"memory copied at {result['bandwidth'] / 1e9:,.0f} GB/s (read and written)",
        f"TensorRT-RTX: {result['tensorrt_rtx'].get('outcome')}",
    ]
    for model in result["models"]:
        lines += ["", f"**{model['model']}**", ""]
        header = ["engine", *(f"{key}, tokens/s" for key in keys), share, "same token as eager"]
        lines.append(report.table(header, [_cells(row, keys) for row in model["engines"]]))
        for precision, found in model["verify"].items():
            lines += ["", f"verify {precision}: {'passed' if found['passed'] else 'FAILED'} on {found['backend']}"]
        told = {**{row["engine"]: row.get("error") or row.get("note") for row in model["engines"]}, **model["failures"]}
        lines += [f"- {engine}: {text}" for engine, text in told.items() if text]
    return "\n".join(lines)


def _cells(row: dict[str, Any], keys: Sequence[str]) -> list[str]:
    speeds, shares = row.get("tokens_per_second", {}), row.get("of_bandwidth", {})
    share = next(iter(shares.values()), None)
    same = row.get("agreement", {}).get("same_token")
    return [
        row["engine"],
        *(f"{speeds[key]:,.1f}" if key in speeds else "-" for key in keys),
        "-" if share is None else f"{share:.0%}",
        "-" if same is None else f"{same:.0%}",
    ]


def names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, names(text)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as GGUF")
    parser.add_argument("--models", type=names, default=(SMOLLM2, "llama-3.2-1b", "llama-3.1-8b"))
    parser.add_argument("--precisions", type=names, default=("fp16", "int8", "int4"))
    parser.add_argument("--verify", type=names, default=(SMOLLM2, "llama-3.2-1b"), help="models that `verify` proves")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--contexts", type=numbers, default=(128, 1024))
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: PyTorch sees no NVIDIA GPU here; --device cpu tries the script without one", file=sys.stderr)
        return 1
    arguments.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(arguments.device, arguments.prompt, arguments.contexts, arguments.new, arguments.rounds)
    result: dict[str, Any] = {
        "facts": gpu_card.facts(plan.device),
        "machine": report.machine(),
        "plan": {**vars(plan), "positions": plan.positions},
        "bandwidth": gpu_card.bandwidth(plan.device),
        "tensorrt_rtx": gpu_card.try_tensorrt_rtx(),
        "models": [],
    }
    for name in arguments.models:
        print(f"{name} ...", file=sys.stderr)
        try:
            result["models"].append(one_model(name, arguments, plan, result["bandwidth"]))
        except (LlamaExportError, OSError, ValueError) as error:
            print(f"gpu.py: {name}: {error}", file=sys.stderr)
            result["models"].append({"model": name, "failures": {name: str(error)}, "verify": {}, "engines": []})
        report.write(result, markdown(result), arguments.json, arguments.markdown)
    failed = [model["model"] for model in result["models"] if not model["engines"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
