"""Choosing among what a target has: the JetPack of a Jetson, and the backend that runs the bundle."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from ..errors import UsageError, did_you_mean
from ..names import BACKENDS, SHORT_BACKENDS
from ..tables import listed
from .devices import Target
from .jetpack import JETPACKS
from .tensorrt import needs_calibration, release_of

FALLBACK_PRECISION = "fp16"
"""What every release of TensorRT runs, without calibration."""


def choose(target: Target, *, jetpack: str | None = None, backend: str | None = None) -> Target:
    """`target` with another JetPack ("6.1") or backend ("tensorrt-rtx", or "rtx" for short), where they are given.

    A default precision that the outcome lacks becomes fp16. Raises UsageError for what the target does not have, and
    LlamaExportError when no engines are made for the outcome.
    """
    if backend is not None:
        target = _changed(target, backend=_backend(target, backend))
    if jetpack is not None:
        target = _changed(target, jetpack=_jetpack(target, jetpack))
    return with_possible_precision(target)


def with_possible_precision(target: Target) -> Target:
    """`target` with a default precision that its TensorRT runs without calibration. Raises LlamaExportError when no
    engines are made for it.
    """
    release, precision = release_of(target), target.default_precision
    if release is None:
        return target
    if release.runs(precision, target.compute_capability) and not needs_calibration(target, precision):
        return target
    reason = f"{release.name} does not run {precision} here without calibration"
    sources = {**target.sources, "default_precision": reason}
    return replace(target, default_precision=FALLBACK_PRECISION, sources=MappingProxyType(sources))


def _changed(target: Target, **facts: str) -> Target:
    sources = {**target.sources, **{fact: f"chosen with --{fact}" for fact in facts}}
    return replace(target, **facts, sources=MappingProxyType(sources))  # type: ignore[arg-type]  # all strings


def _backend(target: Target, word: str) -> str:
    backend = SHORT_BACKENDS.get(word, word)
    if backend in target.backends:
        return backend
    hint = did_you_mean(word, (*target.backends, *SHORT_BACKENDS)) if backend not in BACKENDS else ""
    raise UsageError(
        f"--backend {word} is none that {target.name} has.{hint} It has {listed(target.backends)}; choose from these."
    )


def _jetpack(target: Target, word: str) -> str:
    if not target.jetpacks:
        raise UsageError(f"--jetpack is for Jetsons, which {target.name} is not; leave it out.")
    version = ".".join(word.split(".")[:2])  # 6.2.1 is a 6.2
    if version in target.jetpacks:
        return version
    what = f"{target.name} never had JetPack {word}" if version in JETPACKS else f"There is no JetPack {word}"
    raise UsageError(f"{what}; {target.name} had {listed(target.jetpacks)}, choose from these.")
