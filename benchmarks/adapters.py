"""Measures what adapters beside the weights cost: one bundle without, one with two to choose from, in turns.

    python benchmarks/adapters.py CHECKPOINT [--rank 16] [--prompt 128] [--new 32] [--rounds 5] [--threads 2]

CHECKPOINT is a Llama in Hugging Face's layout, for example one made by checkpoints.py. The adapters are random: one on
every projection, one on q and v. Both bundles are int4, made in a folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from llama_export.build_options import MERGE, RUNTIME, BuildOptions
from llama_export.errors import LlamaExportError
from llama_export.export.config import ModelShape
from llama_export.pipeline import build
from llama_export.progress import Terminal
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.bundle import open_bundle
from safetensors.numpy import save_file

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import report
else:
    import report

PROJECTIONS = {"every projection": ("q", "k", "v", "o", "gate", "up", "down"), "q and v": ("q", "v")}
PLAIN, NONE = "a bundle without adapters", "none chosen"


def write_adapter(folder: Path, checkpoint: Path, shape: ModelShape, rank: int, projections: tuple[str, ...]) -> Path:
    """Write a random adapter in peft's format."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {  # inputs and outputs
        **{"q": (shape.hidden, queries), "k": (shape.hidden, keys), "v": (shape.hidden, keys)},
        **{"o": (queries, shape.hidden), "down": (shape.ffn, shape.hidden)},
        **{"gate": (shape.hidden, shape.ffn), "up": (shape.hidden, shape.ffn)},
    }
    generator, tensors = np.random.default_rng(0), {}
    for layer in range(shape.layers):
        for name in projections:
            module = f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"
            inputs, outputs = sizes[name]
            for half, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = generator.standard_normal(size, dtype=np.float32) / inputs**0.5
                tensors[f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [f"{name}_proj" for name in projections]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def speeds(backend: OnnxRuntimeBackend, prompt: int, new: int) -> tuple[float, float]:
    """Tokens a second of a prompt, and of tokens one by one after it."""
    ids = np.random.default_rng(1).integers(0, backend.vocab, prompt + new)
    backend.rewind(0)
    times = [time.perf_counter()]
    backend.extend(ids[:prompt])
    times.append(time.perf_counter())
    for token in ids[prompt:]:
        backend.step(int(token))
    times.append(time.perf_counter())
    return prompt / (times[1] - times[0]), new / (times[2] - times[1])


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, tuple[float, float]]:
    """The median speeds of every way to run, in turns; the first round only warms up."""
    shape = ModelShape.from_config(json.loads((arguments.checkpoint / "config.json").read_text(encoding="utf-8")))
    adapters = {
        name: write_adapter(work / name.replace(" ", "-"), arguments.checkpoint, shape, arguments.rank, projections)
        for name, projections in PROJECTIONS.items()
    }
    backends = {}
    for mode, paths in ((MERGE, ()), (RUNTIME, tuple(map(str, adapters.values())))):
        with Terminal() as progress:
            options = BuildOptions(
                str(arguments.checkpoint), "cpu", work / mode, "int4", context=arguments.prompt + arguments.new,
                adapters=paths, adapter_mode=mode, reference=False,
            )  # fmt: skip
            build(options, progress)
        backends[mode] = OnnxRuntimeBackend(open_bundle(work / mode), threads=arguments.threads)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(arguments.rounds + 1):
        found[PLAIN].append(speeds(backends[MERGE], arguments.prompt, arguments.new))
        for name, path in {NONE: None, **adapters}.items():
            backends[RUNTIME].use_adapter(path.name if path is not None else None)
            found[name].append(speeds(backends[RUNTIME], arguments.prompt, arguments.new))
    return {
        name: (statistics.median(one for one, _ in pairs[1:]), statistics.median(one for _, one in pairs[1:]))
        for name, pairs in found.items()
    }


def markdown(found: Mapping[str, tuple[float, float]]) -> str:
    """The speeds, and their shares of those of the bundle without adapters."""
    rows = []
    for name, pair in found.items():
        shares = (f"{value / whole:.2f}" for value, whole in zip(pair, found[PLAIN], strict=True))
        rows.append([name, *(f"{value:.1f}" for value in pair), *shares])
    return report.table(["adapter", "prefill, tokens/s", "decode, tokens/s", "of prefill", "of decode"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(dir=arguments.checkpoint.resolve().parent, prefix="adapters-") as work:
            found = measure(arguments, Path(work))
    except (LlamaExportError, OSError) as error:
        print(f"adapters.py: {error}", file=sys.stderr)
        return 1
    report.write({"machine": report.machine(), "tokens_per_second": found}, markdown(found), arguments.json, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
