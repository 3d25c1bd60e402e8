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
from .targets.tensorrt import release_of


def engine_record(plan: BuildPlan) -> EngineRecord | None:
    """What the manifest says of engines before any is built; None for ONNX Runtime."""
    release = release_of(plan.target)
    return None if release is None else EngineRecord(MODULES[release.backend], release.version)


def need_builder(plan: BuildPlan) -> None:
    """Raise LlamaExportError where the engines are to be built here and the packages for it are not."""
    release = release_of(plan.target)
    if release is not None and release.ahead_of_time:
        packages = (MODULES[release.backend], "polygraphy")
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise LlamaExportError(
                f"Building engines for {plan.target.name} needs packages that are not installed here "
                f"({', '.join(missing)}): run `pip install 'llama-export[rtx]'`, or choose --backend onnxruntime."
            )


def write_engines(
    plan: BuildPlan, folder: Path, manifest: Manifest, progress: Progress
) -> tuple[Manifest, Built | None]:
    """Write the recipe into the bundle's folder, and the engines where they can be built here.

    Returns the manifest with these, and what building took, None where only the device can build.
    """
    release = release_of(plan.target)
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
