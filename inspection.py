"""What a bundle is and what it asks of a device, from its manifest: for `llama-export inspect`."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from typing import Any

from .errors import LlamaExportError
from .export.families import family_of
from .export.json_object import read_object
from .export.rope import rope_type
from .names import ONNXRUNTIME, PRODUCTS
from .optimize.formats import format_named, stored_bytes
from .runtime.bundle import (
    CPU_PROVIDER,
    DATA_FILE,
    GRAPH_FILE,
    AdapterRecord,
    Bundle,
    Limits,
    Manifest,
    Shape,
)
from .runtime.hashes import is_checked
from .runtime.proof.reference import EXACT, WeightRecord
from .runtime.proof.reference_file import load_index_of_bundle
from .runtime.quality import Quality, load_quality
from .tables import columns, size
from .targets.context import CACHE_BYTES, Load, bytes_per_token, needed_bytes


def lines(bundle: Bundle) -> list[str]:
    """The bundle for people: facts, then its files by size."""
    manifest = bundle.manifest
    facts = [(name, text) for name, text in _facts(bundle) if text]
    files = sorted(manifest.files.items(), key=lambda entry: -entry[1].size)
    return [
        f"{bundle.path}",
        "",
        *columns(facts, indent="  "),
        "",
        *columns([(size(record.size).rjust(10), name) for name, record in files], indent="  "),
        *(["", *manifest.notes] if manifest.notes else []),
    ]


def to_json(bundle: Bundle) -> dict[str, Any]:
    """The manifest, and under "derived" what follows from it; sizes in bytes."""
    manifest, quality = bundle.manifest, _quality(bundle)
    return {
        "path": str(bundle.path),
        "manifest": json.loads(manifest.to_json()),
        "derived": {
            "bytes": sum(record.size for record in manifest.files.values()),
            "cache_bytes_per_1000_tokens": 1000 * bytes_per_token(manifest.shape, manifest.shape.cache_dtype),
            "memory_bytes_at_full_context": needed_bytes(_load(bundle), manifest.limits.context),
            "parameters": _parameters(bundle),
            "hashes": _hashes(bundle),
        },
        "quality": None if quality is None else json.loads(quality.to_json()),
    }


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
    manifest = bundle.manifest
    total = sum(record.size for record in manifest.files.values())
    revision = f", revision {manifest.model.revision}" if manifest.model.revision else ""
    return [
        ("model", f"{manifest.model.id} ({manifest.model.source}{revision})"),
        ("network", _network_text(bundle)),
        ("licence", manifest.model.licence_told),
        *(("" if number else "duties", duty) for number, duty in enumerate(manifest.model.duties)),
        ("target", f"{manifest.target}, {manifest.dialect} graph for {_backend_text(manifest)}"),
        ("precision", manifest.precision),
        ("parameters", _parameters_text(bundle)),
        *(("" if number else "adapters", text) for number, text in enumerate(map(_adapter_text, manifest.adapters))),
        ("shape", _shape_text(manifest.shape)),
        ("limits", _limits_text(manifest.limits)),
        ("cache", _cache_text(manifest.shape, manifest.limits)),
        ("memory", f"about {size(needed_bytes(_load(bundle), manifest.limits.context))} at full context (an estimate)"),
        ("quality", _quality_text(bundle)),
        ("size", f"{size(total)} in {len(manifest.files)} files"),
        ("hashes", _hashes(bundle)),
        ("needs", _versions(manifest.minimum, " or newer")),
        ("made by", _versions(manifest.tools, "")),
    ]


def _backend_text(manifest: Manifest) -> str:
    engine = manifest.engine
    if engine is None:
        return ", ".join(manifest.providers)
    gpus = ", ".join(gpu for plan in engine.plans for gpu in plan.compute_capability)
    engines = f"engine for compute capability {gpus}" if gpus else "engine built on the device"
    return f"{PRODUCTS[manifest.backend]} {engine.version}, {engines}"


def _load(bundle: Bundle) -> Load:
    manifest = bundle.manifest
    limits, shape = manifest.limits, manifest.shape
    on_cpu = manifest.backend == ONNXRUNTIME and manifest.provider == CPU_PROVIDER
    weights, chunk = _weight_bytes(bundle), limits.prefill_chunk
    return Load(shape, weights, shape.cache_dtype, on_cpu, limits.batch, chunk, manifest.dialect)


def _weight_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes of the weights by the name of their format; those that nothing tells of are as the manifest's precision."""
    files, scale_bytes = bundle.manifest.files, CACHE_BYTES[bundle.manifest.shape.activations]
    total = sum(files[name].size for name in (GRAPH_FILE, DATA_FILE) if name in files)
    counts: Counter[str] = Counter()
    for weight in _weights(bundle) or ():
        format = format_named(weight.format)
        if format is not None:
            counts[format.name] += stored_bytes(weight.shape, format, scale_bytes)
    counts[bundle.manifest.precision] += max(0, total - counts.total())
    return dict(counts)


def _weights(bundle: Bundle) -> tuple[WeightRecord, ...] | None:
    """What the reference says of each tensor of the checkpoint; None where there is none, or it is damaged."""
    try:
        return load_index_of_bundle(bundle.path, EXACT).weights
    except LlamaExportError:
        return None


def _parameters(bundle: Bundle) -> dict[str, int] | None:
    """Values of the checkpoint by the format they are stored in; None where nothing tells."""
    weights = _weights(bundle)
    if weights is None:
        return None
    counts: Counter[str] = Counter()
    for weight in {weight.name: weight for weight in weights}.values():  # a tied embedding may be there twice
        counts[weight.format] += prod(weight.shape)
    return dict(counts.most_common())


def _quality(bundle: Bundle) -> Quality | None:
    """What quantisation cost; None where the bundle does not say, or what it says is damaged."""
    try:
        return load_quality(bundle)
    except LlamaExportError:
        return None


def _quality_text(bundle: Bundle) -> str:
    try:
        quality = load_quality(bundle)
    except LlamaExportError as error:
        return str(error)
    return "" if quality is None else f"{quality.method}, {quality.bits:.3g} bits a weight. {quality.told}"


def _parameters_text(bundle: Bundle) -> str:
    counts = _parameters(bundle)
    if counts is None:
        return "unknown: the bundle has no reference, or a damaged one"
    return ", ".join(f"{f'{n / 1e6:,.1f} M' if n >= 1e6 else f'{n:,}'} in {format}" for format, n in counts.items())


def _shape_text(shape: Shape) -> str:
    return (
        f"{shape.layers} layers, hidden {shape.hidden}, FFN {shape.ffn}, {shape.heads} heads and {shape.kv_heads} "
        f"KV heads of {shape.head_dim}, vocabulary {shape.vocab:,}"
    )


def _network_text(bundle: Bundle) -> str:
    """The family and the rope type that config.json names; empty where there is none that can be read."""
    try:
        config = read_object(bundle.file("config.json"))
        return f"{family_of(config).name}, rope {rope_type(config):.40}"
    except LlamaExportError:
        return ""


def _adapter_text(adapter: AdapterRecord) -> str:
    where = "merged" if adapter.file is None else f"to choose: run --adapter {adapter.name}"
    weight = "" if adapter.weight == 1 else f", times {adapter.weight:g}"
    base = f", trained on {adapter.base}" if adapter.base else ""
    licence = f", licence {adapter.licence}" if adapter.licence else ""
    return f"{adapter.name}, rank {adapter.rank}{weight}, {where}{base}{licence}"


def _limits_text(limits: Limits) -> str:
    texts = "1 text" if limits.batch == 1 else f"{limits.batch} texts"
    return f"context {limits.context:,} tokens, {texts} at once, prompts in chunks of {limits.prefill_chunk}"


def _cache_text(shape: Shape, limits: Limits) -> str:
    one = bytes_per_token(shape, shape.cache_dtype)
    full = size(one * limits.context * limits.batch)
    return f"{shape.cache_dtype}, {size(1000 * one)} for 1,000 tokens, {full} in full"


def _hashes(bundle: Bundle) -> str:
    try:
        if is_checked(bundle):
            return "checked on this machine, and no file has changed since"
    except LlamaExportError as error:
        return str(error)
    return "not checked on this machine yet: `llama-export verify` and the first `run` do"


def _versions(versions: Any, after: str) -> str:
    return ", ".join(f"{name} {version}{after}" for name, version in versions.items())
