"""The engines of a bundle for TensorRT: the recipe, and the plans that can be built without the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .planning import BuildPlan
from .progress import Progress
from .runtime.bundle import MODULES, RECIPE_FILE, EngineRecord, Manifest
from .targets.tensorrt import release_of


def engine_record(plan: BuildPlan) -> EngineRecord | None:
    """What the manifest says of engines before any is built; None for ONNX Runtime."""
    module, release = MODULES.get(plan.made.backend), release_of(plan.target)
    return None if module is None or release is None else EngineRecord(module, release.version)


def write_engines(plan: BuildPlan, folder: Path, manifest: Manifest, progress: Progress) -> Manifest:
    """Write the recipe into the bundle's folder, and the engines where they can be built here; return the manifest
    with these.
    """
    from .targets.engine_ahead import build_plans  # noqa: PLC0415
    from .targets.recipes import recipe_for  # noqa: PLC0415

    recipe = recipe_for(plan.target, manifest)
    path = folder / RECIPE_FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(recipe.to_json(), encoding="utf-8")
    release = release_of(plan.target)
    if release is None or not release.ahead_of_time:
        return manifest
    return replace(manifest, engine=build_plans(folder, manifest, recipe, progress))
