"""What a build for a target makes, and what it does not: told at every build, never left to be found out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import LlamaExportError, UsageError
from ..names import CACHE_PRECISIONS, ONNXRUNTIME, ORT, TENSORRT, TRT, TRT_PRIMITIVE
from ..optimize import policy
from ..optimize.policy import Policy
from ..optimize.requirements import CACHE_MINIMUM_ONNXRUNTIME
from ..optimize.schemes import BLOCK_SCHEMES, CPU, CUDA, PRECISIONS, Place, known_scheme, scheme_named
from ..runtime.bundle import CPU_PROVIDER, CUDA_PROVIDER
from ..tables import listed
from .devices import Target
from .tensorrt import Release, needs_calibration, release_of

DEVICE_PYTHON = (3, 10)
"""The oldest Python that the runtime runs on."""

_INT8_CACHE_PYTHON = (3, 11)
"""The oldest Python for which there is an onnxruntime with a cache in int8: for 3.10 the newest is 1.23.2."""
_NO_ROUNDED = {
    TRT: "its TensorScatter takes neither INT8 nor FP8, and an engine that does without copies and widens all of it "
    "for each token",
    TRT_PRIMITIVE: "its products read float16, to which an engine would widen all of it for each token",
}
"""Why a dialect has no rounded cache; docs/cache.md has what was measured."""

ORT_OPSET = 21


@dataclass(frozen=True)
class Made:
    """The bundle of a target.

    backend: one of `names.BACKENDS`; dialect, opset: of the graph; activations: "float32" or "float16", which is also
    the cache's where nothing else is asked for; providers: of ONNX Runtime, in order, which for TensorRT run the same
    graph as the fallback; precisions: of weights that can be asked for; caches: of the cache, its own first; summary:
    the bundle in a few words, for a table; notes: whole sentences for the user; release: of TensorRT, None for ONNX
    Runtime.
    """

    backend: str
    dialect: str
    opset: int
    activations: str
    providers: tuple[str, ...]
    precisions: tuple[str, ...]
    blocks: tuple[str, ...]
    summary: str
    notes: tuple[str, ...]
    release: Release | None = None
    caches: tuple[str, ...] = ("fp16",)

    def policy(self) -> Policy:
        """The formats of weights that its graph can hold."""
        if self.release is not None:
            return self.release.policy
        return policy.ORT if self.activations == "float32" else policy.ORT_CUDA

    def place(self, precision: str) -> Place | None:
        """How it runs weights of a scheme; None where it does not."""
        if self.release is not None:
            return self.release.place(precision)
        scheme = scheme_named(precision)
        return None if scheme is None else scheme.place(self.backend, on=CPU if self.activations == "float32" else CUDA)

    def runs(self, precision: str) -> bool:
        """Whether weights of a scheme can be asked for."""
        scheme = scheme_named(precision)
        return scheme is not None and scheme.name in (*self.precisions, *self.blocks)

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU is what the bundle is made for."""
        return self.backend == ONNXRUNTIME and self.providers[0] == CPU_PROVIDER


def what_is_made(target: Target) -> Made:
    """What `build` makes for `target`. Raises LlamaExportError when no engines are made for it."""
    release = release_of(target)
    return _ort(target) if release is None else _engines(target, release)


def check_precision(target: Target, made: Made, precision: str, calibrated: bool) -> None:
    """Refuse weights that `target` cannot have; `calibrated`: whether a text for calibration is given.

    Raises UsageError, which says what there is.
    """
    scheme = known_scheme(precision)
    others = [word for word in made.precisions if word != precision]
    if not made.runs(precision):
        raise UsageError(
            f"{_with_release(target)} has {listed(others)} weights{_blocks_told(scheme.named_block, made)}, not "
            f"{precision}: choose one of these{''.join(f', or {way}' for way in _other_ways(target, precision))}."
        )
    if not calibrated and needs_calibration(target, precision):
        free = [word for word in others if not needs_calibration(target, word)]
        raise UsageError(
            f"{precision} on {_with_release(target)} quantises activations too, and their scales come from "
            f"calibration: add --calibrate FILE, or choose {listed(free, 'or')}."
        )


def _blocks_told(wanted: bool, made: Made) -> str:
    """The blocks that there are, for somebody who named one."""
    return f", and of those that name their block {', '.join(made.blocks) or 'none'}" if wanted else ""


def cache_dtype(target: Target, made: Made, precision: str | None) -> str:
    """The type of the cache that `--cache-precision` asks for, by default that of the activations. Raises UsageError,
    which says why there is none and what there is.
    """
    asked = precision or made.caches[0]
    if asked in made.caches:
        return CACHE_PRECISIONS[asked]
    why = _no_rounded(target, made, asked) if asked in ("int8", "fp8") else ""
    raise UsageError(
        f"{_with_release(target)} has no cache in {asked}{f', since {why}' if why else ''}: choose "
        f"{listed(made.caches, 'or')}, or leave --cache-precision out."
    )


def _no_rounded(target: Target, made: Made, asked: str) -> str:
    """Why there is no cache in 8 bits."""
    if made.dialect in _NO_ROUNDED:
        return _NO_ROUNDED[made.dialect]
    if not made.on_cpu:
        return "no such cache has been run on a GPU by us, and the CPU's kernel proves little of CUDA's"
    if asked == "fp8":
        return "ONNX Runtime has no kernel for it on CPUs"
    return (
        f"it takes ONNX Runtime {CACHE_MINIMUM_ONNXRUNTIME}, and there is none so new for the Python of JetPack "
        f"{target.jetpack}"
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
        if _runs(replace(target, jetpack=version), precision):
            yield f"--jetpack {version}"
    for backend in target.backends:
        if backend != target.backend and _runs(replace(target, backend=backend), precision):
            yield f"--backend {backend}"


def _runs(target: Target, precision: str) -> bool:
    try:
        return what_is_made(target).runs(precision)
    except LlamaExportError:  # no engines for this JetPack or GPU, so no precisions either
        return False


def _engines(target: Target, release: Release) -> Made:
    ahead, gpus = bool(release.ahead_of_time), target.compute_capability
    what = f"{release.name} engines" if ahead else f"ONNX, engine by {release.name}"
    return Made(
        backend=target.backend,
        dialect=release.dialect,
        opset=release.opset,
        activations="float16",
        providers=(CPU_PROVIDER,),
        precisions=tuple(name for name in PRECISIONS if release.runs(name, gpus)),
        blocks=tuple(name for name in BLOCK_SCHEMES if release.runs(name, gpus)),
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
    formats = (policy.ORT_CUDA if on_cuda else policy.ORT).precisions
    device = "device" if target.kind == "jetson" else "computer"
    where = f"the {device}'s GPU through CUDA" if on_cuda else f"the {device}'s CPU"
    makes = f"An `{ORT}` bundle with {activations} activations, which ONNX Runtime runs on {where}."
    return Made(
        backend=ONNXRUNTIME,
        dialect=ORT,
        opset=ORT_OPSET,
        activations=activations,
        providers=providers,
        precisions=tuple(name for name in PRECISIONS if name in formats),
        blocks=tuple(name for name in BLOCK_SCHEMES if name in formats),
        summary="ort for CUDA" if on_cuda else "ort for the CPU",
        notes=(makes, *_unused_notes(target, on_cuda=on_cuda), *_python_notes(target)),
        caches=("fp16",) if on_cuda else ("fp32", "int8") if _python(target) >= _INT8_CACHE_PYTHON else ("fp32",),
    )


def _unused_notes(target: Target, *, on_cuda: bool) -> tuple[str, ...]:
    return () if target.kind == "cpu" or on_cuda else ("The GPU stays unused.",)


def _python(target: Target) -> tuple[int, ...]:
    """The version of the Python that a Jetson comes with; for other targets that of any build."""
    return tuple(int(part) for part in target.release.python.split(".")) if target.release else _INT8_CACHE_PYTHON


def _python_notes(target: Target) -> tuple[str, ...]:
    release = target.release
    if release is None or _python(target) >= DEVICE_PYTHON:
        return ()
    oldest = ".".join(map(str, DEVICE_PYTHON))
    return (
        f"JetPack {release.version} comes with Python {release.python}: running the bundle there takes "
        f"Python {oldest} or newer beside it.",
    )
