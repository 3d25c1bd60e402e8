"""What each release of TensorRT that engines are made for can do, with its source.

A release decides the graph's dialect and opset, whether the network keeps the graph's types, and which precisions of
weights it runs from which compute capability on. TensorRT 8.5 (JetPack 5.1) is left out: the Python 3.8 beside it is
older than what builds an engine and runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import LlamaExportError
from ..names import ONNXRUNTIME, PRODUCTS, TENSORRT, TENSORRT_RTX, TRT, TRT_PRIMITIVE
from ..optimize import policy
from ..optimize.policy import Policy
from ..tables import listed
from .devices import Target
from .jetpack import JETPACKS, JetPack

PARSER_TABLE = "onnx-tensorrt's docs/operators.md"
OPSET_21 = (
    f"{PARSER_TABLE} of 10.0 and 10.1 tells of opsets 9 to 20, and of DequantizeLinear with INT4, which ONNX has from "
    "opset 21"
)
MEASURED_RTX = "parsed and built with TensorRT-RTX 1.7.1 on a computer without a GPU"


@dataclass(frozen=True)
class Ability:
    """A precision of weights that a release runs.

    since: the lowest compute capability. calibrated: the activations are quantised as well, by scales that only
    calibration finds, so it cannot be had without.
    """

    precision: str
    since: str
    source: str
    calibrated: bool = False


@dataclass(frozen=True)
class Release:
    """One release of TensorRT or TensorRT-RTX.

    dialect, opset: of the graph that its parser takes. strongly_typed: networks keep the graph's types; otherwise the
    builder chooses them by flags. policy: the formats of weights that its graphs can hold. ahead_of_time: compute
    capabilities for which it builds engines on a computer without that GPU.
    """

    backend: str
    version: str
    dialect: str
    opset: int
    strongly_typed: bool
    policy: Policy
    abilities: tuple[Ability, ...]
    source: str
    ahead_of_time: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """ "TensorRT 10.3.0"."""
        return f"{PRODUCTS[self.backend]} {self.version}"

    def ability(self, precision: str) -> Ability | None:
        """How it runs weights of `precision`, None when it does not."""
        return next((ability for ability in self.abilities if ability.precision == precision), None)

    def precisions(self, compute_capability: tuple[str, ...]) -> tuple[str, ...]:
        """What runs on each of these GPUs, calibrated or not, in the order of `names.PRECISIONS`."""
        lowest = min(map(capability, compute_capability), default=capability("0.0"))
        return tuple(ability.precision for ability in self.abilities if capability(ability.since) <= lowest)


def capability(text: str) -> tuple[int, ...]:
    """ "8.9" as numbers, which compare as they should ("10.0" is above "8.9")."""
    return tuple(int(part) for part in text.split("."))


_FP16 = Ability("fp16", "5.3", "NVIDIA's TensorRT support matrix: every GPU that these releases run on")
_W8A8 = Ability(
    "int8",
    "6.1",
    "NVIDIA's TensorRT documentation: INT8 takes Q/DQ on both sides of a product; weight-only exists for INT4 alone",
    calibrated=True,
)
_INT4 = Ability(
    "int4", "8.0", "TensorRT 10.0 release notes: INT4 weight-only by blocked DequantizeLinear; Ampere and later"
)
_FP8 = Ability("fp8", "8.9", "NVIDIA's TensorRT documentation: FP8 products from compute capability 8.9")
_NVFP4 = Ability("nvfp4", "10.0", "TensorRT 10.8 release notes: FP4 from compute capability 10.0")

_RTX = (
    Ability("fp16", "7.5", MEASURED_RTX),
    Ability("int8", "8.0", f"{MEASURED_RTX}: weight-only; the TensorRT-RTX support matrix has none for 7.5"),
    Ability("int4", "8.0", f"{MEASURED_RTX}: not for 7.5"),
    Ability("fp8", "8.9", f"{MEASURED_RTX}: from 8.9"),
    Ability("nvfp4", "12.0", f"{MEASURED_RTX}: from 12.0"),
)

CALIBRATABLE = ("int8", "fp8")
"""Precisions whose activations can be quantised too, by scales that calibration finds."""

NEWEST_TENSORRT, NEWEST_RTX = "11.4.1", "1.7.1"

_ALL = (
    Release(
        TENSORRT,
        "8.6.2",
        TRT_PRIMITIVE,
        17,
        False,
        policy.TENSORRT_8,
        (_FP16, _W8A8),
        f"{PARSER_TABLE} of 8.6: up to opset 17",
    ),
    Release(
        TENSORRT,
        "10.3.0",
        TRT_PRIMITIVE,
        21,
        True,
        policy.TENSORRT,
        (_FP16, _W8A8, _INT4, _FP8),
        OPSET_21,
    ),
    Release(
        TENSORRT,
        "10.13.3",
        TRT_PRIMITIVE,
        21,
        True,
        policy.TENSORRT,
        (_FP16, _W8A8, _INT4, _FP8),
        f"{OPSET_21}; Attention comes with 10.14, RotaryEmbedding, RMSNormalization and TensorScatter with 10.15",
    ),
    Release(
        TENSORRT,
        "10.16.2",
        TRT,
        24,
        True,
        policy.TENSORRT,
        (_FP16, _W8A8, _INT4, _FP8, _NVFP4),
        f"{PARSER_TABLE} of 10.15: opsets 9 to 24",
    ),
    Release(
        TENSORRT,
        NEWEST_TENSORRT,
        TRT,
        24,
        True,
        policy.TENSORRT,
        (_FP16, _W8A8, _INT4, _FP8, _NVFP4),
        "NVIDIA's ONNX opset guide for 11.x: up to opset 25; weak typing is removed with 11.0",
    ),
    Release(
        TENSORRT_RTX,
        NEWEST_RTX,
        TRT,
        24,
        True,
        policy.TENSORRT_RTX,
        _RTX,
        MEASURED_RTX,
        ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    ),
)

RELEASES: Mapping[tuple[str, str], Release] = MappingProxyType({(item.backend, item.version): item for item in _ALL})
"""By backend and version."""


def has_engines(backend: str, version: str) -> bool:
    """Whether engines are made for this release."""
    return (backend, version) in RELEASES


def release_of(target: Target) -> Release | None:
    """The release that engines for `target` are made for, None where ONNX Runtime runs its bundles.

    On a Jetson it is what the JetPack brings; elsewhere the newest, which the user installs. Raises LlamaExportError
    for a JetPack whose TensorRT is too old, and for GPUs that TensorRT-RTX has no engines for.
    """
    if target.backend == TENSORRT_RTX:
        return _release_for_gpus(RELEASES[TENSORRT_RTX, NEWEST_RTX], target)
    if target.backend != TENSORRT:
        return None
    if target.release is None:
        return RELEASES[TENSORRT, NEWEST_TENSORRT]
    found = RELEASES.get((TENSORRT, target.release.tensorrt))
    if found is None:
        raise LlamaExportError(_too_old(target, target.release))
    return found


def needs_calibration(target: Target, precision: str) -> bool:
    """Whether weights of `precision` take scales of activations there, which `build` finds with --calibrate."""
    release = release_of(target)
    ability = release.ability(precision) if release else None
    return ability is not None and ability.calibrated


def _release_for_gpus(release: Release, target: Target) -> Release:
    foreign = [gpu for gpu in target.compute_capability if gpu not in release.ahead_of_time]
    if foreign:
        raise LlamaExportError(
            f"{target.name} has compute capability {listed(foreign)}, but {release.name} builds engines for "
            f"{listed(release.ahead_of_time)} alone; choose another backend of {listed(target.backends)}."
        )
    return release


def _too_old(target: Target, jetpack: JetPack) -> str:
    newer = [version for version in target.jetpacks if has_engines(TENSORRT, JETPACKS[version].tensorrt)]
    ways = (
        f"a device that was updated takes --jetpack {listed(newer, 'or')}" if newer else "",
        f"--backend {ONNXRUNTIME} makes a bundle for the CPU" if ONNXRUNTIME in target.backends else "",
    )
    return (
        f"No engines are made for JetPack {jetpack.version}, which has TensorRT {jetpack.tensorrt} and Python "
        f"{jetpack.python}: {', and '.join(filter(None, ways)) or 'take another target'}."
    )
