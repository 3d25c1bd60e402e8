"""The catalogue as text and as JSON, for `llama-export targets`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..names import PRODUCTS
from ..optimize.schemes import SCHEMES
from ..tables import columns
from .devices import Peak, Target, load_target, target_names
from .made import Made, what_is_made

HEADER = ("TARGET", "DEVICE", "MEMORY", "BANDWIDTH", "BACKEND", "PRECISION", "A BUILD MAKES")
ASSUMED = "*"


def all_targets() -> list[Target]:
    """Every target of the catalogue and this machine."""
    return [load_target(name) for name in target_names()]


def table_lines(targets: list[Target]) -> list[str]:
    """One line for each target, and what the marks mean."""
    rows = [HEADER, *(_row(target) for target in targets)]
    return [
        *columns(rows),
        "",
        f"{ASSUMED} an assumption, not the vendor's figure; `llama-export targets NAME` shows every fact's source.",
        "PRECISION is the default for weights; a GGUF file keeps its own.",
        'A file of your own describes another device: `base = "cpu"`, `memory_gb = 32`; name it with `-t FILE.toml`.',
    ]


def detail_lines(target: Target) -> list[str]:
    """All facts of one target, each with its source, and what a build makes of it."""
    rows = [(name, text, target.sources.get(name, "")) for name, text in _facts(target)]
    made = what_is_made(target)
    return [
        f"{target.name}: {target.title}",
        "",
        *columns(rows, indent="  "),
        "",
        "A build makes:",
        *columns(_made_rows(target, made), indent="  "),
        "",
        *(f"  {note}" for note in made.notes),
    ]


def to_json(target: Target) -> dict[str, Any]:
    """All facts of one target, and what a build makes; `tensorrt` is the release that an engine is made for."""
    facts = {item.name: getattr(target, item.name) for item in fields(Target)}
    made = what_is_made(target)
    makes = {name: value for name, value in vars(made).items() if name != "release"}
    return {
        **facts,
        "peak": [vars(peak) for peak in target.peak],
        "sources": dict(target.sources),
        "makes": {**makes, "tensorrt": made.release.version if made.release else None},
    }


def _made_rows(target: Target, made: Made) -> list[tuple[str, str, str]]:
    """What a build makes, as (what, text, source)."""
    release = made.release
    graph = f"dialect {made.dialect}, opset {made.opset}, {made.activations} activations"
    jetpack = f" of JetPack {target.jetpack}" if target.release and release else ""
    return [
        ("for", f"{release.name}{jetpack}" if release else PRODUCTS[made.backend], ""),
        ("graph", graph, release.source if release else ""),
        *(_weights_row(made, (name,)) for name in made.precisions),
        *(_weights_row(made, names) for names in _families(made.blocks)),
    ]


def _weights_row(made: Made, names: tuple[str, ...]) -> tuple[str, str, str]:
    """Schemes that are alike, as one row."""
    place = made.place(names[0])
    assert place is not None
    text = ", ".join(names)
    return ("weights", f"{text} with --calibrate" if place.calibrated else text, place.source)


def _families(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Block schemes that differ in their block alone, together."""
    kinds: dict[tuple[int, bool], list[str]] = {}
    for name in names:
        format = SCHEMES[name].places[0].format
        kinds.setdefault((format.bits, format.zeros), []).append(name)
    return [tuple(kind) for kind in kinds.values()]


def _row(target: Target) -> tuple[str, ...]:
    memory = f"{target.memory_gb:g} GB{ASSUMED if target.is_assumed('memory_gb') else ''}"
    bandwidth = f"{target.bandwidth_gbs:g} GB/s" if target.bandwidth_gbs else "-"
    bandwidth += ASSUMED if target.is_assumed("bandwidth_gbs") else ""
    made = what_is_made(target)
    return target.name, target.title, memory, bandwidth, target.backend, target.default_precision, made.summary


def _facts(target: Target) -> list[tuple[str, str]]:
    """The facts that `target` has, by key, as text with units."""
    release = target.release
    shared = "shared by CPU and GPU" if target.shared_memory else ""
    texts = {
        "kind": target.kind,
        "compute_capability": ", ".join(target.compute_capability),
        "memory_gb": f"{target.memory_gb:g} GB",
        "reserve_gb": f"{target.reserve_gb:g} GB, which leaves {target.usable_gb:.1f} GB for a model",
        "shared_memory": shared,
        "bandwidth_gbs": f"{target.bandwidth_gbs:g} GB/s" if target.bandwidth_gbs else "",
        "boost_bandwidth_gbs": f"{target.boost_bandwidth_gbs:g} GB/s" if target.boost_bandwidth_gbs else "",
        "peak": "; ".join(map(_peak_text, target.peak)),
        "native_formats": ", ".join(target.native_formats),
        "default_precision": target.default_precision,
        "backend": f"{target.backend} (possible: {', '.join(target.backends)})",
        "providers": f"{', '.join(target.providers)} (of ONNX Runtime)",
        "jetpack": f"{release.version}: CUDA {release.cuda}, TensorRT {release.tensorrt}, Python {release.python}"
        if release
        else "",
        "jetpacks": ", ".join(target.jetpacks),
        "device_tree": target.device_tree or "",
        "gpu_names": ", ".join(target.gpu_names),
    }
    return [(name, text) for name, text in texts.items() if text]


def _peak_text(peak: Peak) -> str:
    unit = "TFLOPS" if peak.format.startswith(("fp", "bf", "nv")) else "TOPS"
    boosted = f" ({peak.boost_tops:g} boosted)" if peak.boost_tops else ""
    kind = f"{'sparse' if peak.sparse else 'dense'}{' with DLAs' if peak.with_dlas else ''}"
    return f"{peak.format} {peak.tops:g}{boosted} {unit} {kind}"
