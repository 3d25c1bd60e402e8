"""What `llama-export reference` does: PyTorch's answers in a file of the user's own, apart from any build."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .build_options import BuildOptions
from .errors import LlamaExportError, UsageError
from .export.config import transformers_config
from .export.destination import signals_raise
from .export.identity import check_same_model, identity_of, model_sha256, stored_type
from .export.lora.merge import merged
from .export.lora.peft_folder import WEIGHTS, Adapter
from .export.memory import give_back
from .export.prompts import CONTINUATION, Asked, built_in_prompts, prompts_of_file
from .export.propose import propose
from .export.prove import About, Proposed, prove, spread_layers
from .export.recorded_formats import recorded_formats
from .export.reference import Exact, Original, Side, StreamedModel
from .export.source import Source, open_source
from .export.stored_tensors import stored_tensors
from .optimize.formats import FP32
from .pipeline import build, tool_versions
from .planning import open_adapters
from .progress import Progress, Silent
from .runtime.bundle import CPU_PROVIDER, GRAPH_FILE, AdapterRecord, Bundle, open_bundle
from .runtime.hashing import sha256_of
from .runtime.proof.foreign import ForeignReplayer, check_reference, is_foreign, open_foreign
from .runtime.proof.reference import EXACT, Index, Prompt, Reference
from .runtime.proof.reference_file import load_index_of_bundle, save
from .runtime.proof.replayer import Replayer
from .runtime.proof.replayers import GraphReplayer
from .runtime.threads import physical_cores
from .tables import size

_CONTEXT = 4096
"""Where neither a bundle nor the user says another."""
_SMALL = 1_000_000_000
"""Bytes in float32 below which the temporary export is in float32, whose greedy text is nearly always PyTorch's."""


@dataclass(frozen=True)
class ReferenceOptions:
    """What the command was asked for. bundle: a bundle, or a folder of another tool, that proposes the greedy text;
    None for a temporary export. exact: with the weights as `bundle` stores them. full: keep all logits. layers: numbers
    with commas between them, or "all"; None for some that are evenly spread.
    """

    model: str
    output: Path
    prompts: Path | None = None
    bundle: Path | None = None
    exact: bool = False
    full: bool = False
    adapters: tuple[str, ...] = ()
    any_base: bool = False
    new_tokens: int | None = None
    layers: str | None = None
    context: int | None = None
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class ReferenceReport:
    """What was made. seconds: of everything; peak_bytes: the most memory that this process had."""

    output: Path
    index: Index
    bytes: int
    seconds: float
    peak_bytes: int

    def lines(self) -> list[str]:
        """For people."""
        index = self.index
        continued = sum(len(prompt.ids) - prompt.prompt_tokens for prompt in index.prompts)
        what = "the weights as the bundle stores them" if index.kind == EXACT else "the checkpoint's own weights"
        return [
            f"{self.output}: {index.model_id} with {what}, {size(self.bytes)} in {self.seconds:.1f} s, "
            f"{size(self.peak_bytes)} of memory",
            f"{len(index.prompts)} prompts, {index.positions} positions, {continued} of them greedy text that PyTorch "
            "would have written.",
        ]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "schema_version": 1,
            "output": str(self.output),
            "kind": self.index.kind,
            "model": self.index.model_id,
            "model_sha256": self.index.identity.model_sha256,
            "prompts": len(self.index.prompts),
            "positions": self.index.positions,
            "layers": list(self.index.layers),
            "full": self.index.full,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "peak_rss": self.peak_bytes,
        }


@dataclass(frozen=True)
class _Ground:
    """What a reference is made on. source: with adapters merged in, where they are; context: most tokens of a text;
    rope_context: for which the frequencies of the dynamic rope type are fixed; open: what proposes greedy text; bundle:
    of ours, where it was given; adapter: that it has beside its weights, and `added` with what.
    """

    source: Source
    sha256: str
    context: int
    rope_context: int
    open: Callable[[], Replayer]
    bundle: Bundle | None = None
    adapter: Adapter | None = None
    check: Callable[[Sequence[Asked]], None] = lambda _: None


def make_reference(options: ReferenceOptions, progress: Progress | None = None) -> ReferenceReport:
    """Record what PyTorch computes into `options.output`, whole or not at all.

    Raises UsageError and LlamaExportError, each with one sentence for the user.
    """
    progress, began = progress or Silent(), time.perf_counter()
    output = _checked_output(options)
    if options.exact and (options.bundle is None or is_foreign(options.bundle)):
        raise UsageError(
            "--exact computes with the weights as a bundle stores them; name a bundle of ours with --bundle, or leave "
            "--exact out."
        )
    progress.stage(f"Opening {options.model}")
    source = open_source(
        options.model,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        progress=progress,
    )
    adapters = open_adapters(_build_options(options, Path()), source)
    with signals_raise(), tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=_parent(output)) as scratch:
        ground = _ground(options, source, adapters, Path(scratch), progress)
        reference = _recorded(options, ground, Path(scratch), progress)
        save(reference, output)
    return ReferenceReport(output, reference.index, output.stat().st_size, time.perf_counter() - began, _peak_bytes())


def _checked_output(options: ReferenceOptions) -> Path:
    output = options.output.expanduser()
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name the file that the reference becomes, such as {output / 'x.npz'}.")
    if output.exists() and not output.is_file():
        raise UsageError(f"{output} is no plain file; name another one.")
    if output.exists() and not options.force:
        raise UsageError(f"{output} is there already; pass --force to replace it, or name another file.")
    return output.absolute()


def _parent(output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.parent


def _peak_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _ground(
    options: ReferenceOptions, source: Source, adapters: Sequence[Adapter], scratch: Path, progress: Progress
) -> _Ground:
    if options.bundle is None:
        return _on_export(options, source, adapters, scratch, progress)
    if is_foreign(options.bundle):
        return _on_foreign(options, source, adapters, options.bundle)
    return _on_bundle(options, source, adapters, open_bundle(options.bundle))


def _merged(source: Source, adapters: Sequence[Adapter]) -> Source:
    return source.with_other(tensors=merged(source.tensors, adapters)) if adapters else source


def _on_bundle(options: ReferenceOptions, source: Source, adapters: Sequence[Adapter], bundle: Bundle) -> _Ground:
    chosen = _beside(bundle, adapters)
    in_weights = () if chosen is not None else tuple(adapters)
    sha256 = model_sha256(source, in_weights)
    check_same_model(bundle, source, sha256)
    limit = bundle.manifest.limits.context
    context = _context(options, limit, f"the bundle {bundle.path}")

    def open_graph() -> Replayer:
        # This takes no GPU: ONNX Runtime's CPU kernels run the same graph.
        on_cpu = replace(bundle, manifest=replace(bundle.manifest, providers=(CPU_PROVIDER,)))
        graph, name = bundle.file(GRAPH_FILE).read_bytes(), None if chosen is None else chosen.name
        return GraphReplayer(on_cpu, graph, physical_cores(), exact=True, adapter=name)

    return _Ground(_merged(source, in_weights), sha256, context, limit, open_graph, bundle, chosen)


def _beside(bundle: Bundle, adapters: Sequence[Adapter]) -> Adapter | None:
    """The adapter that the bundle has beside its weights; None where there is none, or they are part of the weights."""
    records = {record.name: record for record in bundle.manifest.adapters}
    beside = [adapter for adapter in adapters if (found := records.get(adapter.name)) is not None and found.file]
    if beside and len(adapters) > 1:
        raise UsageError(
            f"The bundle {bundle.path} has {beside[0].name} beside its weights, of which one is chosen at a time; name "
            "one --adapter."
        )
    for adapter in beside:
        _same_adapter(bundle, adapter, records[adapter.name])
    return beside[0] if beside else None


def _same_adapter(bundle: Bundle, adapter: Adapter, record: AdapterRecord) -> None:
    if (sha256_of(adapter.path / WEIGHTS), adapter.weight) != (record.sha256, record.weight):
        raise LlamaExportError(
            f"The adapter {adapter.path} is another one than the {record.name} of the bundle {bundle.path}, or has "
            "another weight; name the one that the bundle was made with."
        )


def _on_foreign(options: ReferenceOptions, source: Source, adapters: Sequence[Adapter], path: Path) -> _Ground:
    folder, sha256 = open_foreign(path), model_sha256(source, adapters)
    context = _context(options, folder.context, str(path))

    def check(prompts: Sequence[Asked]) -> None:
        written = [Prompt(one.name, one.text, one.ids, len(one.ids), 0) for one in prompts]
        check_reference(folder, identity_of(source, sha256), written, source.model_id)

    def open_graph() -> Replayer:
        return ForeignReplayer(folder, threads=physical_cores(), exact=True)

    return _Ground(_merged(source, adapters), sha256, context, folder.context, open_graph, check=check)


def _on_export(
    options: ReferenceOptions, source: Source, adapters: Sequence[Adapter], scratch: Path, progress: Progress
) -> _Ground:
    known = source.shape.longest
    context = _context(options, known, source.model_id) if options.context else min(known, _CONTEXT)
    sha256 = model_sha256(source, adapters)
    small = source.shape.parameters() * 4 < _SMALL
    own = None if source.native_precision is not None else "int4"
    wanted = replace(
        _build_options(options, scratch / "bundle"), precision="fp32" if small else own, context=context, force=True
    )

    def open_graph() -> Replayer:
        build(wanted, progress)
        bundle = open_bundle(wanted.output)
        give_back()
        return GraphReplayer(bundle, bundle.file(GRAPH_FILE).read_bytes(), physical_cores(), exact=True)

    return _Ground(_merged(source, adapters), sha256, context, context, open_graph)


def _build_options(options: ReferenceOptions, output: Path) -> BuildOptions:
    """Of the temporary export, and what its adapters are opened by."""
    return BuildOptions(
        options.model,
        "cpu",
        output,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        reference=False,
        adapters=options.adapters,
        any_base=options.any_base,
    )


def _context(options: ReferenceOptions, limit: int, whose: str) -> int:
    if options.context is not None and options.context > limit:
        raise UsageError(f"--context {options.context} is more than the {limit} tokens of {whose}; take a smaller one.")
    return options.context or limit


def _recorded(options: ReferenceOptions, ground: _Ground, scratch: Path, progress: Progress) -> Reference:
    source = ground.source
    layers = _layers(options.layers, source.shape.layers)
    prompts = _prompts(options, ground)
    ground.check(prompts)
    side = _side(options, ground)
    proposals = _proposals(ground, prompts, progress)
    progress.stage("Recording what PyTorch computes")
    model = StreamedModel(transformers_config(source.config), source.tensors, ground.rope_context, (side,))
    full = {side.kind: scratch / "logits"} if options.full else None
    references, computed = prove(model, _about(ground), proposals, layers, progress, full)
    reference = references[side.kind]
    if side.kind == EXACT and ground.bundle is not None:
        reference = _as_stored(reference, ground, computed[EXACT].fingerprints)
    return reference


def _proposals(ground: _Ground, prompts: Sequence[Asked], progress: Progress) -> list[Proposed]:
    """Greedy text of the exported graph, whose session is gone before PyTorch begins."""
    replayer = ground.open()
    progress.stage("Proposing greedy text")
    return [Proposed(*pair) for pair in zip(prompts, propose(replayer, prompts), strict=True)]


def _about(ground: _Ground) -> About:
    source, bundle = ground.source, ground.bundle
    return About(
        source.model_id,
        source.revision,
        stored_type(source),
        identity_of(source, ground.sha256),
        tool_versions(),
        None if bundle is None else bundle.manifest.precision,
        None if ground.adapter is None else ground.adapter.name,
    )


def _prompts(options: ReferenceOptions, ground: _Ground) -> tuple[Asked, ...]:
    if options.prompts is None:
        return built_in_prompts(ground.source, ground.context, options.new_tokens)
    return prompts_of_file(ground.source, options.prompts, ground.context, options.new_tokens or CONTINUATION)


def _layers(asked: str | None, layers: int) -> tuple[int, ...]:
    if asked is None:
        return spread_layers(layers)
    if asked == "all":
        return tuple(range(layers))
    words = [word.strip() for word in asked.split(",")]
    if not {*words} <= {str(layer) for layer in range(layers)}:
        raise UsageError(f"--layers {asked} must be numbers from 0 to {layers - 1} with commas between them, or `all`.")
    return tuple(sorted({int(word) for word in words}))


def _side(options: ReferenceOptions, ground: _Ground) -> Side:
    tensors, added = ground.source.tensors, {} if ground.adapter is None else ground.adapter.parts
    if not options.exact or ground.bundle is None:
        return Original(tensors, added)
    manifest = ground.bundle.manifest
    stored = load_index_of_bundle(ground.bundle.path, EXACT)
    if manifest.quantisation is not None and not manifest.quantisation.retold:
        values = stored_tensors(ground.bundle, stored.weights, tensors)
        return Exact(values, dict.fromkeys(values, FP32), manifest.shape.activations, added)
    formats = recorded_formats(stored.weights, manifest.backend, tensors)
    return Exact(tensors, formats, manifest.shape.activations, added)


def _as_stored(reference: Reference, ground: _Ground, computed: Any) -> Reference:
    """With the records of the bundle's own exact reference, once they are found to hold."""
    assert ground.bundle is not None
    name = None if ground.adapter is None else ground.adapter.name
    stored = load_index_of_bundle(ground.bundle.path, EXACT, name)
    for record in stored.weights if name is None else ():
        if computed[record.name][0] != record.sha256:
            raise LlamaExportError(
                f"{record.name} is not what the bundle {ground.bundle.path} says it was made of; build the bundle "
                "again."
            )
    index = replace(reference.index, weights=stored.weights, tables=stored.tables, inputs=stored.inputs)
    return replace(reference, index=index)
