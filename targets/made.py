"""What a build for a target makes, and what it does not: told at every build, never left to be found out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import LlamaExportError, UsageError
from ..names import ONNXRUNTIME, ORT, PRODUCTS, TENSORRT
from ..optimize import policy
from ..optimize.policy import Policy
from ..runtime.bundle import CPU_PROVIDER, CUDA_PROVIDER
from ..tables import listed
from .devices import Target
from .tensorrt import CALIBRATABLE, Release, needs_calibration, release_of

DEVICE_PYTHON = (3, 10)
"""The oldest Python that the runtime runs on."""

ORT_OPSET = 21
ORT_PRECISIONS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Made:
    """The bundle of a target.

    backend: one of `names.BACKENDS`; dialect, opset: of the graph; activations: "float32" or "float16", which is also
    the cache's; providers: of ONNX Runtime, in order, which for TensorRT run the same graph as the fallback;
    precisions: of weights that can be asked for; summary: the bundle in a few words, for a table; notes: whole
    sentences for the user; release: of TensorRT, None for ONNX Runtime.
    """

    backend: str
    dialect: str
    opset: int
    activations: str
    providers: tuple[str, ...]
    precisions: tuple[str, ...]
    summary: str
    notes: tuple[str, ...]
    release: Release | None = None

    def policy(self, *, calibrated: bool = False) -> Policy:
        """The formats of weights that its graph can hold; `calibrated`: where activations are quantised too."""
        if self.release is None:
            return policy.ORT
        return self.release.policy.calibrated() if calibrated else self.release.policy

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU is what the bundle is made for."""
        return self.backend == ONNXRUNTIME and self.providers[0] == CPU_PROVIDER


def what_is_made(target: Target) -> Made:
    """What `build` makes for `target`. Raises LlamaExportError when no engines are made for it."""
    release = release_of(target)
    return _ort(target) if release is None else _engines(target, release)


def check_precision(target: Target, made: Made, precision: str, calibrated: bool) -> None:
    """Refuse weights that `target` cannot have; `calibrated`: whether samples for calibration are given.

    Raises UsageError, which says what there is.
    """
    check_head_precision(target, made, precision, calibrated)
    if calibrated and (made.backend == ONNXRUNTIME or precision not in CALIBRATABLE):
        raise UsageError(
            f"--calibrate finds scales for activations, which {precision} weights on {PRODUCTS[made.backend]} do not "
            f"have; leave it out, or choose {listed(CALIBRATABLE, 'or')} for TensorRT."
        )


def check_head_precision(target: Target, made: Made, precision: str, calibrated: bool) -> None:
    """The same of the output head, which may be left out of what is calibrated. Raises UsageError."""
    if precision not in made.precisions:
        others = [word for word in made.precisions if word != precision]
        raise UsageError(
            f"{_with_release(target)} has {listed(others)} weights, not {precision}: choose one of these"
            f"{''.join(f', or {way}' for way in _other_ways(target, precision))}."
        )
    if not calibrated and needs_calibration(target, precision):
        others = [word for word in made.precisions if word != precision]
        raise UsageError(
            f"{precision} on {_with_release(target)} quantises activations too, and their scales come from "
            f"calibration: add --calibrate FILE, or choose {listed(others, 'or')}."
        )


def _with_release(target: Target) -> str:
    """The target's name and what decides its precisions."""
    release = release_of(target)
    if release is None:
        return f"{target.name} with ONNX Runtime"
    gpus = f"compute capability {listed(target.compute_capability)}"
    return f"{target.name} ({f'JetPack {target.jetpack}, ' if target.release else ''}{release.name}, {gpus})"


def _other_ways(target: Target, precision: str) -> Iterator[str]:
    """The options with which `target` has `precision`."""
    for version in target.jetpacks if target.backend == TENSORRT else ():
        if precision in _precisions(replace(target, jetpack=version)):
            yield f"--jetpack {version}"
    for backend in target.backends:
        if backend != target.backend and precision in _precisions(replace(target, backend=backend)):
            yield f"--backend {backend}"


def _precisions(target: Target) -> tuple[str, ...]:
    try:
        return what_is_made(target).precisions
    except LlamaExportError:  # no engines for this JetPack or GPU, so no precisions either
        return ()


def _engines(target: Target, release: Release) -> Made:
    ahead = bool(release.ahead_of_time)
    what = f"{release.name} engines" if ahead else f"ONNX, engine by {release.name}"
    return Made(
        backend=target.backend,
        dialect=release.dialect,
        opset=release.opset,
        activations="float16",
        providers=(CPU_PROVIDER,),
        precisions=release.precisions(target.compute_capability),
        summary=what,
        notes=(*(_ahead_notes(target, release) if ahead else _recipe_notes(target, release)),),
        release=release,
    )


def _ahead_notes(target: Target, release: Release) -> Iterator[str]:
    yield (
        f"A `{release.dialect}` bundle with float16 activations and {release.name} engines for compute capability "
        f"{listed(target.compute_capability)}, which are built here without a GPU; ONNX Runtime runs the same graph on "
        "the CPU."
    )
    yield "No such engine has been run on a GPU by us: `verify` on the computer itself is the proof."
    if target.kind == "spark":
        yield (
            "Whether an engine built on x86-64 loads on this ARM64 computer is unproven: where it does not, "
            "`llama-export engine` builds it there from the recipe in the bundle."
        )


def _recipe_notes(target: Target, release: Release) -> Iterator[str]:
    jetson = target.kind == "jetson"
    device = "Jetson" if jetson else "computer"
    origin = f"{release.name} of JetPack {target.jetpack}" if jetson else release.name
    yield (
        f"A `{release.dialect}` bundle with float16 activations and a recipe, by which `llama-export engine` builds "
        f"the engine on the {device} with its {origin}: it cannot be built anywhere else; ONNX Runtime runs the same "
        "graph on the CPU."
    )
    where = "a Jetson" if jetson else "such a GPU"
    yield f"No such engine has been built or run on {where} by us: `verify` on the {device} itself is the proof."


def _ort(target: Target) -> Made:
    providers = target.providers
    on_cuda = providers[0] == CUDA_PROVIDER
    activations = "float16" if on_cuda else "float32"
    device = "device" if target.kind == "jetson" else "computer"
    where = f"the {device}'s GPU through CUDA" if on_cuda else f"the {device}'s CPU"
    makes = f"An `{ORT}` bundle with {activations} activations, which ONNX Runtime runs on {where}."
    return Made(
        backend=ONNXRUNTIME,
        dialect=ORT,
        opset=ORT_OPSET,
        activations=activations,
        providers=providers,
        precisions=ORT_PRECISIONS,
        summary="ort for CUDA" if on_cuda else "ort for the CPU",
        notes=(makes, *_unused_notes(target, on_cuda=on_cuda), *_python_notes(target)),
    )


def _unused_notes(target: Target, *, on_cuda: bool) -> tuple[str, ...]:
    return () if target.kind == "cpu" or on_cuda else ("The GPU stays unused.",)


def _python_notes(target: Target) -> tuple[str, ...]:
    release = target.release
    if release is None or tuple(int(part) for part in release.python.split(".")) >= DEVICE_PYTHON:
        return ()
    oldest = ".".join(map(str, DEVICE_PYTHON))
    return (
        f"JetPack {release.version} comes with Python {release.python}: running the bundle there takes "
        f"Python {oldest} or newer beside it.",
    )
