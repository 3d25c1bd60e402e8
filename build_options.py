"""What a build is asked for. Imports nothing that only building needs: the command line reads it everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MERGE, RUNTIME = "merge", "runtime"
ADAPTER_MODES = (MERGE, RUNTIME)
"""What becomes of adapters: part of the weights, or beside them to be chosen when the bundle runs."""


@dataclass(frozen=True)
class BuildOptions:
    """What `llama-export build` was asked for; None leaves the choice to model and target.

    adapters: folders of LoRA adapters, each with `:weight` or without. adapter_mode: "merge" them into the weights, or
    keep them beside them to be chosen at "runtime". any_base: take adapters whatever model they name as their base.
    jetpack: of a Jetson; backend: of those that the target has. calibrate: the text to calibrate on, a file or
    "built-in"; method: by which weights are quantised, one of `names.METHODS`. prompts: a file of those that the
    reference records, None for the built-in ones. quality: measure what quantisation cost; quality_text: on which text,
    None for the built-in one. budget, max_kl: what `precision` "auto" is to meet, see `limits.Limits`.
    """

    model: str
    target: str
    output: Path
    precision: str | None = None
    context: int | None = None
    batch: int = 1
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    reference: bool = True
    force: bool = False
    head_precision: str | None = None
    adapters: tuple[str, ...] = ()
    adapter_mode: str = MERGE
    any_base: bool = False
    jetpack: str | None = None
    backend: str | None = None
    calibrate: Path | str | None = None
    prompts: Path | None = None
    method: str | None = None
    cache_precision: str | None = None
    quality: bool = True
    quality_text: Path | None = None
    budget: str | None = None
    max_kl: float | None = None
