"""Whether an engine can be built where it has to be, in memory."""

from __future__ import annotations

from dataclasses import dataclass

from .devices import GB, Target
from .made import Made
from .names import ONNXRUNTIME, TENSORRT

BUILD_BASE_BYTES = 700_000_000
BUILD_COPIES = 2.3
"""The builder's peak memory: what TensorRT takes by itself, and copies of the weights. From TensorRT-RTX 1.7.1 on
SmolLM2 for compute capability 8.9: 1.3 GB for an engine of 276 MB, 1.0 GB for one of 144 MB. TensorRT's own builder on
a Jetson was not measured.
"""

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
    peak = int(BUILD_BASE_BYTES + BUILD_COPIES * weight_bytes)
    if made.backend != TENSORRT or not target.shared_memory:
        return EngineBuild(peak, on_device=made.backend == TENSORRT, fits=True, headless=True)
    usable = int(target.usable_gb * GB)
    return EngineBuild(peak, on_device=True, fits=peak <= usable, headless=peak <= usable + DESKTOP_BYTES)
