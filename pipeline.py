"""From a checkpoint and a target to a bundle: the one place where all four folders meet."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, dialects, tables
from .allocating import chosen
from .build_options import BuildOptions
from .build_report import BuildReport
from .engines import engine_record, need_builder, write_engines
from .export.calibration_text import TOKENS
from .export.config import model_notes, stretch_note, transformers_config
from .export.destination import check_destination, require_space, require_usable, staged
from .export.families import FAMILIES
from .export.genai_config import genai_config
from .export.licences import duties, folder_licence, legal_files, legal_texts
from .export.lora.peft_folder import WEIGHTS, Adapter
from .export.loss import Loss, loss_warning
from .installed import installed_version
from .limits import limits_of
from .planning import BuildPlan, plan_build
from .progress import Progress, Silent
from .quantised import Quantised, quantised
from .runtime.bundle import (
    ADAPTERS,
    DATA_FILE,
    GRAPH_FILE,
    QUALITY_FILE,
    AdapterRecord,
    Limits,
    Manifest,
    ModelRecord,
    Shape,
    Tokens,
    adapter_file,
    reference_file,
    seal,
)
from .runtime.hashing import sha256_of_all
from .runtime.threads import physical_cores
from .targets.choice import choose
from .targets.context import CACHE_BYTES, PREFILL_CHUNK
from .targets.devices import load_target
from .targets.host import memory_bytes
from .targets.planner_weights import weights_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .export.prompts import Asked
    from .export.quality_text import QualityText
    from .export.write import Placement
    from .optimize.tensors import Float32, SourceTensor
    from .optimize.trt.linear import InputScale
    from .runtime.proof.reference import WeightRecord
    from .runtime.quality import Quality

# Threads of oneMKL, which PyTorch multiplies with on Intel, are to add in the same order every time, so that builds of
# the same are equal byte for byte ("conditional numerical reproducibility"). It reads this when first it multiplies.
os.environ.setdefault("MKL_CBWR", "AUTO")

_TOOLS = (
    *("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "tokenizers", "gguf"),
    *("onnxruntime", "onnxruntime-gpu"),  # whichever of the two is here
)
_RUNNING = 1.3
"""Bytes of memory that ONNX Runtime takes for each byte of weights, while it loads them."""
_BESIDE_WEIGHTS = 64_000_000
"""Bytes for everything but the weights: graph, tokenizer, reference."""


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
            took = time.perf_counter() - self._began
            self.stages[self._name] = self.stages.get(self._name, 0.0) + took
            self._name = ""


def build(options: BuildOptions, progress: Progress | None = None) -> BuildReport:
    """Make the bundle `options.output`: all of it or nothing.

    Raises UsageError and LlamaExportError, each with one sentence for the user.
    """
    progress = progress or Silent()
    clock = _Clock(progress)
    target = choose(load_target(options.target), jetpack=options.jetpack, backend=options.backend)
    place = check_destination(options.output, force=options.force)
    clock.stage("open", f"Opening {options.model}")
    plan = plan_build(options, target, progress)
    need_builder(plan)
    require_usable(place, force=options.force)
    prompts = _prompts(plan, options)
    limits = limits_of(options)
    if limits is None:
        return _made(plan, options, prompts, place, clock, progress)
    with chosen(plan, options, limits, place, clock.stage, progress) as rounds:
        return rounds.first_that_holds(lambda plan: _made(plan, options, prompts, place, clock, progress))


def _made(
    plan: BuildPlan, options: BuildOptions, prompts: Sequence[Asked], place: Path, clock: _Clock, progress: Progress
) -> BuildReport:
    """Make the bundle that is planned. Raises AboveLimitError where it costs more than was asked for."""
    plan, tensors, inputs = _calibrated(plan, clock, progress)
    require_space(place.parent, plan.stored + _BESIDE_WEIGHTS + _measuring_bytes(plan))
    for warning in (plan.context.warning, stretch_note(plan.source.config, plan.context.context)):
        if warning:
            progress.warn(warning)
    with (
        quantised(plan, tensors, place, clock.stage, progress) as found,
        staged(options.output, force=options.force) as folder,
    ):
        written = _write_model(plan, found, inputs, folder, clock, progress)
        if written.losses:
            progress.warn(loss_warning(written.losses))
        if plan.allocation is not None:
            plan.allocation.check_bytes(sum((folder / name).stat().st_size for name in (GRAPH_FILE, DATA_FILE)))
        _write_companions(plan, folder)
        manifest, quality = _manifest(plan, found), None
        if plan.quality is not None:
            clock.stage("quality", f"Measuring what quantisation costs on {plan.quality.tokens:,} tokens")
            quality = _write_quality(plan, found, plan.quality, written, folder, manifest, progress)
            if plan.allocation is not None:
                plan.allocation.check_kl(quality.end.weights.kl.value)
        if options.reference:
            clock.stage("reference", "Recording what PyTorch computes")
            _write_references(plan, found, prompts, inputs, written, folder, manifest, progress)
        built = None
        if manifest.engine is not None:
            clock.stage("engine", f"Making engines for {plan.target.name}")
            manifest, built = write_engines(plan, folder, manifest, progress)
        else:
            _write_genai_config(plan, folder)
        clock.stage("seal", "Hashing the files")
        manifest = seal(folder, manifest)
    clock.stop()
    return BuildReport(
        *(options.output, manifest, plan.context, manifest.notes, written.losses, clock.stages),
        *(built, quality, plan.allocation),
    )


def _too_large(data: Path) -> str:
    """Why a model with these weights cannot be run here, "" where it can."""
    needed, (_, free) = int(_RUNNING * data.stat().st_size), memory_bytes()
    if not free or needed <= free:
        return ""
    return f"running it takes about {tables.size(needed)} of memory, but only {tables.size(free)} are free here"


def _measuring_bytes(plan: BuildPlan) -> int:
    """What measuring quality takes on the disk, for a while: logits of all tokens."""
    return 0 if plan.quality is None else 4 * plan.quality.tokens * plan.source.shape.vocab


@dataclass(frozen=True)
class _Written:
    """What recording the reference needs of the model's files. matrices: of each adapter beside the weights.
    cache_scales: of a cache in int8, by its inputs.
    """

    placements: Mapping[str, Placement]
    tables: Mapping[str, npt.NDArray[np.generic]]
    matrices: Mapping[str, Sequence[WeightRecord]]
    losses: Sequence[Loss]
    cache_scales: Mapping[str, Float32]


def _calibrated(
    plan: BuildPlan, clock: _Clock, progress: Progress
) -> tuple[BuildPlan, Mapping[str, SourceTensor], Mapping[str, InputScale]]:
    """The plan without formats that would lose too much, the checkpoint's tensors with the channel scales that were
    moved, and the scales of what projections read, by weight; none where that is not quantised.
    """
    if plan.calibration is None or not plan.rounds_inputs:
        return plan, plan.source.tensors, {}
    text = plan.calibration.first(TOKENS)
    clock.stage("calibrate", f"Calibrating on {text.tokens:,} tokens of {text.name}")
    from .export.calibrate import calibrate, input_scales, settled_formats  # noqa: PLC0415
    from .optimize.equivalence import scaled  # noqa: PLC0415

    found = calibrate(plan.source, text, plan.context.context, plan.formats, progress)
    formats = settled_formats(found, plan.formats)
    weights = weights_of(
        plan.source.tensors, formats, plan.made.dialect, plan.made.opset, CACHE_BYTES[plan.made.activations]
    )
    left = sum(format != plan.formats[name] for name, format in formats.items())
    notes = (*plan.source.notes, text.note, *_left_out(left))
    source = plan.source.with_other(notes=notes)
    settled = replace(plan, source=source, formats=formats, stored=weights.total)
    return settled, scaled(source.tensors, found.factors), input_scales(found, formats)


def _left_out(count: int) -> tuple[str, ...]:
    if not count:
        return ()
    return (
        f"{count} matrices stay in float16, since a few of the numbers that they multiply are so large that 8 bits "
        "would leave little of the others.",
    )


def _write_model(
    plan: BuildPlan,
    found: Quantised,
    inputs: Mapping[str, InputScale],
    folder: Path,
    clock: _Clock,
    progress: Progress,
) -> _Written:
    """Write model.onnx, its data, and the adapters beside them."""
    scales = _cache_scales(plan, found, clock, progress)
    clock.stage("trace", f"Tracing transformers' {FAMILIES[plan.source.shape.family].name}")
    import torch  # noqa: PLC0415 (seconds to import, and only building needs it)

    from .export.canonical import canonical  # noqa: PLC0415
    from .export.lora.bundle_file import write_adapter  # noqa: PLC0415
    from .export.rotary import rotary_tables  # noqa: PLC0415
    from .export.write import lay_out, placements, refer, tables_of, write_data  # noqa: PLC0415
    from .optimize.ort.low_rank import slots_of  # noqa: PLC0415

    config, context = transformers_config(plan.source.config), plan.context.context
    model = canonical(config, context=context, dtype=getattr(torch, plan.made.activations))
    clock.stage("lower", "Fusing and lowering the graph")
    dialects.lower(model, plan, rotary_tables(config, context), inputs, scales)
    layout = lay_out(model)
    clock.stage("write", "Writing the weights")
    losses = write_data(model, layout, found.tensors, folder, progress, physical_cores())
    slots, dtype = slots_of(model), plan.made.activations
    matrices = {adapter.name: write_adapter(adapter, slots, folder, dtype) for adapter in plan.beside}
    placed, tables = placements(model, found.tensors), tables_of(model, layout)
    refer(model, layout, folder)
    return _Written(placed, tables, matrices, losses, scales)


def _cache_scales(plan: BuildPlan, found: Quantised, clock: _Clock, progress: Progress) -> Mapping[str, Float32]:
    """Those of a cache in int8, by its inputs; none for a cache in the dtype of activations. found: the weights that
    are written, whose values may be larger or smaller than the checkpoint's, as the product that reads them makes up.
    """
    if plan.cached is None:
        return {}
    clock.stage("cache", f"Calibrating the cache on {plan.cached.tokens:,} tokens of {plan.cached.name}")
    from .export.cache_scales import cache_scales  # noqa: PLC0415

    source = plan.source.with_other(tensors=found.tensors)
    return cache_scales(source, plan.cached, plan.context.context, dialects.cache_head_dim(plan), progress)


def _write_companions(plan: BuildPlan, folder: Path) -> None:
    """Config, tokenizer, template and licence as the checkpoint has them."""
    source = plan.source
    for name in source.files:
        (folder / name).write_bytes(source.content(name))
    for adapter in plan.adapters:
        for name, file in legal_files(adapter.path).items():
            carried = folder / ADAPTERS / adapter.name / name
            carried.parent.mkdir(parents=True, exist_ok=True)
            carried.write_bytes(file.read_bytes())


def _write_genai_config(plan: BuildPlan, folder: Path) -> None:
    """What onnxruntime-genai reads of an `ort` bundle."""
    source, shape, tokens = plan.source, plan.source.shape, plan.source.tokens
    genai = genai_config(
        replace(shape, head_dim=dialects.cache_head_dim(plan)),  # it allocates the cache
        context=plan.context.context,
        bos_token_id=tokens.bos,
        eos_token_ids=tokens.eos,
        pad_token_id=tokens.pad,
        generation=source.json("generation_config.json"),
        provider="cpu" if plan.made.on_cpu else "cuda",
    )
    (folder / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")


def _manifest(plan: BuildPlan, found: Quantised) -> Manifest:
    source, shape, tokens = plan.source, plan.source.shape, plan.source.tokens
    return Manifest(
        model=ModelRecord(
            source.model_id,
            source.kind,
            source.revision,
            source.licence,
            duties(
                source.licence, *legal_texts(source.files), *(folder_licence(adapter.path) for adapter in plan.adapters)
            ),
            plan.sha256,
        ),
        target=plan.target.name,
        dialect=plan.made.dialect,
        precision=plan.precision,
        shape=Shape(
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=dialects.cache_head_dim(plan),
            ffn=shape.ffn,
            vocab=shape.vocab,
            cache_dtype=plan.cache,
        ),
        limits=Limits(plan.context.context, plan.batch, min(PREFILL_CHUNK, plan.context.context)),
        tokens=Tokens(tokens.bos, tokens.eos, tokens.pad, tokens.add_bos),
        minimum=dialects.minimum_versions(plan),
        providers=plan.made.providers,
        adapters=tuple(_adapter_record(adapter, merged=plan.merged) for adapter in plan.adapters),
        backend=plan.made.backend,
        engine=engine_record(plan.made.release),
        tools=tool_versions(),
        notes=(*plan.made.notes, *source.notes, *model_notes(source.config, plan.context.context)),
        quantisation=found.record,
    )


def _adapter_record(adapter: Adapter, *, merged: bool) -> AdapterRecord:
    sha256 = sha256_of_all([adapter.path / WEIGHTS])[adapter.path / WEIGHTS]
    file = None if merged else adapter_file(adapter.name)
    return AdapterRecord(
        adapter.name, adapter.base, adapter.weight, adapter.rank, sha256, file, folder_licence(adapter.path)
    )


def tool_versions() -> dict[str, str]:
    """Versions of what makes a bundle."""
    return {
        "llama-export": __version__,
        "python": platform.python_version(),
        **{name: version for name in _TOOLS if (version := installed_version(name)) is not None},
    }


def _prompts(plan: BuildPlan, options: BuildOptions) -> Sequence[Asked]:
    """What the references record; none where there will be none."""
    from .export.prompts import built_in_prompts, prompts_of_file  # noqa: PLC0415

    if not options.reference:
        return ()
    if options.prompts is None:
        return built_in_prompts(plan.source, plan.context.context)
    return prompts_of_file(plan.source, options.prompts, plan.context.context)


def _write_references(
    plan: BuildPlan,
    found: Quantised,
    prompts: Sequence[Asked],
    inputs: Mapping[str, InputScale],
    written: _Written,
    folder: Path,
    manifest: Manifest,
    progress: Progress,
) -> None:
    """Those of the model, and of each adapter beside its weights."""
    from .export.record import Recorder  # noqa: PLC0415
    from .runtime.proof.reference_file import save  # noqa: PLC0415

    recorder = Recorder(plan.source, found.tensors, folder, manifest, plan.sha256, prompts, tool_versions(), progress)
    for kind, reference in recorder.model(written.placements, written.tables, inputs, written.cache_scales).items():
        save(reference, folder / reference_file(kind))
    for adapter in plan.beside:
        progress.stage(f"Recording what PyTorch computes with {adapter.name}")
        matrices = written.matrices[adapter.name]
        for kind, reference in recorder.adapter(adapter, matrices, plan.formats).items():
            save(reference, folder / reference_file(kind, adapter.name))


def _write_quality(
    plan: BuildPlan,
    found: Quantised,
    text: QualityText,
    written: _Written,
    folder: Path,
    manifest: Manifest,
    progress: Progress,
) -> Quality:
    """What quantisation cost."""
    from .export.quality import OWN_CODES, Measurer  # noqa: PLC0415
    from .runtime.quality import Prediction  # noqa: PLC0415

    dtype = plan.made.activations
    measurer = Measurer(
        *(plan.source, found.tensors, written.placements, folder, manifest, dtype, text, progress),
        cannot_run=_too_large(folder / DATA_FILE),
    )
    expected = None if plan.allocation is None else Prediction(plan.allocation.kl, plan.stored)
    quality = measurer.quality(plan.method or OWN_CODES, expected)
    (folder / QUALITY_FILE).write_text(quality.to_json(), encoding="utf-8")
    return quality
