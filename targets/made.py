"""What a build for a target makes today, and what it does not: told at every build, never left to be found out."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.bundle import CPU_PROVIDER, CUDA_PROVIDER
from .devices import Target

DEVICE_PYTHON = (3, 10)
"""The oldest Python that the runtime runs on."""


@dataclass(frozen=True)
class Made:
    """The bundle of a target.

    dialect: of the graph; activations: "float32" or "float16", which is also the cache's; providers: of ONNX Runtime,
    in order; summary: the bundle in a few words, for a table; notes: whole sentences for the user.
    """

    dialect: str
    activations: str
    providers: tuple[str, ...]
    summary: str
    notes: tuple[str, ...]

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU provider runs the bundle."""
        return self.providers[0] == CPU_PROVIDER


def what_is_made(target: Target) -> Made:
    """What `build` makes for `target`."""
    on_cuda = target.providers[0] == CUDA_PROVIDER
    activations = "float16" if on_cuda else "float32"
    device = "device" if target.kind == "jetson" else "computer"
    where = f"the {device}'s GPU through CUDA" if on_cuda else f"the {device}'s CPU"
    makes = f"An `ort` bundle with {activations} activations, which ONNX Runtime runs on {where}."
    return Made(
        dialect="ort",
        activations=activations,
        providers=target.providers,
        summary="ort for CUDA" if on_cuda else "ort for the CPU",
        notes=(makes, *_engine_notes(target), *_python_notes(target)),
    )


def _engine_notes(target: Target) -> tuple[str, ...]:
    if target.backend == "onnxruntime":
        return ()
    product = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[target.backend]
    return (f"No {product} engine: this version does not build engines yet, so the GPU stays unused.",)


def _python_notes(target: Target) -> tuple[str, ...]:
    release = target.release
    if release is None or tuple(int(part) for part in release.python.split(".")) >= DEVICE_PYTHON:
        return ()
    oldest = ".".join(map(str, DEVICE_PYTHON))
    return (
        f"JetPack {release.version} comes with Python {release.python}: running the bundle there takes "
        f"Python {oldest} or newer beside it.",
    )
