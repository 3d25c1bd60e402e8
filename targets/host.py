"""What this machine is, read from Linux's own files; on other systems what Python knows, and the memory of Windows."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from ..names import MODULES, ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from .choice import with_possible_precision
from .devices import CATALOGUE, GB, Target, load_target
from .jetpack import JetPack, jetpack_of_l4t
from .tensorrt import NEWEST_RTX, RELEASES, has_engines
from .windows_memory import windows_memory

# Instructions that decide how fast int8 and int4 kernels are; the names are those of /proc/cpuinfo.
NOTABLE_FLAGS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
}
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits")
ROOT = Path("/")
GPU_RESERVE_GB = 1.0
RTX_CAPABILITIES = ("8.6", "8.9", "12.0", "12.1")
"""GPUs that TensorRT-RTX is preferred for where ONNX Runtime is installed too: those for workstations and gaming."""

RESERVE_SHARE, RESERVE_LIMITS_GB = 0.25, (0.5, 2.0)


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it; memory in GB of 10^9 bytes, None where it uses the computer's own."""

    name: str
    memory_gb: float | None
    compute_capability: str
    driver: str


@dataclass(frozen=True)
class Jetson:
    """A Jetson by its device tree and its Jetson Linux version; `jetpack` is None when that version is unknown."""

    model: str
    l4t: str
    jetpack: JetPack | None


@dataclass(frozen=True)
class Machine:
    """memory in bytes is bounded by a container's limit."""

    system: str
    architecture: str
    cpu: str
    flags: tuple[str, ...]
    memory_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    nvidia_driver: str | None
    jetson: Jetson | None


def read_machine() -> Machine:
    """Look at this machine."""
    cpu = _first_cpu(_text("proc/cpuinfo"))
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    memory, available = memory_bytes()
    gpus = read_gpus(_nvidia_smi())
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        cpu=cpu.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(shown for name, shown in NOTABLE_FLAGS.items() if name in flags),
        memory_bytes=memory,
        available_bytes=available,
        gpus=gpus,
        nvidia_driver=gpus[0].driver if gpus else _driver_version(),
        jetson=_jetson(),
    )


def host_target(machine: Machine | None = None) -> Target:
    """This machine as a target named `host`: a Jetson, a computer with an NVIDIA GPU, or a computer.

    A GPU counts only where something is installed that runs a bundle on it; `sources["backend"]` says why which.
    """
    machine = read_machine() if machine is None else machine
    if machine.jetson is not None:
        return _jetson_target(machine, machine.jetson)
    if machine.gpus:
        return _gpu_target(machine, machine.gpus[0])
    return _cpu_target(machine, machine.cpu, "no NVIDIA GPU was found here")


def _cpu_target(machine: Machine, title: str, reason: str) -> Target:
    memory_gb = machine.memory_bytes / GB
    return _here(load_target("cpu"), title, memory_gb, _reserve_gb(machine), backend=ONNXRUNTIME, reason=reason)


def _here(base: Target, title: str, memory_gb: float, reserve_gb: float, *, backend: str, reason: str) -> Target:
    """`base` with what was read from this machine."""
    own = {"memory_gb": "read from this machine", "reserve_gb": "assumption: for the system", "backend": reason}
    return replace(
        base,
        name="host",
        title=f"This machine: {title}",
        memory_gb=round(memory_gb, 1),
        reserve_gb=round(reserve_gb, 1),
        backend=backend,
        sources=MappingProxyType({**base.sources, **own}),
    )


def _reserve_gb(machine: Machine) -> float:
    low, high = RESERVE_LIMITS_GB
    return min(max(machine.memory_bytes / GB * RESERVE_SHARE, low), high)


def _gpu_target(machine: Machine, gpu: Gpu) -> Target:
    """A catalogue card of this name, or any card with what is known of it; the CPU where nothing runs on the card."""
    found = _gpu_backend(gpu)
    if found is None:
        reason = f"{gpu.name} is here, but nothing is installed that runs bundles on it: see `llama-export doctor`"
        return _cpu_target(machine, machine.cpu, reason)
    backend, reason = found
    own = gpu.memory_gb is not None
    memory_gb = gpu.memory_gb if gpu.memory_gb is not None else machine.memory_bytes / GB
    base = _card(gpu) or load_target("rtx" if backend == TENSORRT_RTX else "cuda")
    target = _here(
        base,
        gpu.name,
        memory_gb,
        GPU_RESERVE_GB if own else _reserve_gb(machine),
        backend=backend,
        reason=reason,
    )
    sources = {**target.sources, "compute_capability": "read from this machine"}
    return with_possible_precision(
        replace(
            target,
            compute_capability=(gpu.compute_capability,),
            shared_memory=not own,
            providers=load_target("cuda").providers,
            sources=MappingProxyType(sources),
        )
    )


def _gpu_backend(gpu: Gpu) -> tuple[str, str] | None:
    """What runs bundles on a GPU here, and why; None where nothing does."""
    rtx_builds = RELEASES[TENSORRT_RTX, NEWEST_RTX].ahead_of_time
    has_rtx = gpu.compute_capability in rtx_builds and _has_module(MODULES[TENSORRT_RTX])
    has_onnxruntime = _has_onnxruntime_gpu()
    what = f"{gpu.name} has compute capability {gpu.compute_capability}, and"
    if has_rtx and (gpu.compute_capability in RTX_CAPABILITIES or not has_onnxruntime):
        return TENSORRT_RTX, f"{what} tensorrt_rtx is installed here"
    if has_onnxruntime:
        return ONNXRUNTIME, f"{what} onnxruntime-gpu is installed here"
    return None


def _card(gpu: Gpu) -> Target | None:
    """The catalogue's card that nvidia-smi calls so."""
    targets = (load_target(path.stem) for path in sorted(CATALOGUE.glob("*.toml")))
    return next((target for target in targets if gpu.name in target.gpu_names), None)


def _jetson_target(machine: Machine, jetson: Jetson) -> Target:
    """The catalogue's module with the longest name within the device tree's, and among those the nearest memory."""
    memory_gb = machine.memory_bytes / GB
    modules = [load_target(path.stem) for path in sorted(CATALOGUE.glob("jetson-*.toml"))]
    fitting = [module for module in modules if module.device_tree and module.device_tree in jetson.model]
    if not fitting:
        return _cpu_target(machine, jetson.model, "a Jetson that the catalogue does not have")
    length = max(len(module.device_tree or "") for module in fitting)
    longest = [module for module in fitting if len(module.device_tree or "") == length]
    base = min(longest, key=lambda module: abs(module.memory_gb - memory_gb))
    base, backend, reason = _with_jetpack(base, jetson)
    reserve_gb = min(base.reserve_gb, memory_gb / 2)
    return with_possible_precision(_here(base, jetson.model, memory_gb, reserve_gb, backend=backend, reason=reason))


def _with_jetpack(base: Target, jetson: Jetson) -> tuple[Target, str, str]:
    """`base` with the JetPack that is installed, and the backend that this leaves, with the reason."""
    found = jetson.jetpack
    if found is None or found.version not in base.jetpacks:
        reason = f"assumption: Jetson Linux {jetson.l4t} is not known for it, so JetPack {base.jetpack} is taken"
        return replace(base, sources=MappingProxyType({**base.sources, "jetpack": reason})), TENSORRT, reason
    sources = {**base.sources, "jetpack": f"read from this machine: Jetson Linux {jetson.l4t}"}
    base = replace(base, jetpack=found.version, sources=MappingProxyType(sources))
    what = f"JetPack {found.version} has TensorRT {found.tensorrt}"
    if has_engines(TENSORRT, found.tensorrt):
        return base, TENSORRT, what
    return base, ONNXRUNTIME, f"{what}, for which no engines are made"


def read_gpus(csv: str) -> tuple[Gpu, ...]:
    """The GPUs in what nvidia-smi printed; lines that are not as NVIDIA_SMI asked for (MiB of memory) are left out."""
    rows = [[cell.strip() for cell in line.split(",")] for line in csv.splitlines()]
    return tuple(
        Gpu(name, round(int(memory) * 2**20 / GB, 1) if memory.isdigit() else None, capability, driver)
        for name, memory, capability, driver in (row for row in rows if len(row) == 4)
        if re.fullmatch(r"\d+\.\d+", capability)
    )


def _first_cpu(cpuinfo: str) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in cpuinfo.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def memory_bytes() -> tuple[int, int]:
    """Total and available bytes: the machine's, or a container's limit where that is lower; 0 where nobody tells."""
    if sys.platform == "win32":
        return windows_memory(ctypes.WinDLL("kernel32"))
    sizes = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _text("proc/meminfo"), re.MULTILINE))
    if "MemTotal" in sizes:
        total = int(sizes["MemTotal"]) * 1024
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        total = 0
    available = int(sizes["MemAvailable"]) * 1024 if "MemAvailable" in sizes else total
    limit = _text("sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        used = _text("sys/fs/cgroup/memory.current").strip()
        total = int(limit)
        available = min(available, total - int(used)) if used.isdigit() else min(available, total)
    return total, max(available, 0)


def _jetson() -> Jetson | None:
    model = _text("proc/device-tree/model").rstrip("\0").strip()
    release = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", _text("etc/nv_tegra_release"))
    if release is None:
        return None
    l4t = f"{release[1]}.{release[2]}"
    return Jetson(model or "NVIDIA Jetson", l4t, jetpack_of_l4t(l4t))


def _driver_version() -> str | None:
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _text("proc/driver/nvidia/version"))
    return found[1] if found else None


def _nvidia_smi() -> str:
    if shutil.which(NVIDIA_SMI[0]) is None:
        return ""
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _has_onnxruntime_gpu() -> bool:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  # slow to import, seldom needed

    try:
        version("onnxruntime-gpu")
    except PackageNotFoundError:
        return False
    return True


def _text(name: str) -> str:
    """A system file's text, or nothing where it is absent or unreadable: most of these exist on some machines only."""
    try:
        return (ROOT / name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
