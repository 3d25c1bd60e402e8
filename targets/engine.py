"""Building one engine in this process: parse the graph, check it, build, and write the plan while it is built.

`engine_process` runs this in a process of its own. Of polygraphy it takes what makes profiles and settings
(`engine_api.create_config`). Its other loaders do not fit: they log to polygraphy's one logger, where we need the
lines of this build and the parser's errors by node, and they hold the whole plan in memory, where we write it piece by
piece. The parser reads the weights by mapping model.onnx.data (`parse_from_file`), so they are not in memory twice
before the builder begins.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LlamaExportError
from ..runtime.files import replace
from ..runtime.recipe import Recipe
from .engine_api import (
    create_config,
    create_network,
    has_stream,
    keep_float32,
    parser_problem,
    timing_cache,
    told_version,
    trt,
    use_timing_cache,
)
from .engine_graph import users
from .engine_log import BuildLog, Phases, monitor
from .engine_process import Built

_SAMPLED_SECONDS = 0.02


class BuildStopped(Exception):  # noqa: N818 (no error: the user wanted it)
    """The build ended because it was told to."""


def build_plan(
    graph: Path, label: str, recipe: Recipe, plan: Path, log_file: Path, cache: Path | None, phases: Phases
) -> Built:
    """Build the engine of `graph` and write it to `plan`; everything that the builder says goes to `log_file`.

    label: what the engine is called. cache: the timing cache, read where it is there and written after the build.
    Raises LlamaExportError that names the node where the graph cannot be parsed, and `BuildStopped` when `phases` says
    so. A plan that was begun is left to the caller.
    """
    began = time.monotonic()
    log = BuildLog(log_file)
    capabilities = ", ".join(recipe.compute_capability)
    log.note(f"{told_version()} builds {graph.name} for compute capability {capabilities}")
    with _Memory() as memory:
        builder = trt.Builder(log)
        network = create_network(builder, recipe)
        _parse(network, log, graph)
        _check_inputs(network, recipe, graph)
        network.name = label
        if not recipe.strongly_typed:
            log.note(f"{keep_float32(network, recipe.float32_layers)} layers stay in float32")
        config = create_config(builder, network, recipe, monitor(phases))
        use_timing_cache(config, cache)
        _write_plan(builder, network, config, plan, log, phases)
        measured = timing_cache(config)
    if cache is not None and measured:
        _keep(cache, measured, log)
    built = Built(trt.__version__, plan.stat().st_size, time.monotonic() - began, memory.peak)
    log.note(f"{built.size} bytes in {built.seconds:.1f} s; most memory beside mapped files: {built.peak_bytes} bytes")
    return built


def _parse(network: trt.INetworkDefinition, log: BuildLog, graph: Path) -> None:
    parser = trt.OnnxParser(network, log)
    parsed: Any = parser.parse_from_file(str(graph))
    problem = parser_problem(parser)
    if not problem and not parsed:
        problem = log.errors[0] if log.errors else "it gives no reason"
    if problem:
        raise LlamaExportError(f"The parser of {told_version()} does not take {graph.name}: {problem}.")
    if not network.num_layers or not network.num_outputs:
        raise LlamaExportError(f"{graph.name} is empty or damaged: {told_version()} finds no nodes or outputs in it.")
    for name in log.unused:
        raise _unused(name, graph)


def _check_inputs(network: trt.INetworkDefinition, recipe: Recipe, graph: Path) -> None:
    """Refuse inputs that nothing reads, which the parser drops with a warning, and profiles of another graph."""
    read = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = (layer.get_input(number) for number in range(layer.num_inputs))
        read |= {tensor.name for tensor in inputs if tensor is not None}
    ranks = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name not in read:
            raise _unused(tensor.name, graph)
        ranks[tensor.name] = len(tensor.shape)
    for profile in recipe.profiles:
        given = {name: len(extent.maximum) for name, extent in profile.inputs.items()}
        if given != ranks:
            wrong = sorted(name for name in {*given, *ranks} if given.get(name) != ranks.get(name))
            raise LlamaExportError(
                f"The recipe's profile {profile.name!r} does not fit {graph.name} in {', '.join(wrong[:4])}; "
                "build the bundle again."
            )


def _unused(name: str, graph: Path) -> LlamaExportError:
    nodes = users(graph.read_bytes(), name)
    if not nodes:
        return LlamaExportError(f"No node of {graph.name} reads the input {name!r}: build the bundle again.")
    return LlamaExportError(
        f"{told_version()} drops the input {name!r} of {graph.name}, which node {', '.join(nodes[:3])} reads, so the "
        "engine would compute something else; build the bundle again for this release."
    )


def _write_plan(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    path: Path,
    log: BuildLog,
    phases: Phases,
) -> None:
    with path.open("wb") as file:
        if has_stream():
            writer = _writer(file.write)
            done: Any = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.error is not None:
                raise writer.error
        else:
            plan: Any = builder.build_serialized_network(network, config)
            done = plan is not None
            if done:
                file.write(plan)
        file.flush()
        os.fsync(file.fileno())
    if phases.stopped():
        raise BuildStopped
    if not done:
        reason = " ".join(log.errors[0].split()).rstrip(".") if log.errors else "it gives no reason"
        raise LlamaExportError(f"{told_version()} could not build the engine: {reason}.")


def _writer(write: Callable[[bytes], int]) -> Any:
    """An IStreamWriter; an error of the disk waits in `error`, since nothing may be raised into the builder."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes, *_: int) -> int:  # type: ignore[override]  # as its documentation has it
            try:
                return write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()


def _keep(path: Path, data: bytes, log: BuildLog) -> None:
    """Write what the builder measured; without it the next build only takes longer."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        replace(part, path)
    except (OSError, LlamaExportError) as error:
        log.note(f"what was measured is not kept: {error}")
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


class _Memory:
    """The most memory that this process has for itself while the context lasts, sampled."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        if sys.platform == "linux":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        """/proc/self/statm: pages resident, and of those the pages of files (proc_pid_statm(5))."""
        assert sys.platform == "linux", "`__enter__` starts this nowhere else"
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._end.wait(_SAMPLED_SECONDS):
            resident, shared = (int(word) for word in Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3])
            self.peak = max(self.peak or 0, (resident - shared) * page)
