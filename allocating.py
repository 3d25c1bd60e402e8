"""`--precision auto`: what each matrix may be stored as, what that is predicted to cost, and which is taken."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .build_options import BuildOptions
from .errors import LlamaExportError
from .export.calibration_text import calibration_text
from .export.config import transformers_config
from .export.families import ATTENTION, MLP
from .limits import AboveLimitError, Allocation, Limits, Part, told_size
from .names import BUILT_IN, GPTQ, ORT, RTN, SEARCH
from .optimize.allocation import Option, cheapest_within, smallest_within, total_bytes, total_cost
from .optimize.equivalence import Factors, factors_of
from .optimize.formats import EMBEDDING, FP16, HEAD, Format
from .optimize.overlay import ours, rounded_by
from .optimize.plan import head_of
from .optimize.quantise import dequantise, stored_values
from .optimize.tensors import Float32, SourceTensor
from .planning import BuildPlan, with_formats
from .progress import Progress
from .targets.context import CACHE_BYTES
from .targets.made import Made
from .targets.planner_weights import weights_of

if TYPE_CHECKING:
    from .export.sensitivity import Stored

SCHEMES_OF_AUTO = (
    *("int4-b128-zeros", "int4-b64-zeros", "int4-b32-zeros", "int4-b16-zeros"),
    *("int4-b128", "int4-b64", "int4-b32", "int4-b16", "int8-b128", "int8-b64", "int8-b32", "fp16"),
)
"""What a matrix may get, where the target runs it; 4 bits without zero points only where there are none with."""

TOKENS, LENGTH = 2048, 256
"""Of the text that sensitivity is measured on, and of a sequence at most."""

_COSTS = "costs"
VERSION = 2
"""Of what is kept for an interrupted build: changes with the numbers."""

KEPT = {RTN: {4: 1.0, 8: 1.0}, SEARCH: {4: 1.0, 8: 1.0}, GPTQ: {4: 0.5, 8: 0.8}}
"""By method and bits, what is left of the cost that is predicted: of rounding to nearest, or of the search, to which
GPTQ is compared.
"""

AIM = 0.9
"""Of --max-kl, what formats are chosen for at first: predictions are a little off, and another round takes time."""

ROUNDS = 3
"""How often formats are chosen for --max-kl at most."""

_MARGIN = 1.05
"""By which a round aims lower than what the one before was measured to need."""

_PAGE = 4096
_GRAPH = 40_000
_LAYER = 12_000
"""Bytes of model.onnx, at most: in all, and for each layer."""

Begin = Callable[[str, str], None]
"""Begins a stage: its name, and its title for people."""

_Made = TypeVar("_Made")

_GROUPS = (ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:])
"""Projections of one input are one product where their format is the same: q, k and v; gate and up."""


@dataclass(frozen=True)
class Sensitivities:
    """What each matrix costs in each format, `kl`, by rounding to nearest; tokens: that it was measured on."""

    kl: Mapping[str, Mapping[Format, float]]
    tokens: int


@dataclass(frozen=True)
class _Way:
    """How a group of matrices may be stored: a format for each."""

    formats: Mapping[str, Format]
    option: Option


def candidates_of(plan: BuildPlan, options: BuildOptions) -> dict[str, tuple[Format, ...]]:
    """By matrix, the formats that it may get: what the target runs, and its own where it comes quantised."""
    made, tensors = plan.made, plan.source.tensors
    words = _words(made)
    policy, head, tied = made.policy(), head_of(tensors), HEAD not in tensors
    found: dict[str, tuple[Format, ...]] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1:
            continue
        if name == head and options.head_precision is not None:
            found[name] = (plan.formats[name],)
            continue
        columns = tensor.shape[1]
        asked = [policy.precisions[word] for word in words]
        each = [
            policy.embedding(one, columns, tied=tied) if name == EMBEDDING else policy.projection(one, columns)
            for one in asked
        ]
        own = [policy.own(tensor.format, columns)] if tensor.blocks is not None else []
        found[name] = tuple(dict.fromkeys([*own, *each]))
    return found


def _words(made: Made) -> list[str]:
    runs = [word for word in SCHEMES_OF_AUTO if made.runs(word)]
    zeros = any(word.startswith("int4") and word.endswith("zeros") for word in runs)
    return [word for word in runs if not (zeros and word.startswith("int4") and not word.endswith("zeros"))]


@contextlib.contextmanager
def sensitivities(
    plan: BuildPlan, candidates: Mapping[str, Sequence[Format]], place: Path, progress: Progress
) -> Iterator[Sensitivities]:
    """Measure what each candidate costs, on the text of --calibrate or the built-in one.

    place: of the bundle. The numbers are kept beside it until the block ends well, for the next build where it does
    not; the user is told.
    """
    from .export.quantising.work import opened_work  # noqa: PLC0415

    sequences = _sequences(plan)
    tokens = sum(map(len, sequences))
    key = {
        "version": VERSION,
        "model_sha256": plan.sha256,
        "text": hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
        "context": plan.context.context,
        "scales": plan.made.activations,
        "nearest": plan.method == RTN,
        "scaling": not plan.beside,
        "candidates": {name: [(one.name, one.positive) for one in formats] for name, formats in candidates.items()},
    }
    path = place.parent / f".{place.name}.sensitivity"
    opened = False
    try:
        with opened_work(path, key) as work:
            opened = True
            if (kept := work.find(_COSTS)) is None:
                kl = _measured(plan, candidates, sequences, path, progress)
                work.save(_COSTS, {name: np.array(list(costs.values()), np.float32) for name, costs in kl.items()})
                kept = work.find(_COSTS)
            assert kept is not None
            kl = {
                name: dict(zip(formats, map(float, kept[name].array(0, len(formats))), strict=True))
                for name, formats in candidates.items()
            }
            yield Sensitivities(kl, tokens)
    except BaseException:
        if opened and path.exists():
            progress.warn(f"The measured sensitivity stays in {path}: the same build starts from it and removes it.")
        raise


def _sequences(plan: BuildPlan) -> list[list[int]]:
    """Evenly spread over the text."""
    text = plan.calibration or calibration_text(plan.source, BUILT_IN, plan.context.context)
    pieces = [
        list(sequence[start : start + LENGTH])
        for sequence in text.sequences
        for start in range(0, len(sequence), LENGTH)
        if start == 0 or start + LENGTH <= len(sequence)
    ]
    return pieces[:: max(1, len(pieces) // (TOKENS // LENGTH))][: TOKENS // LENGTH]


def _measured(
    plan: BuildPlan,
    candidates: Mapping[str, Sequence[Format]],
    sequences: Sequence[Sequence[int]],
    folder: Path,
    progress: Progress,
) -> Mapping[str, Mapping[Format, float]]:
    from .export.sensitivity import Sensitivity  # noqa: PLC0415 (torch takes seconds)

    source, context = plan.source, plan.context.context
    config, stored = (
        transformers_config(source.config),
        _nearest(plan) if plan.method == RTN else _found(plan, progress),
    )
    return Sensitivity(config, source.tensors, context, sequences, candidates, stored, progress).measure(folder)


def _nearest(plan: BuildPlan) -> Stored:
    return lambda tensor, format, start, stop, rows: stored_values(
        tensor, format, start, stop, plan.made.activations, rows
    )


def _found(plan: BuildPlan, progress: Progress) -> Stored:
    """As the search makes it of columns that are alike, seen from the columns as they were."""
    from .export.quantising.importance import known  # noqa: PLC0415 (torch takes seconds)
    from .export.quantising.solvers import searching  # noqa: PLC0415

    found = known(plan.source, plan.formats, plan.context.context, progress, scaling=not plan.beside)
    moved, rows_of, nearest = factors_of(found.scales), searching(found.importances).rows, _nearest(plan)

    def stored(tensor: SourceTensor, format: Format, start: int, stop: int, rows: Float32) -> Float32:
        columns = moved.get(tensor.name, Factors()).columns
        if not ours(tensor, format) or not np.isfinite(rows).all():
            return nearest(tensor, format, start, stop, rows)
        alike = rows if columns is None else rows * columns
        blocks = rounded_by(lambda asked: rows_of(tensor.name, alike, asked), format, plan.made.activations)
        values = dequantise(blocks, tensor.shape[1])
        return values if columns is None else values / columns

    return stored


@dataclass(frozen=True)
class Rounds:
    """Choosing formats for --max-kl anew where those that were chosen cost more than was predicted."""

    plan: BuildPlan
    options: BuildOptions
    limits: Limits
    found: Sensitivities
    progress: Progress

    def first_that_holds(self, make: Callable[[BuildPlan], _Made]) -> _Made:
        """What `make` makes of a plan with formats, the first time that it raises no AboveLimitError."""
        scale, times = 1.0, 1
        while True:
            plan = allocated(self.plan, self.options, self.limits, self.found, scale, times)
            assert plan.allocation is not None
            try:
                return make(plan)
            except AboveLimitError as error:
                if times == ROUNDS:
                    raise
                self.progress.warn(
                    f"{plan.allocation.checked(error.kl)} Formats are chosen again, by what was measured."
                )
                # Each time nearer: what was predicted for these formats would now be what they cost, and a little more.
                scale *= _MARGIN * error.kl / plan.allocation.kl
                times += 1


@contextlib.contextmanager
def chosen(
    plan: BuildPlan, options: BuildOptions, limits: Limits, place: Path, begin: Begin, progress: Progress
) -> Iterator[Rounds]:
    """Measure what formats cost, to choose some. place: of the bundle."""
    begin("sensitivity", "Predicting what formats of each matrix cost")
    with sensitivities(plan, candidates_of(plan, options), place, progress) as found:
        yield Rounds(plan, options, limits, found, progress)


def allocated(
    plan: BuildPlan, options: BuildOptions, limits: Limits, found: Sensitivities, scale: float = 1.0, times: int = 1
) -> BuildPlan:
    """The plan with the formats that are predicted to meet `limits` best. scale: what predictions are multiplied by,
    as earlier rounds measured them; times: which round this is, from 1.

    Raises LlamaExportError where no formats meet it, which tells the nearest that do.
    """
    kept = KEPT[plan.method or RTN]
    groups = [_ways(plan, names, found, kept, scale) for names in _groups(found.kl)]
    parts = [[way.option for way in ways] for ways in groups]
    fixed = _fixed_bytes(plan)
    if limits.budget is not None:
        chosen = cheapest_within(parts, limits.budget - fixed)
        if chosen is None:
            raise _too_small(plan, limits, parts, fixed)
    else:
        assert limits.max_kl is not None
        chosen = smallest_within(parts, AIM * limits.max_kl) or smallest_within(parts, limits.max_kl)
        if chosen is None:
            raise _too_strict(plan, limits, parts)
    taken = [ways[index] for ways, index in zip(groups, chosen, strict=True)]
    formats = {**plan.formats, **{name: format for way in taken for name, format in way.formats.items()}}
    allocation = Allocation(
        limits,
        tuple(
            Part(tuple(way.formats), _told(way.formats.values()), way.option.bytes, way.option.cost) for way in taken
        ),
        total_cost(parts, chosen),
        total_bytes(parts, chosen) + fixed,
        found.tokens,
        times,
    )
    source = plan.source.with_other(notes=(*plan.source.notes, allocation.note))
    return replace(with_formats(plan, options, formats), source=source, allocation=allocation)


def _told(formats: Iterable[Format]) -> str:
    return ", ".join(dict.fromkeys(format.name for format in formats))


def _groups(matrices: Mapping[str, object]) -> list[tuple[str, ...]]:
    """Matrices that are stored alike, in the order of the checkpoint."""
    together = {f"{name}.weight": names for names in _GROUPS for name in names}
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in matrices:
        layer, _, inner = _split(name)
        found.setdefault((layer, together.get(inner, (name,))), []).append(name)
    return [tuple(names) for names in found.values()]


def _split(name: str) -> tuple[str, str, str]:
    """ "model.layers.3", ".", "mlp.up_proj.weight"; the whole name last where it is in no layer."""
    if not name.startswith("model.layers."):
        return "", "", name
    number, _, inner = name.removeprefix("model.layers.").partition(".")
    return f"model.layers.{number}", ".", inner


def _ways(
    plan: BuildPlan, names: Sequence[str], found: Sensitivities, kept: Mapping[int, float], scale: float
) -> list[_Way]:
    """How a group may be stored: all in one format, or each in the one that keeps its own codes."""
    shared = [one for one in found.kl[names[0]] if all(one in found.kl[name] for name in names)]
    each = [dict.fromkeys(names, one) for one in shared]
    own = {name: next(iter(found.kl[name])) for name in names}
    if own not in each:
        each.append(own)

    def cost(name: str, format: Format) -> float:
        codes_of_ours = format.quantised and not plan.source.tensors[name].keeps_own(format)
        return found.kl[name][format] * (kept[format.bits] if codes_of_ours else 1.0) * scale

    return [
        _Way(formats, Option(_bytes(plan, formats), math.fsum(cost(*item) for item in formats.items())))
        for formats in each
    ]


def _bytes(plan: BuildPlan, formats: Mapping[str, Format]) -> int:
    """Of matrices that are stored together where they have one format, with what fills up their pages."""
    tensors, made = plan.source.tensors, plan.made
    beside = {HEAD: tensors[HEAD]} if HEAD in tensors and HEAD not in formats else {}
    tried = {name: tensors[name] for name in formats} | beside
    dense = dict.fromkeys(beside, FP16)
    number = CACHE_BYTES[made.activations]
    weights = weights_of(tried, {**formats, **dense}, made.dialect, made.opset, number)
    without = weights_of(beside, dense, made.dialect, made.opset, number).total if beside else 0
    twice = 2 if EMBEDDING in formats and made.dialect != ORT else 1
    return weights.total - without + twice * sum(_filling(plan, formats, format) for format in set(formats.values()))


def _filling(plan: BuildPlan, formats: Mapping[str, Format], format: Format) -> int:
    """What brings the regions of all matrices in `format` to whole pages."""
    shapes = [plan.source.tensors[name].shape for name, found in formats.items() if found == format]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    if not format.quantised:
        return -(rows * columns * format.bits // 8) % _PAGE
    scales = rows * format.blocks(columns) * (2 if format.half else CACHE_BYTES[plan.made.activations])
    sizes = [rows * format.padded(columns) * format.bits // 8, *[scales] * (1 + format.offsets)]
    return sum(-size % _PAGE for size in [*sizes, *[rows * format.zero_bytes(columns)] * format.zeros])


def _fixed_bytes(plan: BuildPlan) -> int:
    """Of the files that hold the model, all but its matrices, at most: vectors, tables by position, the graph."""
    shape, made = plan.source.shape, plan.made
    vectors = {name: tensor for name, tensor in plan.source.tensors.items() if len(tensor.shape) == 1}
    formats = {name: plan.formats[name] for name in vectors}
    stored = weights_of(vectors, formats, made.dialect, made.opset, CACHE_BYTES[made.activations]).total
    tables = plan.context.context * (4 * shape.head_dim + 8) + 3 * _PAGE
    return stored + (1 + 2 * shape.layers) * _PAGE + tables + _GRAPH + _LAYER * shape.layers


def _too_small(plan: BuildPlan, limits: Limits, parts: Sequence[Sequence[Option]], fixed: int) -> LlamaExportError:
    assert limits.budget is not None
    chosen = smallest_within(parts, math.inf)
    assert chosen is not None
    least = told_size(total_bytes(parts, chosen) + fixed)
    return LlamaExportError(
        f"No formats for {plan.target.name} bring {plan.source.model_id} down to {told_size(limits.budget)}: the "
        f"least is {least}, at a predicted KL divergence of {total_cost(parts, chosen):.2g}; ask for --budget {least}."
    )


def _too_strict(plan: BuildPlan, limits: Limits, parts: Sequence[Sequence[Option]]) -> LlamaExportError:
    least = math.fsum(min(option.cost for option in options) for options in parts)
    asked = f"{least * 1.2:.2g}"
    return LlamaExportError(
        f"No formats for {plan.target.name} keep {plan.source.model_id} within a KL divergence of {limits.max_kl:g}: "
        f"the least that is predicted is {least:.2g}; ask for --max-kl {asked} or more."
    )
