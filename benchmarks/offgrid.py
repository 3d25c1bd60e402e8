"""Writes a checkpoint that computes the same function off the grid that its weights lie on, to measure quantisation.

    python benchmarks/offgrid.py SOURCE FOLDER [--seed N] [--sigma 0.5 | --uniform R]
    python benchmarks/offgrid.py SHAPE FOLDER --outliers [--seed N]

SOURCE is a GGUF file or a Hugging Face folder. A model that comes from a 4-bit file is quantised to 4 bits without any
loss, so quality cannot be measured on it. Here each norm's weights are folded into the projections that follow (the
last norm's only where the head is not tied), and random positive scales are moved between v and o, channel by channel
of the KV heads, and between up and down. The logits of both are compared in PyTorch, and must agree to 1e-4 or nothing
is left: in float64 and before the weights are rounded to float32, in which they are written; that alone makes as much
as 1.5e-4 of SmolLM2's logits of up to 38.

With --outliers SOURCE is the name of a published shape (checkpoints.py), and what is written is a Llama of random
weights some of whose residual channels are 20 to 100 times as large as the others, as in trained models of billions of
parameters (Dettmers et al. 2022). Needs llama-export with its `build` extra, and memory for four times the weights in
float32.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_export.errors import LlamaExportError
from llama_export.export.config import ModelShape, transformers_config
from llama_export.export.source import Source, open_source
from llama_export.optimize.tensors import Float32
from numpy.typing import NDArray
from safetensors.numpy import save_file

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from .checkpoints import SHAPES, write_checkpoint
else:
    from checkpoints import SHAPES, write_checkpoint

Float64 = NDArray[np.float64]
Weights = dict[str, Float32]
Exact = dict[str, Float64]
Scales = Callable[[np.random.Generator, int], Float32]
"""Random positive scales: the generator and how many -> float32 [count]."""

TOLERANCE = 1e-4
CHECKED_TOKENS = 384
_LENGTH = 128
OUTLIERS = (20.0, 100.0)
LOGITS_DEVIATION = 3.0
"""Of a random model's logits at one position, as those of trained ones: else all its distributions are nearly flat."""


def log_normal(sigma: float) -> Scales:
    """Scales whose logarithms have the deviation `sigma`."""
    return lambda generator, count: np.exp(sigma * generator.standard_normal(count)).astype(np.float32)


def log_uniform(ratio: float) -> Scales:
    """Scales from 1/ratio to ratio, uniform in their logarithms."""
    bound = math.log(ratio)
    return lambda generator, count: np.exp(generator.uniform(-bound, bound, count)).astype(np.float32)


def off_grid(weights: Mapping[str, Float32], shape: ModelShape, scales: Scales, seed: int) -> Exact:
    """The weights of a model that computes the same, by Hugging Face names; none are changed in place."""
    result: Exact = {name: values.astype(np.float64) for name, values in weights.items()}
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        _fold(result, f"{layer}input_layernorm.weight", (f"{attention}{part}_proj" for part in "qkv"))
        _fold(result, f"{layer}post_attention_layernorm.weight", (f"{mlp}gate_proj", f"{mlp}up_proj"))
        generator = np.random.default_rng([seed, number])
        by_head = scales(generator, shape.kv_heads * shape.head_dim)
        group = shape.heads // shape.kv_heads
        repeated = by_head.reshape(shape.kv_heads, 1, -1).repeat(group, axis=1).reshape(-1)
        _move(result, f"{attention}v_proj", by_head, f"{attention}o_proj", repeated)
        channels = scales(generator, shape.ffn)
        _move(result, f"{mlp}up_proj", channels, f"{mlp}down_proj", channels)
    if not shape.tied:
        _fold(result, "model.norm.weight", ("lm_head",))
    return result


def _fold(weights: Exact, norm: str, consumers: Iterable[str]) -> None:
    """Multiply the columns of the projections after a norm by its weights, and make those 1."""
    for name in consumers:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * weights[norm]
    weights[norm] = np.ones_like(weights[norm])


def _move(weights: Exact, producer: str, rows: Float32, consumer: str, columns: Float32) -> None:
    """Multiply what `producer` gives by `rows`, and divide what `consumer` takes by `columns`."""
    weights[f"{producer}.weight"] = weights[f"{producer}.weight"] * rows[:, None]
    if f"{producer}.bias" in weights:
        weights[f"{producer}.bias"] = weights[f"{producer}.bias"] * rows
    weights[f"{consumer}.weight"] = weights[f"{consumer}.weight"] / columns


@dataclass(frozen=True)
class Outliers:
    """Which channels of the residual stream are larger than the others, and how many times: int64 and float32 [n]."""

    channels: NDArray[np.int64]
    factors: Float32


def choose_outliers(hidden: int, seed: int) -> Outliers:
    """About one channel in 100, at least two, by factors uniform in their logarithms."""
    generator = np.random.default_rng([seed, hidden])
    count = max(2, hidden // 100)
    low, high = map(math.log, OUTLIERS)
    channels = np.sort(generator.choice(hidden, count, replace=False))
    return Outliers(channels.astype(np.int64), np.exp(generator.uniform(low, high, count)).astype(np.float32))


def with_outliers(weights: Mapping[str, Float32], shape: ModelShape, outliers: Outliers) -> Weights:
    """The weights of a model whose residual stream has large channels.

    All that writes to these channels is larger by the factors. Norm weights are smaller by their roots, so that the
    projections read outliers too, as in trained models; the last norm takes the factors back, twice where the head is
    tied, and brings the logits to about LOGITS_DEVIATION.
    """
    result = dict(weights)
    growth = np.ones(shape.hidden, np.float32)
    growth[outliers.channels] = outliers.factors
    result["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * growth
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        for name in (f"{layer}self_attn.o_proj.weight", f"{layer}mlp.down_proj.weight"):
            result[name] = weights[name] * growth[:, None]
        for name in (f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"):
            result[name] = (weights[name] / np.sqrt(growth)).astype(np.float32)
    head = weights["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
    gain = float(np.sqrt(np.mean(growth**2))) * LOGITS_DEVIATION / (float(head.std()) * math.sqrt(shape.hidden))
    last = weights["model.norm.weight"] * gain / growth ** (1 + shape.tied)
    result["model.norm.weight"] = last.astype(np.float32)
    return result


def read_weights(source: Source) -> Weights:
    """All tensors of a checkpoint in float32."""
    return {name: tensor.read(0, tensor.shape[0]) for name, tensor in source.tensors.items()}


def logits(config: Mapping[str, Any], weights: Mapping[str, Float32 | Float64], windows: NDArray[np.int64]) -> Float64:
    """transformers' logits for windows of token ids [windows, length]: float64 [windows, length, vocab]."""
    import torch  # noqa: PLC0415 (seconds, and only the check needs it)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_config(transformers_config(config), dtype=torch.float64).eval()
    found = model.load_state_dict(
        {name: torch.from_numpy(tensor).double() for name, tensor in weights.items()}, strict=False, assign=True
    )
    if missing := set(found.missing_keys) - {"lm_head.weight"}:
        raise LlamaExportError(f"transformers looks for weights that the checkpoint lacks: {', '.join(missing)}.")
    model.tie_weights()
    with torch.inference_mode():
        return np.concatenate([model(torch.from_numpy(window[None])).logits.numpy() for window in windows])


def largest_difference(
    config: Mapping[str, Any], weights: Mapping[str, Float32], others: Mapping[str, Float64]
) -> float:
    """The largest difference of a logit that two sets of weights make of CHECKED_TOKENS random tokens."""
    vocab = ModelShape.from_config(config).vocab
    windows = np.random.default_rng(0).integers(0, vocab, (CHECKED_TOKENS // _LENGTH, _LENGTH))
    return float(np.abs(logits(config, weights, windows) - logits(config, others, windows)).max())


def write_folder(source: Source, weights: Mapping[str, Float32], folder: Path) -> None:
    """Write a Hugging Face folder of float32 weights, and the other files of `source`; it appears when it is complete.

    Raises FileExistsError for a folder that is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        for name in source.files:
            (partial / name).write_bytes(source.content(name))
        dropped = ("quantization_config", "torch_dtype")  # the weights are dense now, whatever they were
        config = {key: value for key, value in source.config.items() if key not in dropped} | {"dtype": "float32"}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(dict(weights), partial / "model.safetensors", {"format": "pt"})
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_off_grid(model: str, folder: Path, scales: Scales, seed: int) -> float:
    """Write the equal model to the new `folder`; returns the largest difference of a logit.

    Raises LlamaExportError when `model` cannot be read or the logits differ by more than TOLERANCE, and OSError.
    """
    source = open_source(model)
    weights = read_weights(source)
    others = off_grid(weights, source.shape, scales, seed)
    difference = largest_difference(source.config, weights, others)
    if not difference <= TOLERANCE:
        raise LlamaExportError(
            f"The logits of {model} and of the model off the grid differ by {difference:.2g}, which may be "
            f"{TOLERANCE:g} at most; take a smaller --sigma."
        )
    write_folder(source, {name: values.astype(np.float32) for name, values in others.items()}, folder)
    return difference


def write_outliers(name: str, folder: Path, seed: int) -> Outliers:
    """Write a Llama of random weights with large channels, in a published shape, to the new `folder`.

    Raises LlamaExportError for another name than that of a shape, and OSError.
    """
    if name not in SHAPES:
        raise LlamaExportError(f"{name} is no shape; --outliers takes one of {', '.join(SHAPES)}.")
    with tempfile.TemporaryDirectory() as work:
        plain = Path(work) / folder.name
        write_checkpoint(SHAPES[name], plain, seed, None, 5_000_000_000)
        source = open_source(str(plain))
        outliers = choose_outliers(source.shape.hidden, seed)
        write_folder(source, with_outliers(read_weights(source), source.shape, outliers), folder)
    return outliers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a GGUF file, a Hugging Face folder, or with --outliers the name of a shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    spread = parser.add_mutually_exclusive_group()
    spread.add_argument("--sigma", type=float, default=0.5, help="deviation of the scales' logarithms")
    spread.add_argument("--uniform", type=float, metavar="R", help="scales from 1/R to R, uniform in their logarithms")
    parser.add_argument("--outliers", action="store_true", help="a random model with large residual channels")
    arguments = parser.parse_args()
    if arguments.sigma < 0 or (arguments.uniform is not None and arguments.uniform < 1) or arguments.seed < 0:
        parser.error("--sigma and --seed are 0 or more, and --uniform 1 or more")
    return arguments


def main() -> int:
    arguments = parse()
    scales = log_normal(arguments.sigma) if arguments.uniform is None else log_uniform(arguments.uniform)
    try:
        if arguments.outliers:
            outliers = write_outliers(arguments.source, arguments.folder, arguments.seed)
            told = f"{len(outliers.channels)} channels of the residual stream are {outliers.factors.min():.0f} to "
            print(f"{told}{outliers.factors.max():.0f} times as large")
        else:
            difference = write_off_grid(arguments.source, arguments.folder, scales, arguments.seed)
            print(f"largest difference of a logit: {difference:.2g}")
    except (LlamaExportError, OSError) as error:
        print(f"offgrid.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
