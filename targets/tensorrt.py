"""What each release of TensorRT that engines are made for can do, with its source.

A release decides the graph's dialect and opset, and whether the network keeps the graph's types; which weights it runs
from which compute capability on is in `optimize.schemes`. TensorRT 8.5 (JetPack 5.1) is left out: the Python 3.8 beside
it is older than what builds an engine and runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import LlamaExportError
from ..names import ONNXRUNTIME, PRODUCTS, TENSORRT, TENSORRT_RTX, TRT, TRT_PRIMITIVE
from ..optimize import policy
from ..optimize.policy import Policy
from ..optimize.schemes import RTX_BUILT, Place, scheme_named
from ..tables import listed
from .devices import Target
from .jetpack import JETPACKS, JetPack

PARSER_TABLE = "onnx-tensorrt's docs/operators.md"
OPSET_21 = (
    f"{PARSER_TABLE} of 10.0 and 10.1 tells of opsets 9 to 20, and of DequantizeLinear with INT4, which ONNX has from "
    "opset 21"
)


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
    source: str
    ahead_of_time: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """ "TensorRT 10.3.0"."""
        return f"{PRODUCTS[self.backend]} {self.version}"

    def place(self, precision: str) -> Place | None:
        """How it runs weights of `precision`, None when it does not."""
        scheme = scheme_named(precision)
        return scheme.place(self.backend, version=self.version, dialect=self.dialect) if scheme is not None else None

    def runs(self, precision: str, compute_capability: tuple[str, ...]) -> bool:
        """Whether each of these GPUs runs it, calibrated or not."""
        lowest = min(map(capability, compute_capability), default=capability("0.0"))
        place = self.place(precision)
        return place is not None and capability(place.since) <= lowest


def capability(text: str) -> tuple[int, ...]:
    """ "8.9" as numbers, which compare as they should ("10.0" is above "8.9")."""
    return tuple(int(part) for part in text.split("."))


NEWEST_TENSORRT, NEWEST_RTX = "11.4.1", "1.7.1"

_ALL = (
    Release(
        TENSORRT,
        "8.6.2",
        TRT_PRIMITIVE,
        17,
        False,
        policy.TENSORRT_8,
        f"{PARSER_TABLE} of 8.6: up to opset 17",
    ),
    Release(
        TENSORRT,
        "10.3.0",
        TRT_PRIMITIVE,
        21,
        True,
        policy.TENSORRT,
        OPSET_21,
    ),
    Release(
        TENSORRT,
        "10.13.3",
        TRT_PRIMITIVE,
        21,
        True,
        policy.TENSORRT,
        f"{OPSET_21}; Attention comes with 10.14, RotaryEmbedding, RMSNormalization and TensorScatter with 10.15",
    ),
    Release(
        TENSORRT,
        "10.16.2",
        TRT,
        24,
        True,
        policy.TENSORRT,
        f"{PARSER_TABLE} of 10.15: opsets 9 to 24",
    ),
    Release(
        TENSORRT,
        NEWEST_TENSORRT,
        TRT,
        24,
        True,
        policy.TENSORRT,
        "NVIDIA's ONNX opset guide for 11.x: up to opset 25; weak typing is removed with 11.0",
    ),
    Release(
        TENSORRT_RTX,
        NEWEST_RTX,
        TRT,
        24,
        True,
        policy.TENSORRT_RTX,
        RTX_BUILT,
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
    place = release.place(precision) if release else None
    return place is not None and place.calibrated


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
