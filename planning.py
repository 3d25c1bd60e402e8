"""What a build will make, decided before anything is made: everything that can be refused is refused here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .build_options import MERGE, RUNTIME, BuildOptions
from .errors import LlamaExportError, UsageError
from .export.calibration_text import CACHE_TOKENS, SOLVED_TOKENS, TOKENS, CalibrationText, calibration_text
from .export.folder import check_carried
from .export.identity import model_sha256
from .export.licences import legal_files
from .export.lora.merge import base_mismatch, fitted, merged
from .export.lora.peft_folder import Adapter, read_adapter
from .export.lora.sizes import numbers_beside
from .export.quality_text import QualityText, quality_text
from .export.source import Source, open_source
from .limits import Allocation, limits_of
from .names import BUILT_IN, GPTQ, ONNXRUNTIME, RTN, SEARCH
from .optimize.formats import EMBEDDING, Format
from .optimize.overlay import ours
from .optimize.plan import has_wide_head, head_of, is_quantised
from .optimize.schemes import AUTO
from .optimize.tensors import SourceTensor
from .progress import Progress
from .runtime.bundle import MAX_BATCH
from .targets.context import CACHE_BYTES, ContextChoice
from .targets.devices import Target
from .targets.made import Made, what_is_made
from .targets.planner import Assessment, Model, Wish, assess
from .targets.planner_text import context_choice, precision_note

_WIDE_HEAD = (
    "{head} stays {format}, as the checkpoint has it; the CPU widens it to float32 and reads it whole for each token: "
    "--head-precision int8 makes the bundle quicker, at some loss."
)
_SMALLEST = "int4"
"""What `AUTO` is until formats are chosen."""


@dataclass(frozen=True)
class BuildPlan:
    """All that is decided before anything is made.

    source: with adapters merged in, where they are to be. sha256: of what it was before, with those that are merged,
    see `export.identity.model_sha256`. adapters: all of them; merged: whether they are in the
    weights. stored: bytes of weights, and of adapters beside them. calibration: the text that scales of activations
    come from and that a method learns from, None where there is neither. method: of `names.METHODS`, by which weights
    are quantised; None where none are. quality: the text that what quantisation cost is measured on, None
    where it is not. cached: the text that the scales of a cache in int8 come from, None for a cache in the dtype of
    activations. allocation: what `--precision auto` chose, None before that and for other precisions.
    """

    source: Source
    sha256: str
    adapters: tuple[Adapter, ...]
    merged: bool
    target: Target
    made: Made
    precision: str
    formats: Mapping[str, Format]
    stored: int
    context: ContextChoice
    batch: int
    calibration: CalibrationText | None
    quality: QualityText | None = None
    cached: CalibrationText | None = None
    method: str | None = None
    allocation: Allocation | None = None

    @property
    def rounds_inputs(self) -> bool:
        """Whether what products read is rounded by scales that come from the text."""
        return self.calibration is not None and _has_whole_rows(self.formats)

    @property
    def cache(self) -> str:
        """The type of the cache."""
        return self.made.activations if self.cached is None else "int8"

    @property
    def beside(self) -> tuple[Adapter, ...]:
        """The adapters that stay beside the weights."""
        return () if self.merged else self.adapters


def plan_build(options: BuildOptions, target: Target, progress: Progress) -> BuildPlan:
    """Open the checkpoint and its adapters, and decide formats and context.

    Raises UsageError and LlamaExportError, each with one sentence for the user.
    """
    made = what_is_made(target)
    limits_of(options)
    if not 1 <= options.batch <= MAX_BATCH:
        raise UsageError(f"--batch must be from 1 to {MAX_BATCH}, not {options.batch}.")
    if options.adapter_mode == RUNTIME and made.backend != ONNXRUNTIME:
        raise UsageError(
            "--adapter-mode runtime is for ONNX Runtime, while TensorRT's engines have their weights fixed: use "
            "--adapter-mode merge, or --backend onnxruntime."
        )
    if options.adapter_mode == RUNTIME and options.cache_precision == "int8":
        raise UsageError(
            "--cache-precision int8 has scales of one model, while --adapter-mode runtime changes keys and values with "
            "each adapter: use --adapter-mode merge, or leave --cache-precision out."
        )
    source = open_source(
        options.model,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        progress=progress,
    )
    adapters, merge = open_adapters(options, source), options.adapter_mode == MERGE
    sha256 = model_sha256(source, adapters if merge else ())
    if merge:
        source = source.with_other(tensors=merged(source.tensors, adapters))
    beside = _bytes_beside(() if merge else adapters, source, made)
    found = _assessed(options, target, made, source, beside)
    formats, keeps_own = found.formats, options.precision is None and source.native_precision is not None
    if (note := precision_note(found)) is not None:
        source = source.with_other(notes=(*source.notes, note))
    if keeps_own:
        source = source.with_other(notes=(*source.notes, _kept(source.tensors, formats)))
    if keeps_own and made.on_cpu and has_wide_head(source.tensors, formats):
        head = head_of(source.tensors)
        note = _WIDE_HEAD.format(head=head, format=formats[head].name)
        source = source.with_other(notes=(*source.notes, note))
    context, stored = context_choice(found, force=options.force), found.weights.total + sum(beside)
    method = _method(options, source.tensors, formats)
    text = _calibration_text(options, found, source, method, context.context)
    place = made.place(found.precision)
    if place is not None and place.note:
        source = source.with_other(notes=(*source.notes, place.note))
    cached = _cache_text(options, found, source, context.context)
    if cached is not None:
        note = f"The cache is rounded to int8, by scales calibrated on {cached.tokens:,} tokens of {cached.name}."
        source = source.with_other(notes=(*source.notes, note))
    measured = _quality_text(options, source, formats, context.context)
    if isinstance(measured, str):
        source, measured = source.with_other(notes=(*source.notes, measured)), None
    return BuildPlan(
        source=source,
        sha256=sha256,
        adapters=adapters,
        merged=merge,
        target=target,
        made=made,
        precision=AUTO if options.precision == AUTO else found.precision,
        formats=formats,
        stored=stored,
        context=context,
        batch=options.batch,
        calibration=text,
        quality=measured,
        cached=cached,
        method=method,
    )


def with_formats(plan: BuildPlan, options: BuildOptions, formats: Mapping[str, Format]) -> BuildPlan:
    """The plan with formats that were chosen after it was made, and the bytes and the context that they leave."""
    beside = _bytes_beside(plan.beside, plan.source, plan.made)
    found = _assessed(options, plan.target, plan.made, plan.source, beside, formats)
    context = context_choice(found, force=options.force)
    method = _method(options, plan.source.tensors, formats)
    return replace(plan, formats=formats, stored=found.weights.total + sum(beside), context=context, method=method)


def _has_whole_rows(formats: Mapping[str, Format]) -> bool:
    """Whether there are weights with a scale a row, whose products may be of 8-bit numbers."""
    return any(format.whole for format in formats.values())


def _method(options: BuildOptions, tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format]) -> str | None:
    """How weights are quantised: as asked for, else the best that there is with what was given."""
    blocks = {name for name, tensor in tensors.items() if ours(tensor, formats[name])}
    solved = blocks - ({EMBEDDING} - {head_of(tensors)})  # no text tells of rows that are looked up
    asked = options.method
    unused = (asked == GPTQ and not solved) or (asked == SEARCH and not blocks)
    if unused and options.precision == AUTO:  # chose formats that need no method, which is as good as it gets
        asked = None
    elif unused:
        raise UsageError(
            f"--method {options.method} is for weights that are quantised to blocks of integers here, and none are: "
            "leave it out, or add --precision, such as int4."
        )
    if options.method == GPTQ and options.calibrate is None:
        raise UsageError(f"--method {GPTQ} learns from a text: add --calibrate FILE, or --calibrate {BUILT_IN}.")
    if blocks:
        return asked or (GPTQ if solved and options.calibrate is not None else SEARCH)
    rounded = any(format.quantised and not tensors[name].keeps_own(format) for name, format in formats.items())
    return RTN if rounded else None


def _calibration_text(
    options: BuildOptions, found: Assessment, source: Source, method: str | None, context: int
) -> CalibrationText | None:
    """The text of --calibrate, as much of it as is used. Raises UsageError where nothing would use it."""
    if options.calibrate is None:
        return None
    if method == GPTQ:
        return calibration_text(source, options.calibrate, context, SOLVED_TOKENS)
    if _has_whole_rows(found.formats):
        return calibration_text(source, options.calibrate, context, TOKENS)
    if found.load.cache_dtype == "int8":
        return None
    why = f"--method {method} uses no text" if method is not None else f"{found.precision} quantises nothing here"
    raise UsageError(
        f"--calibrate is for weights that are quantised with the help of a text, and {why}: leave it out, or "
        f"{f'choose --method {GPTQ}' if method is not None else 'add --precision, such as int4'}."
    )


def _cache_text(options: BuildOptions, found: Assessment, source: Source, context: int) -> CalibrationText | None:
    """What a cache in int8 is calibrated on: the user's text, or our own."""
    if found.load.cache_dtype != "int8":
        return None
    return calibration_text(source, options.calibrate or BUILT_IN, context, CACHE_TOKENS)


def _quality_text(
    options: BuildOptions, source: Source, formats: Mapping[str, Format], context: int
) -> QualityText | str | None:
    """What quality is measured on; a sentence where the built-in text tells nothing of this model, None where it is not
    measured.
    """
    if not options.quality or not is_quantised(source.tensors, formats):
        if options.quality_text is not None:
            raise UsageError(
                "--quality-text is for measuring what quantisation costs, and nothing is quantised or measured here; "
                "leave it out."
            )
        return None
    try:
        return quality_text(source, options.quality_text, context)
    except LlamaExportError as error:
        if options.quality_text is not None or options.max_kl is not None:  # which is held to what is measured
            raise
        return f"What quantisation cost was not measured: {error}"


def _assessed(
    options: BuildOptions,
    target: Target,
    made: Made,
    source: Source,
    beside: Sequence[int],
    formats: Mapping[str, Format] | None = None,
) -> Assessment:
    """What the planner finds. beside: bytes of each adapter that is loaded with the weights, one at a time. formats:
    where they have been chosen; until then `AUTO` is planned as `_SMALLEST`.
    """
    automatic = options.precision == AUTO
    if automatic and not made.runs(_SMALLEST):
        raise UsageError(
            f"--precision {AUTO} chooses among integers in blocks, which {target.name} does not run here: choose "
            f"one of {', '.join(made.precisions)}."
        )
    calibrated = options.calibrate is not None
    wish = Wish(
        _SMALLEST if automatic else options.precision,
        options.head_precision,
        options.context,
        options.batch,
        calibrated,
        max(beside, default=0),
        options.cache_precision,
        formats,
    )
    model = Model(source.model_id, source.shape, source.tensors, source.native_precision)
    return assess(target, made, model, wish)


def _bytes_beside(adapters: Sequence[Adapter], source: Source, made: Made) -> list[int]:
    """Bytes of the matrices of each adapter that stays beside the weights."""
    return [numbers_beside(adapter, source.tensors) * CACHE_BYTES[made.activations] for adapter in adapters]


def _kept(tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format]) -> str:
    """Which types of matrices the checkpoint has, and what each is stored as."""
    kinds = Counter((tensor.dtype, formats[name].name) for name, tensor in tensors.items() if len(tensor.shape) > 1)
    pairs = (f"{count} in {dtype} as {format}" for (dtype, format), count in kinds.most_common())
    return f"Without --precision, matrices are stored as they come, or nearest to it: {', '.join(pairs)}."


def open_adapters(options: BuildOptions, source: Source) -> tuple[Adapter, ...]:
    """The adapters that `options` names, which fit the checkpoint and have names of their own.

    Raises UsageError and LlamaExportError, each with one sentence for the user.
    """
    adapters = tuple(fitted(read_adapter(text), source.model_id, source.tensors) for text in options.adapters)
    for adapter in adapters:
        check_carried(adapter.path, legal_files(adapter.path))
        mismatch = base_mismatch(adapter, source.model_id)
        if mismatch is not None and not options.any_base:
            raise LlamaExportError(f"{mismatch}; take that model, or add --any-base if they are the same.")
    counts = Counter(adapter.name.casefold() for adapter in adapters)  # some disks know no case
    for adapter in adapters:
        if counts[adapter.name.casefold()] > 1:
            raise UsageError(f"Two adapters are called {adapter.name}, by which they are told apart; rename a folder.")
    if options.adapter_mode == RUNTIME:
        _check_runtime(options, adapters)
    return adapters


def _check_runtime(options: BuildOptions, adapters: tuple[Adapter, ...]) -> None:
    if not options.adapters:
        raise UsageError("--adapter-mode runtime keeps adapters beside the weights; name them with --adapter.")
    for adapter in adapters:
        if adapter.whole:
            raise LlamaExportError(
                f"The adapter {adapter.name} brings {next(iter(adapter.whole))} along as a whole, which cannot be "
                "chosen at run time; use --adapter-mode merge."
            )
