"""Whether a model fits a target, with which precision and context, and how fast it will be: from its shape alone.

`build` asks before it makes anything, `plan` shows the answer. Nothing here reads a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..errors import UsageError
from ..names import ONNXRUNTIME, TRT, TRT_PRIMITIVE
from ..optimize.formats import Format
from ..optimize.plan import plan_formats
from ..optimize.tensors import SourceTensor
from .context import CACHE_BYTES, STEP, Load, Need, Shape, bytes_per_token, largest_context, need, usual_context
from .devices import GB, Target
from .made import Made, cache_dtype, check_precision
from .planner_engine import DESKTOP_BYTES, EngineBuild, engine_build
from .planner_speed import USUAL_FILL, Range, Step, bandwidth, dense_tflops, step_rate
from .planner_weights import Weights, weights_of
from .tensorrt import needs_calibration

USEFUL_CONTEXT = 2048
"""Tokens that must fit for a default precision to be kept."""

SMALLER = ("fp32", "fp16", "int8", "int4")
"""Precisions that a build may choose by itself, from the largest to the smallest."""

ENGINE_DENSE_EXTRA, _SECOND_LAYOUT = 0.55, "second layout"
"""Of an engine, bytes more for a byte of fp16 matrices: prompts and single tokens want some of them in layouts of their
own (measured of TensorRT-RTX 1.7.1: 427 MB for 270, 3,758 for 2,472). Blocks are there once.
"""

FITS, FITS_WITH, DOES_NOT_FIT = "fits", "fits-with", "does-not-fit"


class ModelShape(Shape, Protocol):
    """What of a model's shape the planner needs."""

    @property
    def max_positions(self) -> int: ...
    @property
    def longest(self) -> int: ...


@dataclass(frozen=True)
class Model:
    """What is to be planned. tensors: by name, of which shapes and formats count; native: what quantised the checkpoint
    ("gguf"), whose formats are kept by default, or None.
    """

    name: str
    shape: ModelShape
    tensors: Mapping[str, SourceTensor]
    native: str | None = None


@dataclass(frozen=True)
class Wish:
    """What was asked for; None leaves the choice to model and target. beside: bytes of an adapter that is loaded with
    the weights. cache: the precision of the cache. formats: of every tensor, where they are chosen already.
    """

    precision: str | None = None
    head_precision: str | None = None
    context: int | None = None
    batch: int = 1
    calibrated: bool = False
    beside: int = 0
    cache: str | None = None
    formats: Mapping[str, Format] | None = None


@dataclass(frozen=True)
class Speeds:
    """Predicted tokens a second, of all texts together; None where nothing can be said.

    fill: tokens in each cache while writing; prompt: tokens read at once; boosted: in the device's Super mode.
    """

    decode: Range | None
    prefill: Range | None
    fill: int
    prompt: int
    boosted: bool = False


@dataclass(frozen=True)
class Assessment:
    """What a build for a target would be.

    verdict: FITS as asked for, FITS_WITH a smaller precision or context, DOES_NOT_FIT.
    asked, precision: of the weights, before and after the choice; formats: of every tensor.
    context: the tokens that the numbers are for; largest: most that fit, 0 for none.
    devices: how many of the target would hold what one cannot.
    """

    target: Target
    made: Made
    model: Model
    wish: Wish
    verdict: str
    asked: str
    precision: str
    formats: Mapping[str, Format]
    weights: Weights
    load: Load
    context: int
    largest: int
    need: Need
    devices: int
    engine: EngineBuild | None
    speeds: tuple[Speeds, ...]

    @property
    def usable_bytes(self) -> int:
        return int(self.target.usable_gb * GB)

    @property
    def headless_context(self) -> int:
        """Most tokens that fit a Jetson whose desktop is closed, where they do not beside it; else 0."""
        if self.largest or self.target.kind != "jetson":
            return 0
        return largest_context(self.usable_bytes + DESKTOP_BYTES, self.load, self.model.shape.max_positions)

    @property
    def loading_bytes(self) -> int:
        """Bytes while weights are loaded where CPU and GPU share memory: their file passes the page cache."""
        return self.need.total + (self.weights.total if self.target.shared_memory else 0)


@dataclass(frozen=True)
class _Candidate:
    """The model in one precision; None keeps the checkpoint's own."""

    precision: str | None
    formats: Mapping[str, Format]
    weights: Weights
    load: Load
    largest: int


def assess(target: Target, made: Made, model: Model, wish: Wish) -> Assessment:
    """Decide precision and context of `model` on `target`, whose bundle is `made`, and count what they take.

    Without a precision of the user's the target's default is taken, or the next smaller that the target runs when that
    leaves no useful context; a checkpoint that comes quantised keeps its own. Raises UsageError for a precision that
    the target lacks and a context beyond the model.
    """
    _check(target, made, model, wish)
    own = wish.precision is None and model.native is not None
    asked = None if own else wish.precision or target.default_precision
    candidates = [_candidate(target, made, model, wish, name) for name in _choices(target, made, wish, asked)]
    wanted = wish.context or min(USEFUL_CONTEXT, model.shape.max_positions)
    best = max(candidates, key=lambda one: one.largest)
    chosen = next((one for one in candidates if one.largest >= wanted), best if best.largest else candidates[-1])
    context = _context(chosen, wish.context, model.shape.max_positions)
    verdict = _verdict(chosen, wanted, as_asked=chosen.precision == asked)
    taken = need(chosen.load, context)
    names = (asked or str(model.native), chosen.precision or str(model.native))
    return Assessment(
        target=target,
        made=made,
        model=model,
        wish=wish,
        verdict=verdict,
        asked=names[0],
        precision=names[1],
        formats=chosen.formats,
        weights=chosen.weights,
        load=chosen.load,
        context=context,
        largest=chosen.largest,
        need=taken,
        devices=math.ceil(taken.total / (target.usable_gb * GB)),
        engine=engine_build(target, made, chosen.weights.total),
        speeds=_speeds(target, made, model, wish, chosen, context) if chosen.largest else (),
    )


def _context(chosen: _Candidate, requested: int | None, max_positions: int) -> int:
    """The tokens that the numbers are for: as asked for where they fit, else what fits, or the least there is."""
    if not chosen.largest:
        return min(STEP, max_positions)
    return usual_context(chosen.load, chosen.largest) if requested is None else min(requested, chosen.largest)


def _verdict(chosen: _Candidate, wanted: int, *, as_asked: bool) -> str:
    if not chosen.largest:
        return DOES_NOT_FIT
    return FITS if chosen.largest >= wanted and as_asked else FITS_WITH


def _check(target: Target, made: Made, model: Model, wish: Wish) -> None:
    if wish.precision is not None:
        check_precision(target, made, wish.precision, wish.calibrated)
    if wish.head_precision is not None:
        check_precision(target, made, wish.head_precision, wish.calibrated)
    if wish.context is not None and wish.context > model.shape.longest:
        longest = model.shape.longest
        raise UsageError(
            f"--context {wish.context} is above the {longest:,} tokens that the model knows or stretches to: "
            f"give {longest} or less."
        )


def _choices(target: Target, made: Made, wish: Wish, asked: str | None) -> list[str | None]:
    """The precisions that may be taken, in the order of preference."""
    if asked is None or wish.precision is not None or asked not in SMALLER:
        return [asked]
    smaller = [one for one in SMALLER[SMALLER.index(asked) + 1 :] if one in made.precisions]
    return [asked, *(one for one in smaller if not needs_calibration(target, one))]


def _candidate(target: Target, made: Made, model: Model, wish: Wish, precision: str | None) -> _Candidate:
    formats = wish.formats or plan_formats(model.tensors, precision, wish.head_precision, made.policy())
    number = CACHE_BYTES[made.activations]
    weights = weights_of(model.tensors, formats, made.dialect, made.opset, number)
    loaded = dict(weights.stored)
    if made.backend != ONNXRUNTIME:
        loaded[_SECOND_LAYOUT] = int(ENGINE_DENSE_EXTRA * weights.dense)
    if wish.beside:
        dense = "fp32" if number == 4 else "fp16"
        loaded[dense] = loaded.get(dense, 0) + wish.beside
    load = Load(
        model.shape,
        loaded,
        cache_dtype(target, made, wish.cache),
        made.on_cpu,
        wish.batch,
        dialect=made.dialect,
        shared_memory=target.shared_memory and not made.on_cpu,
    )
    most = max(model.shape.max_positions, wish.context or 0)
    return _Candidate(precision, formats, weights, load, largest_context(int(target.usable_gb * GB), load, most))


def _speeds(
    target: Target, made: Made, model: Model, wish: Wish, chosen: _Candidate, context: int
) -> tuple[Speeds, ...]:
    """One prediction for each mode of the device; none where the CPU computes, whose arithmetic decides."""
    if made.on_cpu:
        return ()
    shape, weights = model.shape, chosen.weights
    fill, prompt = min(USUAL_FILL, context), min(chosen.load.prefill_chunk, context)
    row = bytes_per_token(shape, chosen.load.cache_dtype)
    # A fixed cache is read whole under its mask; joining past and new reads, writes and reads what is there.
    moved = {TRT: context, TRT_PRIMITIVE: 3 * fill}.get(made.dialect, fill)
    quantised = any(format.quantised for format in chosen.formats.values())
    products, head = weights.multiplied, shape.vocab * shape.hidden
    decode = Step(
        weights.read, wish.batch * moved * row, wish.batch * products, shape.layers, quantised, tokens=wish.batch
    )
    read = (products - head) * prompt + head
    prefill = Step(weights.read, prompt * row, read, shape.layers, quantised, tokens=prompt)

    def mode(*, boosted: bool) -> Speeds:
        gbs, tflops = bandwidth(target, boosted=boosted), dense_tflops(target, boosted=boosted)
        reading = step_rate(prefill, gbs, tflops) if tflops else None
        return Speeds(step_rate(decode, gbs, tflops), reading, fill, prompt, boosted)

    modes = (False, True) if target.boost_bandwidth_gbs else (False,)
    return tuple(mode(boosted=boosted) for boosted in modes)
