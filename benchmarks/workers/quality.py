"""What every worker does that measures quality: logits of windows of token ids, set against those of the original.

    WORKER.py reference MODEL FOLDER --ids IDS.npy --threads N
    WORKER.py measure   MODEL FOLDER... --threads N [--exact]

`reference` writes what the original computes to the new FOLDER; `measure` reads it there and prints one JSON line for
each: the means over each window. Logits stay in the process; of the original its log-probabilities lie in a float16
file that is mapped into memory, normalised again in float32 when read, and what float16 would change, the likeliest
token and the loss of the text, beside it (measured: SmolLM2 in float32 against its own file has a KL divergence of
4e-7 nats). Imports NumPy alone, since each worker has its engine's own environment.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Logits = Callable[[Int64], Float32]
"""Token ids [length] -> the logits after each, float32 [length, vocab]."""
Load = Callable[[Path, int, int, bool], Logits]
"""Model, threads, length of the windows, with full-precision kernels where there is a choice -> the loaded model."""

_ROWS = 16
"""Positions that are looked at together, which a processor's cache holds."""


def log_softmax(logits: Float32) -> Float32:
    """Log-probabilities over the last axis, in float32."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Float32 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def divergence(original: Float32, other: Float32) -> Float32:
    """KL(original || other) in nats at each position, of log-probabilities [positions, vocab]; the original's may be
    rounded, and are brought back to a sum of 1 first.
    """
    shares = np.exp(original)
    total = shares.sum(-1)
    result: Float32 = (shares * (original - other)).sum(-1) / total - np.log(total)
    return result


def losses(log_probabilities: Float32, ids: Int64) -> Float32:
    """Minus the log-probability in nats of each of `ids` but the first, which the rows before predict: float32
    [len(ids) - 1].
    """
    result: Float32 = -log_probabilities[np.arange(len(ids) - 1), ids[1:]]
    return result


def write_reference(model: Logits, ids: Int64, folder: Path) -> None:
    """Write what the original makes of windows `ids` [windows, length] to `folder`."""
    folder.mkdir(parents=True)
    best, loss, stored = [], [], None
    for index, window in enumerate(ids):
        found = log_softmax(model(window))
        if stored is None:
            shape = (*ids.shape, found.shape[-1])
            stored = np.lib.format.open_memmap(folder / "original.npy", "w+", np.float16, shape)
        stored[index] = np.maximum(found, np.finfo(np.float16).min)
        best.append(found.argmax(-1))
        loss.append(losses(found, window))
    np.savez(folder / "original.npz", ids=ids, best=np.array(best), losses=np.array(loss, np.float32))


def window_means(logits: Float32, original: NDArray[np.float16], best: Int64, ids: Int64) -> dict[str, float]:
    """KL divergence and agreement of the likeliest token over a window's positions, and loss over its tokens but the
    first.

    logits: float32 [length, vocab]; original: the log-probabilities of the original; best: its likeliest tokens.
    """
    kl, loss = 0.0, 0.0
    for start in range(0, len(ids), _ROWS):
        piece = slice(start, start + _ROWS)
        found = log_softmax(logits[piece])
        kl += float(divergence(original[piece].astype(np.float32), found).sum(dtype=np.float64))
        loss += float(losses(found, ids[start : start + _ROWS + 1]).sum(dtype=np.float64))
    return {
        "kl": kl / len(ids),
        "top1": float((logits.argmax(-1) == best).mean()),
        "nll": loss / (len(ids) - 1),
    }


def measure(model: Logits, folder: Path) -> dict[str, list[float]]:
    """The means over each window of a reference: "kl" and "nll" in nats, "top1" from 0 to 1.

    Raises ValueError when the model gives anything but finite numbers.
    """
    beside = np.load(folder / "original.npz")
    original = np.load(folder / "original.npy", mmap_mode="r")
    result: dict[str, list[float]] = {"kl": [], "top1": [], "nll": []}
    for index, window in enumerate(beside["ids"]):
        logits = model(window)[:, : original.shape[-1]]
        if not np.isfinite(logits).all():
            raise ValueError(f"the model gives numbers that are not finite in window {index}")
        for name, value in window_means(logits, original[index], beside["best"][index], window).items():
            result[name].append(value)
    return result


def main(load: Load) -> None:
    """Be a worker for the engine that `load` opens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("reference", "measure"))
    parser.add_argument("model", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--exact", action="store_true")
    job = parser.parse_args()
    if job.mode == "reference":
        ids = np.load(job.ids)
        write_reference(load(job.model, job.threads, ids.shape[1], False), ids, job.folders[0])
        return
    lengths = [np.load(folder / "original.npz")["ids"].shape[1] for folder in job.folders]
    model = load(job.model, job.threads, max(lengths), job.exact)
    for folder in job.folders:
        print(json.dumps(measure(model, folder)), flush=True)
