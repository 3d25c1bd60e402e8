"""What TensorRT, TensorRT-RTX and CUDA are here, and what is missing to run engines: a part of `doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import LlamaExportError
from .installed import installed_version
from .names import MODULES, TENSORRT, TENSORRT_RTX
from .runtime.tensorrt import this_gpu
from .runtime.tensorrt.api import PRODUCTS, import_module
from .runtime.tensorrt.cuda import Gpu
from .tables import size

RTX = MODULES[TENSORRT_RTX]
DISTRIBUTIONS = {MODULES[TENSORRT]: "tensorrt", RTX: "tensorrt-rtx-cu13"}
BINDINGS = ("cuda-bindings", "cuda-python")
"""Distributions with CUDA for Python: the second is the older."""


@dataclass(frozen=True)
class Finding:
    """What a machine can or cannot do; remedy: what to do about it, empty when it can."""

    able: bool
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Engines:
    """versions: of the modules that import, "tensorrt" or "tensorrt_rtx"; absent: why the others do not; bindings: what
    CUDA for Python is, None without; gpu: as CUDA sees it, None where `no_gpu` says why.
    """

    versions: Mapping[str, str]
    absent: Mapping[str, str]
    bindings: str | None
    gpu: Gpu | None
    no_gpu: str


def examine_engines() -> Engines:
    """Import what there is, and ask CUDA for its GPU."""
    versions, absent = {}, {}
    for name in PRODUCTS:
        try:
            versions[name] = str(import_module(name).__version__)
        except LlamaExportError as error:  # noqa: PERF203 (two modules at most)
            absent[name] = str(error)
    found = ((name, installed_version(name)) for name in BINDINGS)
    bindings = next((f"{name} {version}" for name, version in found if version), None)
    try:
        return Engines(versions, absent, bindings, this_gpu(), "")
    except LlamaExportError as error:
        return Engines(versions, absent, bindings, None, str(error))


def engine_rows(found: Engines) -> list[tuple[str, str]]:
    """Lines of the report: what it is, and what is here; none for what nobody installed."""
    rows = [(PRODUCTS[name], version) for name, version in found.versions.items()]
    if gpu := found.gpu:
        told = f"driver for CUDA {gpu.driver}, {size(gpu.free_bytes)} of {size(gpu.total_bytes)} free"
        rows.append(("CUDA", f"{told}, {found.bindings or 'CUDA for Python'}"))
    elif found.bindings:
        rows.append(("CUDA", f"{found.bindings}, no GPU that it can use"))
    return rows


def engine_verdicts(found: Engines, *, has_gpu: bool, is_jetson: bool) -> list[Finding]:
    """What this machine can do with engines. has_gpu, is_jetson: what is known of it without CUDA."""
    verdicts = [
        Finding(False, f"engines with {PRODUCTS[name]}", why)
        for name, why in found.absent.items()
        if installed_version(DISTRIBUTIONS[name]) or (is_jetson and name == MODULES[TENSORRT])
    ]
    for name, version in found.versions.items():
        product = f"{PRODUCTS[name]} {version}"
        if found.gpu is not None:
            verdicts.append(Finding(True, f"build and run engines with {product} on {found.gpu.name}"))
        elif has_gpu or is_jetson:
            verdicts.append(Finding(False, f"run engines with {product} on the GPU", found.no_gpu))
        elif name == RTX:
            verdicts.append(Finding(True, f"build engines with {product} for other machines; there is no GPU here"))
    return verdicts
