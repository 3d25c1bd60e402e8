"""What this machine has, what it can do, and the command that mends what is missing: for `llama-export doctor`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .doctor_engines import Engines, Finding, engine_rows, engine_verdicts, examine_engines
from .installed import BASE, Package, installed_version, packages_by_extra, untested_versions
from .runtime.bundle import CUDA_PROVIDER
from .runtime.hashes import cache_folder
from .runtime.threads import physical_cores, usable_cpus
from .tables import columns, size
from .targets.host import Machine, host_target, read_machine

BUILD_PYTHON = ((3, 11), (3, 13))
LOW_DISK_BYTES = 5_000_000_000
RUNTIME_MODULES = ("onnxruntime", "onnxruntime-gpu")
SHOWN_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "XDG_CACHE_HOME",
    "LOCALAPPDATA",
    "LLAMA_EXPORT_DEBUG",
)
_NO_FLAGS = {"Linux": "none of those that quicken int8 and int4"}
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class OnnxRuntime:
    """The module `onnxruntime` as it imports here; error: why it does not."""

    version: str | None
    providers: tuple[str, ...]
    error: str | None = None


@dataclass(frozen=True)
class Surroundings:
    """Everything that was looked at. cpus: logical ones, on `cores`; python: major, minor, micro; free: bytes by
    folder; variables: only those set; engines: None where nobody looked.
    """

    machine: Machine
    cpus: int
    cores: int
    python: tuple[int, int, int]
    packages: Mapping[str, tuple[Package, ...]]
    untested: tuple[str, ...]
    both_runtimes: bool
    onnxruntime: OnnxRuntime
    free: Mapping[str, int]
    variables: Mapping[str, str]
    settings_error: str | None
    engines: Engines | None = None


def examine(settings_error: str | None = None) -> Surroundings:
    """Look at this machine; imports onnxruntime, TensorRT and CUDA where they are, and nothing else that is heavy."""
    return Surroundings(
        machine=read_machine(),
        cpus=len(usable_cpus()),
        cores=physical_cores(),
        python=sys.version_info[:3],
        packages=packages_by_extra(),
        untested=untested_versions(),
        both_runtimes=all(installed_version(name) for name in RUNTIME_MODULES),
        onnxruntime=_onnxruntime(),
        free=_free_space(),
        variables=_variables(os.environ),
        settings_error=settings_error,
        engines=examine_engines(),
    )


def verdicts(found: Surroundings) -> list[Finding]:
    """What this machine can do, then what is wrong with it."""
    return [_build_verdict(found), *_run_verdicts(found), *_engine_verdicts(found), *_problems(found)]


def lines(found: Surroundings) -> list[str]:
    """The report for people."""
    judged = verdicts(found)
    return [
        *columns([*_machine_rows(found), *_software_rows(found)]),
        "",
        *(f"{'ok' if verdict.able else 'no':4}{verdict.what}" for verdict in judged),
        *(["", "To do:"] if any(verdict.remedy for verdict in judged) else []),
        *(f"  {verdict.remedy}" for verdict in judged if verdict.remedy),
    ]


def to_json(found: Surroundings) -> dict[str, Any]:
    """All that was found, and the verdicts."""
    packages = {
        extra: [{**dataclasses.asdict(package), "fits": package.fits} for package in members]
        for extra, members in found.packages.items()
    }
    plain = {name: value for name, value in vars(found).items() if name != "packages"}
    as_dicts = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        for name, value in plain.items()
    }
    return {**as_dicts, "packages": packages, "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts(found)]}


def _build_verdict(found: Surroundings) -> Finding:
    if found.machine.system == "Windows":
        return Finding(False, "build: not on Windows", "Build on Linux or macOS and copy the bundle here.")
    oldest, newest = BUILD_PYTHON
    version = ".".join(map(str, found.python))
    if found.python[:2] < oldest:
        return Finding(
            False, f"build: Python {version} is too old", "Use Python 3.11 to 3.13 to build; this one can run."
        )
    missing = [str(package) for package in found.packages.get("build", ()) if not package.fits]
    if missing:
        return Finding(False, f"build: {', '.join(missing)}", 'pip install "llama-export[build,cpu]"')
    if found.onnxruntime.version is None:
        return Finding(
            False, "build: it runs the model once, which needs onnxruntime", 'pip install "llama-export[cpu]"'
        )
    untested = "" if found.python[:2] <= newest else f" (Python {version} is newer than what is tested)"
    return Finding(True, f"build bundles{untested}")


def _run_verdicts(found: Surroundings) -> list[Finding]:
    runtime = found.onnxruntime
    missing = [str(package) for package in found.packages.get(BASE, ()) if not package.fits]
    if missing:
        return [Finding(False, f"run and verify: {', '.join(missing)}", 'pip install "llama-export[cpu]"')]
    if runtime.version is None:
        return [Finding(False, f"run and verify: {runtime.error}", 'pip install "llama-export[cpu]"')]
    verdicts = [Finding(True, f"run and verify bundles on the CPU, with {found.cores} threads")]
    if CUDA_PROVIDER in runtime.providers:
        verdicts.append(Finding(True, "run bundles for CUDA"))
    elif found.machine.jetson is not None:
        verdicts.append(
            Finding(
                False,
                "run on the Jetson's GPU: this onnxruntime has no CUDA provider",
                "Install NVIDIA's onnxruntime-gpu wheel for this JetPack: the package index has none for Jetson.",
            )
        )
    elif found.machine.gpus:
        verdicts.append(
            Finding(
                False,
                "run on the GPU: this onnxruntime has no CUDA provider",
                'pip uninstall -y onnxruntime && pip install "llama-export[gpu]"',
            )
        )
    return verdicts


def _engine_verdicts(found: Surroundings) -> list[Finding]:
    machine = found.machine
    if found.engines is None:
        return []
    return engine_verdicts(found.engines, has_gpu=bool(machine.gpus), is_jetson=machine.jetson is not None)


def _problems(found: Surroundings) -> list[Finding]:
    problems = []
    if found.both_runtimes:
        keep = "onnxruntime-gpu" if found.machine.gpus else "onnxruntime"
        problems.append(
            Finding(
                False,
                "onnxruntime and onnxruntime-gpu are both installed, and each overwrites the other's files",
                f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {keep}",
            )
        )
    if found.settings_error:
        problems.append(Finding(False, found.settings_error, "Correct llama-export.toml."))
    for folder, free in found.free.items():
        if free < LOW_DISK_BYTES:
            problems.append(Finding(False, f"only {size(free)} are free at {folder}", f"Make room at {folder}."))
    return problems


def _machine_rows(found: Surroundings) -> list[tuple[str, str]]:
    machine = found.machine
    rows = [
        ("system", f"{machine.system} {machine.architecture}"),
        ("CPU", f"{machine.cpu}, {found.cores} cores, {found.cpus} threads"),
        ("instructions", ", ".join(machine.flags) or _NO_FLAGS.get(machine.system, "not told by this system")),
        ("memory", f"{size(machine.memory_bytes)}, {size(machine.available_bytes)} available"),
        *(("disk", f"{size(free)} free at {folder}") for folder, free in found.free.items()),
    ]
    for gpu in machine.gpus:
        memory = "shared memory" if gpu.memory_gb is None else f"{gpu.memory_gb:g} GB"
        rows.append(("GPU", f"{gpu.name}, {memory}, compute capability {gpu.compute_capability}"))
    if machine.nvidia_driver:
        rows.append(("NVIDIA driver", machine.nvidia_driver))
    if machine.jetson:
        release = machine.jetson.jetpack
        jetpack = f"JetPack {release.version}, TensorRT {release.tensorrt}" if release else "an unknown JetPack"
        rows.append(("Jetson", f"{machine.jetson.model}, Jetson Linux {machine.jetson.l4t}, {jetpack}"))
    target = host_target(machine)
    rows.append(
        ("as a target", f"`-t host`: {target.usable_gb:.1f} GB for a model, weights {target.default_precision}")
    )
    return rows


def _software_rows(found: Surroundings) -> list[tuple[str, str]]:
    rows = [("Python", f"{'.'.join(map(str, found.python))} ({platform.python_implementation()}) at {sys.executable}")]
    for extra, members in found.packages.items():
        rows.append(
            (f"[{extra}]" if extra != BASE else "packages", ", ".join(map(str, members)) or "not installed by pip")
        )
    if found.onnxruntime.version:
        rows.append(("ONNX Runtime", f"{found.onnxruntime.version}: {', '.join(found.onnxruntime.providers)}"))
    if found.engines:
        rows += engine_rows(found.engines)
    if found.untested:
        rows.append(("not tested", ", ".join(found.untested)))
    rows.extend(found.variables.items())
    return rows


def _onnxruntime() -> OnnxRuntime:
    try:
        module: Any = importlib.import_module("onnxruntime")
        return OnnxRuntime(module.__version__, tuple(module.get_available_providers()))
    except ModuleNotFoundError:
        return OnnxRuntime(None, (), "onnxruntime is not installed")
    # A broken installation raises whatever its parts raise: AttributeError with both wheels, OSError without a library.
    except Exception as error:
        return OnnxRuntime(None, (), f"onnxruntime is installed but does not import ({type(error).__name__}: {error})")


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    shown = {name: environment[name] for name in SHOWN_VARIABLES if environment.get(name)}
    return shown | {name: "set (not shown)" for name in SECRET_VARIABLES if environment.get(name)}


def _free_space() -> dict[str, int]:
    """Free bytes where bundles are made (the current folder) and at the caches, each disk once."""
    free: dict[int, tuple[str, int]] = {}
    for folder in (Path.cwd(), hub_folder(os.environ), cache_folder()):
        if folder is not None:
            there = next(place for place in (folder, *folder.parents) if place.exists())
            free.setdefault(there.stat().st_dev, (str(folder), shutil.disk_usage(there).free))
    return dict(free.values())


def hub_folder(environment: Mapping[str, str]) -> Path | None:
    """Where huggingface_hub keeps downloads; None where that is below a home folder, and there is none."""
    with contextlib.suppress(RuntimeError):
        if chosen := environment.get("HF_HUB_CACHE") or environment.get("HF_HOME"):
            return Path(chosen).expanduser()
        return Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    return None
