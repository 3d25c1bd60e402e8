"""What a build will make, decided before anything is made: everything that can be refused is refused here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .build_options import MERGE, RUNTIME, BuildOptions
from .errors import LlamaExportError, UsageError
from .export.calibration_text import CalibrationText, calibration_text
from .export.folder import check_carried
from .export.identity import model_sha256
from .export.licences import legal_files
from .export.lora.merge import base_mismatch, fitted, merged
from .export.lora.peft_folder import Adapter, read_adapter
from .export.lora.sizes import numbers_beside
from .export.source import Source, open_source
from .names import ONNXRUNTIME
from .optimize.formats import Format
from .optimize.plan import has_wide_head, head_of
from .optimize.tensors import SourceTensor
from .progress import Progress
from .runtime.bundle import MAX_BATCH
from .targets.context import CACHE_BYTES, ContextChoice
from .targets.devices import Target
from .targets.made import Made, check_precision, what_is_made
from .targets.planner import Assessment, Model, Wish, assess
from .targets.planner_text import context_choice, precision_note

_WIDE_HEAD = (
    "{head} stays {format}, as the checkpoint has it; the CPU widens it to float32 and reads it whole for each token: "
    "--head-precision int8 makes the bundle quicker, at some loss."
)


@dataclass(frozen=True)
class BuildPlan:
    """All that is decided before anything is made.

    source: with adapters merged in, where they are to be. sha256: of what it was before, with those that are merged,
    see `export.identity.model_sha256`. adapters: all of them; merged: whether they are in the
    weights. stored: bytes of weights, and of adapters beside them. calibration: the text that scales of activations
    come from, None where these are not quantised.
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

    @property
    def beside(self) -> tuple[Adapter, ...]:
        """The adapters that stay beside the weights."""
        return () if self.merged else self.adapters


def plan_build(options: BuildOptions, target: Target, progress: Progress) -> BuildPlan:
    """Open the checkpoint and its adapters, and decide formats and context.

    Raises UsageError and LlamaExportError, each with one sentence for the user.
    """
    made = what_is_made(target)
    if not 1 <= options.batch <= MAX_BATCH:
        raise UsageError(f"--batch must be from 1 to {MAX_BATCH}, not {options.batch}.")
    if options.adapter_mode == RUNTIME and made.backend != ONNXRUNTIME:
        raise UsageError(
            "--adapter-mode runtime is for ONNX Runtime, while TensorRT's engines have their weights fixed: use "
            "--adapter-mode merge, or --backend onnxruntime."
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
    text = calibration_text(source, options.calibrate, context.context) if options.calibrate else None
    return BuildPlan(
        source, sha256, adapters, merge, target, made, found.precision, formats, stored, context, options.batch, text
    )


def _assessed(options: BuildOptions, target: Target, made: Made, source: Source, beside: Sequence[int]) -> Assessment:
    """What the planner finds. beside: bytes of each adapter that is loaded with the weights, one at a time."""
    calibrated = options.calibrate is not None
    wish = Wish(
        options.precision,
        options.head_precision,
        options.context,
        options.batch,
        calibrated,
        max(beside, default=0),
    )
    model = Model(source.model_id, source.shape, source.tensors, source.native_precision)
    found = assess(target, made, model, wish)
    if calibrated and options.precision is None:
        check_precision(target, made, found.precision, calibrated)
    return found


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
