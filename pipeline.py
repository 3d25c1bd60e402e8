"""From a checkpoint and a target to a bundle: the one place where all four folders meet."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .export.config import model_notes, transformers_config
from .export.destination import check_destination, require_space, staged
from .export.families import FAMILIES
from .export.genai_config import genai_config
from .export.licences import duties, legal_texts
from .export.loss import Loss, loss_warning
from .export.source import Source, open_source
from .installed import installed_version
from .optimize.formats import Format, stored_bytes
from .optimize.plan import column_orders, plan_formats
from .optimize.requirements import WINDOW_MINIMUM_ONNXRUNTIME
from .progress import Progress, Silent
from .runtime.bundle import Limits, Manifest, ModelRecord, Shape, Tokens, seal
from .runtime.threads import physical_cores
from .tables import size
from .targets.context import CACHE_BYTES, PREFILL_CHUNK, ContextChoice, Load, choose_context
from .targets.devices import Target, load_target
from .targets.made import Made, what_is_made

if TYPE_CHECKING:
    from .export.write import Placement

SHIPPED_ACCURACY_LEVEL = {"float32": 4, "float16": 0}
"""MatMulNBits' accuracy_level by activations: on the CPU int8 activations run at the speed of memory."""

_TOOLS = (
    *("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "tokenizers", "gguf"),
    *("onnxruntime", "onnxruntime-gpu"),  # whichever of the two is here
)
_BESIDE_WEIGHTS = 64_000_000
"""Bytes for everything but the weights: graph, tokenizer, reference."""


@dataclass(frozen=True)
class BuildOptions:
    """What `llama-export build` was asked for; None leaves the choice to model and target."""

    model: str
    target: str
    output: Path
    precision: str | None = None
    context: int | None = None
    batch: int = 1
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    reference: bool = True
    force: bool = False


@dataclass(frozen=True)
class BuildReport:
    """What was made. losses: of tensors that came quantised and could not be kept as they are; stages: seconds by
    stage.
    """

    output: Path
    manifest: Manifest
    context: ContextChoice
    notes: tuple[str, ...]
    losses: Sequence[Loss]
    stages: Mapping[str, float]

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.manifest.files.values())

    def lines(self) -> list[str]:
        """The report for people."""
        manifest, seconds = self.manifest, sum(self.stages.values())
        return [
            f"{self.output}: {manifest.model.id}, {manifest.precision}, for {manifest.target}, "
            f"{size(self.bytes)} in {seconds:.1f} s",
            self.context.reason,
            *self.notes,
            f"Licence: {manifest.model.licence_told}.",
            *manifest.model.duties,
        ]

    def to_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "schema_version": 1,
            "output": str(self.output),
            "bytes": self.bytes,
            "seconds": {name: round(value, 3) for name, value in self.stages.items()},
            "context": asdict(self.context),
            "notes": list(self.notes),
            "losses": [{**asdict(loss), "relative": loss.relative} for loss in self.losses],
            "manifest": json.loads(self.manifest.to_json()),
        }


@dataclass(frozen=True)
class _Plan:
    """All that is decided before anything is made. weights: bytes of them as stored."""

    source: Source
    target: Target
    made: Made
    precision: str
    formats: Mapping[str, Format]
    weights: int
    context: ContextChoice
    batch: int


class _Clock:
    """Seconds of each stage, told to the progress as they begin."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._began, self._name = progress, time.perf_counter(), ""
        self.stages: dict[str, float] = {}

    def stage(self, name: str, title: str) -> None:
        self.stop()
        self._name, self._began = name, time.perf_counter()
        self._progress.stage(title)

    def stop(self) -> None:
        if self._name:
            self.stages[self._name] = time.perf_counter() - self._began


def build(options: BuildOptions, progress: Progress | None = None) -> BuildReport:
    """Make the bundle `options.output`: all of it or nothing.

    Raises UsageError and LlamaExportError, each with one sentence for the user.
    """
    progress = progress or Silent()
    clock = _Clock(progress)
    target = load_target(options.target)
    place = check_destination(options.output, force=options.force)
    clock.stage("open", f"Opening {options.model}")
    plan = _plan(options, target, progress)
    require_space(place.parent, plan.weights + _BESIDE_WEIGHTS)
    if plan.context.warning:
        progress.warn(plan.context.warning)
    with staged(options.output, force=options.force) as folder:
        placements, losses = _write_model(plan, folder, clock, progress)
        if losses:
            progress.warn(loss_warning(losses))
        _write_companions(plan, folder)
        manifest = _manifest(plan)
        if options.reference:
            clock.stage("reference", "Recording what PyTorch computes")
            _write_reference(plan, placements, folder, manifest, progress)
        clock.stage("seal", "Hashing the files")
        manifest = seal(folder, manifest)
    clock.stop()
    return BuildReport(options.output, manifest, plan.context, manifest.notes, losses, clock.stages)


def _plan(options: BuildOptions, target: Target, progress: Progress) -> _Plan:
    made = what_is_made(target)
    source = open_source(
        options.model,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        progress=progress,
    )
    keeps_own = options.precision is None and source.native_precision is not None
    precision = None if keeps_own else options.precision or target.default_precision
    formats = plan_formats(source.tensors, precision)
    scale = CACHE_BYTES[made.activations]
    weights: Counter[str] = Counter()
    for name, tensor in source.tensors.items():
        weights[formats[name].name] += stored_bytes(tensor.shape, formats[name], scale)
    load = Load(source.shape, weights, made.activations, made.on_cpu, options.batch)
    context = choose_context(target, load, source.shape.max_positions, options.context, source.shape.longest)
    named = precision or str(source.native_precision)
    return _Plan(source, target, made, named, formats, weights.total(), context, options.batch)


def _write_model(
    plan: _Plan, folder: Path, clock: _Clock, progress: Progress
) -> tuple[dict[str, Placement], list[Loss]]:
    """Write model.onnx and its data, and tell where each tensor went, and what it lost."""
    clock.stage("trace", f"Tracing transformers' {FAMILIES[plan.source.shape.family].name}")
    import torch  # noqa: PLC0415 (seconds to import, and only building needs it)

    from .export.canonical import canonical  # noqa: PLC0415
    from .export.rotary import rotary_tables  # noqa: PLC0415
    from .export.write import lay_out, placements, refer, write_data  # noqa: PLC0415
    from .optimize.ort import OrtOptions, lower  # noqa: PLC0415

    config, context = transformers_config(plan.source.config), plan.context.context
    model = canonical(config, context=context, dtype=getattr(torch, plan.made.activations))
    clock.stage("lower", "Fusing and lowering the graph")
    level = SHIPPED_ACCURACY_LEVEL[plan.made.activations]
    orders = column_orders(plan.source.tensors, plan.formats)
    lower(model, OrtOptions(plan.formats, rotary_tables(config, context), level, orders))
    layout = lay_out(model)
    clock.stage("write", "Writing the weights")
    losses = write_data(model, layout, plan.source.tensors, folder, progress, physical_cores())
    placed = placements(model, plan.source.tensors)
    refer(model, layout, folder)
    return placed, losses


def _write_companions(plan: _Plan, folder: Path) -> None:
    """Config, tokenizer, template and licence as the checkpoint has them, and what onnxruntime-genai reads."""
    from .optimize.ort.odd_heads import cache_head_dim  # noqa: PLC0415

    source, shape, tokens = plan.source, plan.source.shape, plan.source.tokens
    for name in source.files:
        (folder / name).write_bytes(source.content(name))
    genai = genai_config(
        replace(shape, head_dim=cache_head_dim(shape.head_dim)),  # it allocates the cache
        context=plan.context.context,
        bos_token_id=tokens.bos,
        eos_token_ids=tokens.eos,
        pad_token_id=tokens.pad,
        generation=source.json("generation_config.json"),
        provider="cpu" if plan.made.on_cpu else "cuda",
    )
    (folder / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")


def _manifest(plan: _Plan) -> Manifest:
    from .optimize.ort import MINIMUM_ONNXRUNTIME  # noqa: PLC0415
    from .optimize.ort.odd_heads import cache_head_dim  # noqa: PLC0415

    source, shape, tokens = plan.source, plan.source.shape, plan.source.tokens
    slides = shape.window_in(plan.context.context) is not None
    return Manifest(
        model=ModelRecord(
            source.model_id,
            source.kind,
            source.revision,
            source.licence,
            duties(source.licence, *legal_texts(source.files)),
        ),
        target=plan.target.name,
        dialect=plan.made.dialect,
        precision=plan.precision,
        shape=Shape(
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=cache_head_dim(shape.head_dim),
            ffn=shape.ffn,
            vocab=shape.vocab,
            cache_dtype=plan.made.activations,
        ),
        limits=Limits(plan.context.context, plan.batch, min(PREFILL_CHUNK, plan.context.context)),
        tokens=Tokens(tokens.bos, tokens.eos, tokens.pad, tokens.add_bos),
        minimum={"python": "3.10", "onnxruntime": WINDOW_MINIMUM_ONNXRUNTIME if slides else MINIMUM_ONNXRUNTIME},
        providers=plan.made.providers,
        tools=tool_versions(),
        notes=(*plan.made.notes, *source.notes, *model_notes(source.config, plan.context.context)),
    )


def tool_versions() -> dict[str, str]:
    """Versions of what makes a bundle."""
    return {
        "llama-export": __version__,
        "python": platform.python_version(),
        **{name: version for name in _TOOLS if (version := installed_version(name)) is not None},
    }


def _write_reference(
    plan: _Plan, placements: Mapping[str, Placement], folder: Path, manifest: Manifest, progress: Progress
) -> None:
    from .export.record import record_reference  # noqa: PLC0415
    from .runtime.reference import save_reference  # noqa: PLC0415

    reference = record_reference(
        plan.source,
        placements,
        folder,
        # Proposing the greedy text takes no GPU: ONNX Runtime's CPU kernels run the same graph.
        replace(manifest, providers=("CPUExecutionProvider",)),
        tool_versions(),
        progress,
    )
    save_reference(reference, folder)
