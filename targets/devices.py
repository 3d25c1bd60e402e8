"""What a target is, and reading one: a name from the catalogue, `host`, or a TOML file of the user's own.

Every file under `catalogue/` holds one target; docs and errors call its keys facts. The keys are the fields of `Target`
(`peak` is a list of tables with the fields of `Peak`, `sources` says where each fact is from). A file of the user's own
has the same keys, and may begin with `base = "NAME"` to change only some facts of a catalogue target.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import LlamaExportError, UsageError, did_you_mean
from ..names import BACKENDS, ONNXRUNTIME
from ..optimize.schemes import PRECISIONS
from ..runtime.bundle import CPU_PROVIDER, CUDA_PROVIDER
from .jetpack import JETPACKS, JetPack
from .schema import check_facts, field_names
from .toml_file import read_toml

CATALOGUE = Path(__file__).parent / "catalogue"
GB = 1e9

KINDS = ("cpu", "gpu", "jetson", "spark")
NATIVE_FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "nvfp4")
PROVIDERS = (CPU_PROVIDER, CUDA_PROVIDER)
ASSUMPTION = "assumption"
_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")


@dataclass(frozen=True)
class Peak:
    """A vendor's peak figure in 10^12 operations a second.

    sparse: it counts products with zeros that are skipped. boost_tops: that of the Super or MAXN mode. with_dlas: it
    counts what Orin's deep learning accelerators do beside the GPU.
    """

    format: str
    tops: float
    sparse: bool
    boost_tops: float | None = None
    with_dlas: bool = False


@dataclass(frozen=True)
class Target:
    """A device as far as building for it matters. One GB is 10^9 bytes, bandwidth is in GB/s.

    reserve_gb: what the system and others need, so that `usable_gb` is left for a model.
    shared_memory: CPU and GPU use the same memory, so the page cache competes with the weights.
    native_formats: what the device computes in or, for int4, reads weights in.
    providers: of ONNX Runtime, in the order of preference, for bundles that it runs.
    device_tree: what stands in a Jetson's /proc/device-tree/model. gpu_names: what nvidia-smi calls a card.
    sources: for each fact where it is from; one that begins with "assumption" is not from the vendor.
    """

    name: str
    title: str
    kind: str
    memory_gb: float
    reserve_gb: float
    default_precision: str
    backend: str
    backends: tuple[str, ...]
    providers: tuple[str, ...]
    shared_memory: bool = False
    compute_capability: tuple[str, ...] = ()
    native_formats: tuple[str, ...] = ()
    bandwidth_gbs: float | None = None
    boost_bandwidth_gbs: float | None = None
    peak: tuple[Peak, ...] = ()
    jetpack: str | None = None
    jetpacks: tuple[str, ...] = ()
    device_tree: str | None = None
    gpu_names: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def usable_gb(self) -> float:
        return self.memory_gb - self.reserve_gb

    @property
    def release(self) -> JetPack | None:
        """The JetPack that engines are meant for, on a Jetson."""
        return JETPACKS[self.jetpack] if self.jetpack else None

    def is_assumed(self, fact: str) -> bool:
        """Whether `fact` is our assumption, not the vendor's word."""
        return self.sources.get(fact, "").startswith(ASSUMPTION)


ALLOWED: Mapping[str, tuple[str, ...]] = {
    "kind": KINDS,
    "format": NATIVE_FORMATS,
    "default_precision": PRECISIONS,
    "native_formats": NATIVE_FORMATS,
    "backend": tuple(BACKENDS),
    "backends": tuple(BACKENDS),
    "providers": PROVIDERS,
    "jetpack": tuple(JETPACKS),
    "jetpacks": tuple(JETPACKS),
}


def target_names() -> tuple[str, ...]:
    """The catalogue's names, sorted, and `host`."""
    return (*sorted(path.stem for path in CATALOGUE.glob("*.toml")), "host")


def load_target(name_or_path: str) -> Target:
    """Read a target by name, or from a TOML file of the user's own.

    Raises UsageError for an unknown name and a file that cannot be read, LlamaExportError for one that says too little
    or wrong.
    """
    if name_or_path == "host":
        from .host import host_target  # noqa: PLC0415  # it reads the catalogue itself

        return host_target()
    if name_or_path in target_names():
        path = CATALOGUE / f"{name_or_path}.toml"
        return target_from(read_toml(path), path)
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return _user_target(path)
    names = target_names()
    raise UsageError(
        f"There is no target {name_or_path!r}.{did_you_mean(name_or_path, names)} "
        f"Name one of {', '.join(names)}, or a TOML file that describes one."
    )


def target_from(facts: Mapping[str, Any], path: Path) -> Target:
    """Make a target of a file's `facts`; raises LlamaExportError that names the file, the key and what is allowed."""
    check_facts({"name": path.stem, **facts}, Target, ALLOWED, path)
    peaks = tuple(_peak(entry, path) for entry in facts.get("peak", ()))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    values["sources"] = MappingProxyType(dict(facts.get("sources", {})))
    target = Target(**{"name": path.stem, **values, "peak": peaks})
    _check_together(target, path)
    return target


def _user_target(path: Path) -> Target:
    facts = read_toml(path)
    base = facts.pop("base", None)
    if base is None:
        return target_from(facts, path)
    names = target_names()
    if base not in names:
        hint = did_you_mean(str(base), names)
        raise LlamaExportError(f"{path}: base is {base!r}, which is no target.{hint} Name one of {', '.join(names)}.")
    under = load_target(base)
    inherited = {name: getattr(under, name) for name in field_names(Target) if getattr(under, name) is not None}
    inherited["peak"] = [{k: v for k, v in vars(peak).items() if v is not None} for peak in under.peak]
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in inherited.items()}
    # A fact that the file changes is no longer the vendor's word nor our assumption.
    sources = {**under.sources, **dict.fromkeys(facts, path.name)}
    own_sources = facts.get("sources", {})
    facts["sources"] = {**sources, **own_sources} if isinstance(own_sources, dict) else own_sources
    return target_from({**listed, "name": path.stem, **facts}, path)


def _peak(entry: Any, path: Path) -> Peak:
    if not isinstance(entry, dict):
        raise LlamaExportError(f"{path}: peak holds {entry!r}, but a list of tables [[peak]] is needed.")
    check_facts(entry, Peak, ALLOWED, path)
    return Peak(**entry)


def _check_together(target: Target, path: Path) -> None:
    """Refuse facts that contradict each other."""
    for sentence in _contradictions(target):
        raise LlamaExportError(f"{path}: {sentence}.")


def _contradictions(target: Target) -> Iterator[str]:
    if target.backend not in target.backends:
        yield f"backend {target.backend!r} is not among the backends {list(target.backends)}"
    if not 0 <= target.reserve_gb < target.memory_gb:
        yield f"reserve_gb {target.reserve_gb} must be at least 0 and below memory_gb {target.memory_gb}"
    if target.providers[-1:] != (CPU_PROVIDER,):
        yield f"providers must end with {CPU_PROVIDER!r}, which runs what the others cannot"
    speeds = {"bandwidth_gbs": target.bandwidth_gbs, "boost_bandwidth_gbs": target.boost_bandwidth_gbs}
    for key, speed in (*speeds.items(), *(("tops of peak", peak.tops) for peak in target.peak)):
        if speed == 0:
            yield f"{key} is 0, but it must be above; leave it out where it is not known"
    for capability in target.compute_capability:
        if not _CAPABILITY.fullmatch(capability):
            yield f"compute_capability has {capability!r}, but it must be a number such as '8.7'"
    if target.backends != (ONNXRUNTIME,) and not target.compute_capability:
        yield f"the key 'compute_capability' is missing, which engines for {target.backend} need"
    yield from _jetpack_contradictions(target)


def _jetpack_contradictions(target: Target) -> Iterator[str]:
    if target.kind == "jetson" and target.jetpack is None:
        yield f"a jetson needs the key 'jetpack', one of {', '.join(JETPACKS)}"
    if target.kind != "jetson" and (target.jetpack is not None or target.jetpacks):
        yield f"jetpack and jetpacks are for the kind 'jetson', not {target.kind!r}"
    if target.jetpack is not None and target.jetpack not in target.jetpacks:
        yield f"jetpack {target.jetpack!r} is not among the jetpacks {list(target.jetpacks)}"
