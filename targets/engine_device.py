"""Building a bundle's engine on the device that runs it, into the cache folder where the runtime looks for it.

The plan gets its name only after it was built whole and verified, so what the runtime finds is good; an interrupted
build leaves at most its log and what the builder measured, which make the next one quicker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import LlamaExportError
from ..names import MODULES, TENSORRT_RTX, TRT
from ..progress import Progress
from ..runtime.bundle import DATA_FILE, GRAPH_FILE, Bundle
from ..runtime.files import replace
from ..runtime.recipe import Recipe, read_recipe
from ..runtime.requirements import parse_version
from ..runtime.tensorrt import EngineFile, device_label, engine_folder, engine_label, this_gpu
from ..runtime.tensorrt.api import PRODUCTS, import_module
from ..runtime.tensorrt.places import LOG_FILE, PLAN_FILE, RUNTIME_CACHE_FILE, TIMING_CACHE_FILE
from .engine_memory import need_memory
from .engine_process import Built, Job, run_builder

PART = f"{PLAN_FILE}.part"


@dataclass(frozen=True)
class DeviceEngine:
    """The engine of this device. built: what building took, None where it was there; notes: sentences for people."""

    file: EngineFile
    built: Built | None
    notes: tuple[str, ...]


def build_engine(
    bundle: Bundle,
    check: Callable[[EngineFile], None],
    progress: Progress,
    *,
    engine_dir: Path | None = None,
    force: bool = False,
) -> DeviceEngine:
    """Build the engine of a bundle for this device, unless it is there.

    check: verifies an engine, and raises where it fails. engine_dir: as of `engine_folder`. force: build again, and
    also where memory seems not to be enough. Raises LlamaExportError when the bundle is not for TensorRT, this release
    cannot build it, memory is short, or building or verifying fails; nothing that the runtime could find is left then.
    """
    if bundle.manifest.engine is None:
        raise LlamaExportError(
            f"{bundle.path} is made for ONNX Runtime and takes no engine; `llama-export run` runs it as it is."
        )
    recipe = read_recipe(bundle)
    version = str(import_module(recipe.module).__version__)
    notes = release_notes(recipe, bundle.manifest.dialect, version)
    gpu = this_gpu()
    label = device_label(gpu.name, gpu.compute_capability)
    folder = engine_folder(bundle.manifest_sha256, recipe.module, version, label, engine_dir)
    file = EngineFile(folder / PLAN_FILE, recipe.module, version, folder / RUNTIME_CACHE_FILE, built_here=True)
    if file.path.is_file() and not force:
        return DeviceEngine(file, None, notes)
    if not force:
        need_memory(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    built = _build(bundle, dataclasses.replace(recipe, compute_capability=(gpu.compute_capability,)), file, progress)
    try:
        check(dataclasses.replace(file, path=folder / PART))
        replace(folder / PART, file.path)
    finally:
        (folder / PART).unlink(missing_ok=True)
    return DeviceEngine(file, built, notes)


def _build(bundle: Bundle, recipe: Recipe, file: EngineFile, progress: Progress) -> Built:
    progress.stage(f"Building the engine with {PRODUCTS[recipe.module]} {file.version}; this takes minutes")
    folder, files = file.path.parent, bundle.manifest.files
    log = folder / LOG_FILE
    log.unlink(missing_ok=True)
    label = engine_label(files[GRAPH_FILE].sha256, files[DATA_FILE].sha256)
    timing = folder / TIMING_CACHE_FILE
    job = Job(bundle.file(GRAPH_FILE), label, recipe, folder / PART, log, timing)
    try:
        return run_builder(job, progress)
    except KeyboardInterrupt:
        log.unlink(missing_ok=True)
        with suppress(OSError):  # what an earlier build left stays
            folder.rmdir()
        raise


def release_notes(recipe: Recipe, dialect: str, version: str) -> tuple[str, ...]:
    """What to tell where `version` is another release than the recipe's.

    Raises LlamaExportError where the graph's dialect is not for that release.
    """
    here, made_for = parse_version(version), parse_version(recipe.version)
    product = PRODUCTS[recipe.module]
    lowest, beyond = _span(recipe, dialect)
    if here < lowest or (beyond is not None and here >= beyond):
        span = f"{_told(lowest)} or newer" if beyond is None else f"{_told(lowest)} to below {_told(beyond)}"
        raise LlamaExportError(
            f"The bundle's graph is for {product} {span}, but {version} is here: build it again with the --jetpack of "
            "this device, or update the device."
        )
    if here[: len(made_for)] == made_for:
        return ()
    return (f"The bundle was made for {product} {recipe.version}, but {version} is here, which takes its graph too.",)


def _span(recipe: Recipe, dialect: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The lowest release that takes a graph, and the first that does not any more, as `parse_version` has them.

    Source: reference of onnx-tensorrt's operators: Attention and TensorScatter with 10.15, blocks of INT4 with 10.0;
    weak typing is gone with 11.0 (TensorRT release notes). TensorRT-RTX is held to the release that was tried.
    """
    if recipe.module == MODULES[TENSORRT_RTX]:
        return (1, 7), None
    if dialect == TRT:
        return (10, 15), None
    return ((10,), None) if recipe.strongly_typed else ((8, 6), (11,))


def _told(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
