"""What a build will make, decided before anything is made: everything that can be refused is refused here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .build_options import MERGE, RUNTIME, BuildOptions
from .errors import LlamaExportError, UsageError
from .export.calibration_text import CalibrationText, calibration_text
from .export.folder import check_carried
from .export.licences import legal_files
from .export.lora.merge import base_mismatch, fitted, merged
from .export.lora.peft_folder import Adapter, read_adapter
from .export.lora.sizes import numbers_beside
from .export.source import Source, open_source
from .optimize.formats import Format, stored_bytes
from .optimize.plan import has_wide_head, head_of, plan_formats
from .optimize.quantise import dense_format
from .optimize.tensors import SourceTensor
from .progress import Progress
from .runtime.bundle import ONNXRUNTIME
from .targets.context import CACHE_BYTES, ContextChoice, Load, choose_context
from .targets.devices import Target
from .targets.made import Made, check_precision, what_is_made

_WIDE_HEAD = (
    "{head} stays {format}, as the checkpoint has it; the CPU widens it to float32 and reads it whole for each token: "
    "--head-precision int8 makes the bundle quicker, at some loss."
)


@dataclass(frozen=True)
class BuildPlan:
    """All that is decided before anything is made.

    source: with adapters merged in, where they are to be. adapters: all of them; merged: whether they are in the
    weights. stored: bytes of weights, and of adapters beside them. calibration: the text that scales of activations
    come from, None where these are not quantised.
    """

    source: Source
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
    source = open_source(
        options.model,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        progress=progress,
    )
    adapters, merge = _open_adapters(options, source, made), options.adapter_mode == MERGE
    if merge:
        source = source.with_other(tensors=merged(source.tensors, adapters))
    keeps_own = options.precision is None and source.native_precision is not None
    precision = None if keeps_own else options.precision or target.default_precision
    calibrated = options.calibrate is not None
    if precision is not None:
        check_precision(target, made, precision, calibrated)
    formats = plan_formats(source.tensors, precision, options.head_precision, made.policy(calibrated=calibrated))
    if precision is None:
        source = source.with_other(notes=(*source.notes, _kept(source.tensors, formats)))
    if precision is None and made.on_cpu and has_wide_head(source.tensors, formats):
        head = head_of(source.tensors)
        note = _WIDE_HEAD.format(head=head, format=formats[head].name)
        source = source.with_other(notes=(*source.notes, note))
    weights, beside = _weight_bytes(source, formats, made), _bytes_beside(() if merge else adapters, source, made)
    loaded = weights + Counter({dense_format(made.activations).name: max(beside, default=0)})  # one at a time
    load = Load(source.shape, loaded, made.activations, made.on_cpu, options.batch)
    context = choose_context(target, load, source.shape.max_positions, options.context, source.shape.longest)
    named, stored = precision or str(source.native_precision), weights.total() + sum(beside)
    text = calibration_text(source, options.calibrate, context.context) if options.calibrate else None
    return BuildPlan(source, adapters, merge, target, made, named, formats, stored, context, options.batch, text)


def _weight_bytes(source: Source, formats: Mapping[str, Format], made: Made) -> Counter[str]:
    """Bytes of the weights as stored, by the name of their format."""
    weights: Counter[str] = Counter()
    for name, tensor in source.tensors.items():
        weights[formats[name].name] += stored_bytes(tensor.shape, formats[name], CACHE_BYTES[made.activations])
    return weights


def _bytes_beside(adapters: Sequence[Adapter], source: Source, made: Made) -> list[int]:
    """Bytes of the matrices of each adapter that stays beside the weights."""
    return [numbers_beside(adapter, source.tensors) * CACHE_BYTES[made.activations] for adapter in adapters]


def _kept(tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format]) -> str:
    """Which types of matrices the checkpoint has, and what each is stored as."""
    kinds = Counter((tensor.dtype, formats[name].name) for name, tensor in tensors.items() if len(tensor.shape) > 1)
    pairs = (f"{count} in {dtype} as {format}" for (dtype, format), count in kinds.most_common())
    return f"Without --precision, matrices are stored as they come, or nearest to it: {', '.join(pairs)}."


def _open_adapters(options: BuildOptions, source: Source, made: Made) -> tuple[Adapter, ...]:
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
        _check_runtime(options, adapters, made)
    return adapters


def _check_runtime(options: BuildOptions, adapters: tuple[Adapter, ...], made: Made) -> None:
    if made.backend != ONNXRUNTIME:
        raise UsageError(
            "--adapter-mode runtime is for ONNX Runtime, while TensorRT's engines have their weights fixed: use "
            "--adapter-mode merge, or --backend onnxruntime."
        )
    if not options.adapters:
        raise UsageError("--adapter-mode runtime keeps adapters beside the weights; name them with --adapter.")
    for adapter in adapters:
        if adapter.whole:
            raise LlamaExportError(
                f"The adapter {adapter.name} brings {next(iter(adapter.whole))} along as a whole, which cannot be "
                "chosen at run time; use --adapter-mode merge."
            )
