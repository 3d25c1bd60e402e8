"""Parse and build a graph with TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export.runtime.bundle import Limits, Shape
from llama_export.runtime.recipe import Profile, profiles_of


@dataclass(frozen=True)
class Built:
    """What came of a build. problems: the parser's errors, warnings of unused inputs, the builder's errors."""

    problems: tuple[str, ...]
    plan_bytes: int
    seconds: float


def profiles(dialect: str, graph_inputs: Sequence[Any], *, context: int = 64, batch: int = 2) -> tuple[Profile, ...]:
    """The profiles of a bundle that holds this graph, by the shapes of its ONNX inputs."""
    caches = [value for value in graph_inputs if value.name.startswith("past_key_values")]
    _, kv_heads, _, head_dim = (dimension.dim_value for dimension in caches[0].type.tensor_type.shape.dim)
    shape = Shape(
        layers=len(caches) // 2,
        hidden=0,
        heads=0,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=0,
        vocab=0,
        cache_dtype="float16",
    )
    return profiles_of(dialect, shape, Limits(context, batch, 16))


def build(path: Path, profiles: Sequence[Profile], capability: str = "SM89") -> Built:
    """Build `path` with these profiles. The module has to be there."""
    import tensorrt_rtx as trt

    messages: list[tuple[Any, str]] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append((severity, message))

    begun, logger = time.perf_counter(), Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return Built(tuple(parser.get_error(index).desc() for index in range(parser.num_errors)), 0, 0)
    config = builder.create_builder_config()
    for profile in profiles:
        optimization = builder.create_optimization_profile()
        for name, extent in profile.inputs.items():
            optimization.set_shape(name, extent.minimum, extent.optimum, extent.maximum)
        config.add_optimization_profile(optimization)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    plan = builder.build_serialized_network(network, config)
    problems = [text for severity, text in messages if severity <= trt.ILogger.ERROR or "unused input" in text.lower()]
    if plan is None:
        problems.append("no plan")
    return Built(tuple(problems), 0 if plan is None else plan.nbytes, time.perf_counter() - begun)
