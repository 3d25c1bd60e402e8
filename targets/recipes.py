"""The recipe of a target's engines: what `build` writes and every builder follows, here or on the device."""

from __future__ import annotations

from collections.abc import Mapping

from ..names import MODULES, TENSORRT, TENSORRT_RTX
from ..runtime.bundle import Limits, Shape
from ..runtime.recipe import Recipe, profiles_of
from .tensorrt import Release

FLOAT32_LAYERS = ("/float32/",)
"""In the names of nodes that compute in float32 whatever else the builder chooses: `optimize.graph.FLOAT32_SCOPE`."""

OPTIMIZATION_LEVEL = 3
"""TensorRT's own default; 4 and 5 try many more kernels, for hours on a small device."""

_JETSON_WORKSPACE = 1 << 30
"""What kernels may ask for while they are timed, on a device whose memory the CPU shares; elsewhere TensorRT's own."""

_BASE_BYTES: Mapping[str, int] = {TENSORRT: 2_000_000_000, TENSORRT_RTX: 600_000_000}
_PER_WEIGHT: Mapping[str, float] = {TENSORRT: 3.0, TENSORRT_RTX: 2.5}
"""Bytes that a builder takes for itself whatever the model, and for each byte of weights beside the mapped file.

Measured for TensorRT-RTX 1.7.1: int4 711 MB for 93 MB of weights (30 layers), 2147 for 844 (16 layers); int8 710 for
174; fp16 1120 for 270 and 6723 for 2472, as the two profiles want some dense weights laid out differently. TensorRT has
not been run: assumed are CUDA's context, the libraries of its kernels, and a copy of the weights on the GPU to time
kernels with.
"""


def recipe_for(
    release: Release,
    compute_capability: tuple[str, ...],
    shape: Shape,
    limits: Limits,
    *,
    weights: int,
    quantises_activations: bool = False,
    shared_memory: bool = False,
) -> Recipe:
    """How the engines of a bundle are built by `release` for GPUs of `compute_capability`.

    weights: bytes of model.onnx.data. quantises_activations: the graph rounds what products read to int8 (W8A8), which
    a network that is not strongly typed has to allow. shared_memory: the device's CPU and GPU use the same memory.
    """
    weak = not release.strongly_typed
    flags = ("FP16", *(("INT8",) if quantises_activations else ()), "PREFER_PRECISION_CONSTRAINTS")
    workspace = workspace_bytes(release.backend, shared_memory=shared_memory)
    return Recipe(
        module=MODULES[release.backend],
        version=release.version,
        compute_capability=compute_capability,
        strongly_typed=release.strongly_typed,
        flags=flags if weak else (),
        float32_layers=FLOAT32_LAYERS if weak else (),
        workspace_bytes=workspace,
        optimization_level=OPTIMIZATION_LEVEL,
        build_memory_bytes=build_memory(release.backend, weights) + workspace,
        profiles=profiles_of(release.dialect, shape, limits),
    )


def workspace_bytes(backend: str, *, shared_memory: bool) -> int:
    """Bytes that kernels may ask for while they are timed; 0 leaves it to TensorRT."""
    return _JETSON_WORKSPACE if shared_memory and backend != TENSORRT_RTX else 0


def build_memory(backend: str, weights: int) -> int:
    """Bytes that building an engine takes for itself, an estimate. weights: bytes of model.onnx.data."""
    return _BASE_BYTES[backend] + round(_PER_WEIGHT[backend] * weights)
