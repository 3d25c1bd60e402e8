"""Engines built ahead of time, without a GPU: the folder `engine/` of a bundle for TensorRT-RTX, and the recipe alone
for TensorRT, whose engines only their device can build.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from ..errors import LlamaExportError
from ..names import MODULES, TENSORRT_RTX
from ..progress import Progress
from ..runtime.bundle import (
    DATA_FILE,
    ENGINES,
    GRAPH_FILE,
    RECIPE_FILE,
    EngineRecord,
    PlanRecord,
)
from ..runtime.hashing import sha256_of_all
from ..runtime.recipe import Recipe
from ..runtime.tensorrt import engine_label
from .engine_memory import shortage
from .engine_process import Built, Job, run_builder

LOG_FILE = f"{ENGINES}/build.log"


def build_plans(folder: Path, recipe: Recipe, progress: Progress) -> tuple[EngineRecord, Built | None]:
    """Write `RECIPE_FILE` and, for TensorRT-RTX, one plan for all the recipe's GPUs, and `LOG_FILE`.

    folder: of a bundle that has its graph and weights, not sealed yet. Returns the manifest's record, and what building
    took, None where only the device can build. Raises LlamaExportError with the builder's reason.
    """
    (folder / ENGINES).mkdir(exist_ok=True)
    (folder / RECIPE_FILE).write_text(recipe.to_json(), encoding="utf-8", newline="\n")
    if recipe.module != MODULES[TENSORRT_RTX]:
        return EngineRecord(recipe.module, recipe.version), None
    short = shortage(recipe)
    if short is not None:
        progress.warn(f"{short}.")
    name = plan_name(recipe.compute_capability)
    job = Job(folder / GRAPH_FILE, label_of(folder), recipe, folder / name, folder / LOG_FILE)
    built = run_builder(job, progress)
    plan = PlanRecord(name, recipe.compute_capability, built.version, this_platform())
    return EngineRecord(recipe.module, recipe.version, (plan,)), built


def plan_name(compute_capability: tuple[str, ...]) -> str:
    """Where the plan for these GPUs lies in a bundle: "engine/sm80-sm89.plan"."""
    if not compute_capability:
        raise LlamaExportError("The target names no compute capability, so there is no GPU to build an engine for.")
    return f"{ENGINES}/{'-'.join('sm' + one.replace('.', '') for one in compute_capability)}.plan"


def label_of(folder: Path) -> str:
    """What the engine of a bundle that is not sealed yet is called."""
    paths = [folder / name for name in (GRAPH_FILE, DATA_FILE)]
    hashes = sha256_of_all(paths)
    return engine_label(*(hashes[path] for path in paths))


def this_platform() -> str:
    """Where an engine is built: "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"
