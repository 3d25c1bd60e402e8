"""The engines of a bundle for TensorRT: the recipe, and the plans that can be built without the device."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from .errors import LlamaExportError
from .names import MODULES
from .planning import BuildPlan
from .progress import Progress
from .runtime.bundle import DATA_FILE, EngineRecord, Manifest
from .targets.engine_plans import build_plans
from .targets.engine_process import Built
from .targets.recipes import recipe_for
from .targets.tensorrt import Release

LEAST_HEADS = 4
"""Of a model whose attention TensorRT-RTX 1.7 has a kernel for (seen: 1 to 3 heads of any size are refused)."""


def engine_record(release: Release | None) -> EngineRecord | None:
    """What the manifest says of engines before any is built; None for ONNX Runtime."""
    return None if release is None else EngineRecord(MODULES[release.backend], release.version)


def need_builder(plan: BuildPlan) -> None:
    """Raise LlamaExportError where the engines are to be built here and cannot be: packages or kernels are missing."""
    release = plan.made.release
    if release is None or not release.ahead_of_time:
        return
    packages = (MODULES[release.backend], "polygraphy")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise LlamaExportError(
            f"Building engines for {plan.target.name} needs packages that are not installed here "
            f'({", ".join(missing)}): run `pip install "llama-export[rtx]"`, or choose --backend onnxruntime.'
        )
    if plan.source.shape.heads < LEAST_HEADS:
        raise LlamaExportError(
            f"{release.name} has no attention kernel for a model of {plan.source.shape.heads} heads, only for "
            f"{LEAST_HEADS} and more; choose --backend onnxruntime."
        )


def write_engines(
    plan: BuildPlan, folder: Path, manifest: Manifest, progress: Progress
) -> tuple[Manifest, Built | None]:
    """Write the recipe into the bundle's folder, and the engines where they can be built here.

    Returns the manifest with these, and what building took, None where only the device can build.
    """
    release = plan.made.release
    assert release is not None, f"{plan.made.backend} has no engines"
    recipe = recipe_for(
        release,
        plan.target.compute_capability,
        manifest.shape,
        manifest.limits,
        weights=(folder / DATA_FILE).stat().st_size,
        quantises_activations=plan.calibration is not None,
        shared_memory=plan.target.shared_memory,
    )
    record, built = build_plans(folder, recipe, progress)
    return replace(manifest, engine=record), built
