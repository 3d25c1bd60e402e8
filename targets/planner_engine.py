"""Whether an engine can be built where it has to be, in memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..names import ONNXRUNTIME, TENSORRT
from .devices import GB, Target
from .made import Made
from .recipes import build_memory, workspace_bytes

DESKTOP_BYTES = 800_000_000
"""What a Jetson whose desktop is closed has free in addition; an assumption."""


@dataclass(frozen=True)
class EngineBuild:
    """Where an engine is built and what that takes.

    on_device: it can be built nowhere else, in the memory of the target; otherwise the computer that builds the bundle
    does it. fits: whether the target's memory will do (always, where the engine is built here); headless: whether it
    will once the desktop is closed.
    """

    peak_bytes: int
    on_device: bool
    fits: bool
    headless: bool


def engine_build(target: Target, made: Made, weight_bytes: int) -> EngineBuild | None:
    """What building the engine of weights of `weight_bytes` takes; None where ONNX Runtime runs the bundle."""
    if made.backend == ONNXRUNTIME:
        return None
    workspace = workspace_bytes(made.backend, shared_memory=target.shared_memory)
    peak = build_memory(made.backend, weight_bytes) + workspace
    if made.backend != TENSORRT or not target.shared_memory:
        return EngineBuild(peak, on_device=made.backend == TENSORRT, fits=True, headless=True)
    usable = int(target.usable_gb * GB)
    return EngineBuild(peak, on_device=True, fits=peak <= usable, headless=peak <= usable + DESKTOP_BYTES)
