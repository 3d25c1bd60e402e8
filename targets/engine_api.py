"""The one place that knows how the releases of TensorRT and TensorRT-RTX differ, as far as building an engine goes.

Only the process that builds imports this. Polygraphy takes `tensorrt_rtx` instead of `tensorrt` when the environment
says so as it is imported; `engine_process` sets that for the process. What a release has is asked of the module itself
where that can be asked, so that a release between those below needs no line here:

- network flags: EXPLICIT_BATCH is needed before 10.0 (8.6 API reference; 10.0 release notes), STRONGLY_TYPED exists
  from 9.0 on; TensorRT-RTX and 11.0 know no other networks (11.0 release notes).
- precision flags FP16, INT8 and precision constraints: removed with 11.0, never in TensorRT-RTX.
- IProgressMonitor: from 9.1 on (TensorRT release notes), in TensorRT-RTX 1.7 too; 8.6 tells no progress.
- build_serialized_network_to_stream: in the Python API of 10.13 (tensorrt-stubs) and TensorRT-RTX 1.7; 10.3 is asked.
- compute capabilities are chosen in TensorRT-RTX alone; TensorRT builds for the GPU that it runs on.
- the timing cache does nothing in TensorRT-RTX, deprecated since 1.2 (its own warning).
- a parser error tells node_name and node_operator from 10.0 on, only the node's number before (8.6 API reference).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polygraphy import config as polygraphy_config
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import CreateConfig, Profile
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER
from polygraphy.mod.trt_importer import lazy_import_trt

from ..errors import LlamaExportError
from ..runtime.recipe import Recipe

if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = lazy_import_trt()

__all__ = [
    "create_config",
    "create_network",
    "has_progress",
    "has_stream",
    "keep_float32",
    "parser_problem",
    "timing_cache",
    "told_version",
    "trt",
    "use_timing_cache",
]

IS_RTX = bool(polygraphy_config.USE_TENSORRT_RTX)
PRODUCT = "TensorRT-RTX" if IS_RTX else "TensorRT"

_SETS_TYPES = ("FP16", "INT8")
_CONSTRAINTS = {"OBEY_PRECISION_CONSTRAINTS": "obey", "PREFER_PRECISION_CONSTRAINTS": "prefer"}


def told_version() -> str:
    """ "TensorRT 10.3.0"."""
    return f"{PRODUCT} {trt.__version__}"


def has_progress() -> bool:
    """Whether the builder tells progress, and so can be stopped by it."""
    return hasattr(trt, "IProgressMonitor")


def has_stream() -> bool:
    """Whether the builder can write a plan piece by piece, which saves a copy of the weights."""
    return hasattr(trt, "IStreamWriter") and hasattr(trt.Builder, "build_serialized_network_to_stream")


def create_network(builder: trt.Builder, recipe: Recipe) -> trt.INetworkDefinition:
    """An empty network, typed as the recipe says. Raises LlamaExportError where this release has no such networks."""
    known = trt.NetworkDefinitionCreationFlag.__members__
    major = int(trt.__version__.split(".")[0])
    wanted = []
    if not IS_RTX and major < 10:
        wanted.append("EXPLICIT_BATCH")
    if recipe.strongly_typed:
        wanted.append("STRONGLY_TYPED")
    elif IS_RTX or "FP16" not in trt.BuilderFlag.__members__:
        raise LlamaExportError(f"{told_version()} knows only strongly typed networks; build the bundle again for it.")
    missing = [flag for flag in wanted if flag not in known]
    if missing and not IS_RTX and major < 11:
        raise LlamaExportError(f"{told_version()} has no {missing[0]} networks; build the bundle again for it.")
    flags = 0
    for flag in wanted:
        if flag in known:
            flags |= 1 << int(known[flag])
    network = builder.create_network(flags)
    if network is None:
        raise LlamaExportError(f"{told_version()} could not make an empty network; its installation is incomplete.")
    return network


def create_config(
    builder: trt.Builder, network: trt.INetworkDefinition, recipe: Recipe, monitor: Any | None
) -> trt.IBuilderConfig:
    """How the builder is to build, by polygraphy. Raises LlamaExportError when it cannot be done as the recipe says."""
    settings: dict[str, Any] = {
        "profiles": list(_profiles(recipe)),
        "builder_optimization_level": recipe.optimization_level,
        "progress_monitor": monitor,
        # The names of layers are what a profiler tells by; polygraphy's default puts every detail into the plan.
        "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
    }
    if recipe.workspace_bytes:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: recipe.workspace_bytes}
    for flag in recipe.flags:
        if flag in _CONSTRAINTS:
            settings["precision_constraints"] = _CONSTRAINTS[flag]
        elif flag in _SETS_TYPES:
            settings[flag.lower()] = True
        else:
            known = ", ".join((*_SETS_TYPES, *_CONSTRAINTS))
            raise LlamaExportError(f"The recipe has the flag {flag!r}, but {told_version()} is given only {known}.")
    if IS_RTX:
        settings["compute_capabilities"] = list(_capabilities(recipe.compute_capability))
    with _quiet_polygraphy():
        config: trt.IBuilderConfig = (CreateConfigRTX if IS_RTX else CreateConfig)(**settings)(builder, network)
    if IS_RTX:
        # Or a run may allocate memory by itself, which no CUDA graph can record (TensorRT-RTX 1.2 release notes).
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # type: ignore[attr-defined]  # not in TensorRT
    return config


def _profiles(recipe: Recipe) -> Iterator[Profile]:
    for profile in recipe.profiles:
        shapes = Profile()
        for name, extent in profile.inputs.items():
            shapes.add(name, extent.minimum, extent.optimum, extent.maximum)
        yield shapes


def _capabilities(wanted: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    known = trt.ComputeCapability.__members__  # type: ignore[attr-defined]  # TensorRT-RTX alone has it
    for capability in wanted:
        major, minor = (int(part) for part in capability.split("."))
        if f"SM{major}{minor}" not in known:
            numbers = (name[2:] for name in known if name.startswith("SM"))
            can = ", ".join(f"{number[:-1]}.{number[-1]}" for number in numbers)
            raise LlamaExportError(
                f"{told_version()} builds no engines for compute capability {capability}, only for {can}."
            )
        yield major, minor


@contextlib.contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    """Polygraphy prints what it does and says why it fails; the log has the first, and users get the second."""
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    except PolygraphyException as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise LlamaExportError(
            f"{told_version()} does not take the recipe: {reason}; build the bundle again."
        ) from error


def keep_float32(network: trt.INetworkDefinition, parts: tuple[str, ...]) -> int:
    """Fix float32 for layers with one of `parts` in their names, in a network whose types the builder chooses.

    Returns how many they are. Layers that compute no floating-point numbers stay as they are.
    """
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE) or not any(part in layer.name for part in parts):
            continue
        outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
        if not outputs or any(tensor.dtype not in (trt.float32, trt.float16) for tensor in outputs):
            continue
        layer.precision = trt.float32
        for number in range(layer.num_outputs):
            layer.set_output_type(number, trt.float32)
        count += 1
    return count


def parser_problem(parser: trt.OnnxParser) -> str:
    """What the parser could not take: node, operator and reason, in words. Without an error, an empty text."""
    if not parser.num_errors:
        return ""
    error = parser.get_error(0)
    reason = " ".join(error.desc().split()).rstrip(".") or "it gives no reason"
    if error.node() < 0:
        return reason
    name = getattr(error, "node_name", lambda: "")() or f"number {error.node()}"
    operator = getattr(error, "node_operator", lambda: "")()
    check = f" in {error.func()}" if error.func() else ""
    return f"node {name!r}{f' ({operator})' if operator else ''}: {error.code().name}{check}: {reason}"


def use_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> None:
    """Give the builder what it measured in an earlier build, if that is of this release and device.

    Not by polygraphy, which leaves a lock file behind and ends where the file is damaged.
    """
    if path is None or IS_RTX or not path.is_file():
        return
    cache: trt.ITimingCache | None = config.create_timing_cache(path.read_bytes())
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def timing_cache(config: trt.IBuilderConfig) -> bytes:
    """What the builder measured in this build; empty where it keeps nothing."""
    cache = None if IS_RTX else config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())
