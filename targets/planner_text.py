"""An assessment in words: a table of many targets, details of one, sentences for `build`, and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..errors import LlamaExportError
from ..names import PRODUCTS, TRT, TRT_PRIMITIVE
from ..tables import columns, size
from .context import STATIC_CONTEXT, ContextChoice, budget_text, choose_context
from .planner import DOES_NOT_FIT, FITS, USEFUL_CONTEXT, Assessment, Model, Speeds, Wish, assess
from .planner_engine import DESKTOP_BYTES
from .planner_speed import (
    BANDWIDTH_EFFICIENCY,
    DENSE_EFFICIENCY,
    LAYER_OVERHEAD_SECONDS,
    QUANTISED_EFFICIENCY,
    Range,
)

SCHEMA_VERSION = 1

HEADER = (
    *("TARGET", "BACKEND", "WEIGHTS", "", "CACHE", "TOTAL", "OF USABLE", "CONTEXT"),
    *("DECODE, TOKENS/S", "PREFILL, TOKENS/S", "VERDICT"),
)
UNKNOWN = "-"


def table_lines(found: Sequence[Assessment]) -> list[str]:
    """One line for each target, and what the columns mean."""
    return [
        *columns([HEADER, *map(_row, found)]),
        "",
        "CACHE and TOTAL are for CONTEXT: where none was asked for, what fits, at most 8,192 where the cache is fixed.",
        f"Speeds are predicted, not measured; {UNKNOWN} where bandwidth or peak is unknown, or the CPU computes.",
        "`-t NAME` shows how the figures of one target come about.",
    ]


def detail_lines(one: Assessment) -> list[str]:
    """All figures of one target."""
    shape, parameters = one.model.shape, _parameters(one.model)
    stored = ", ".join(f"{name} {size(count)}" for name, count in sorted(one.weights.stored.items()))
    rows = [
        ("model", f"{one.model.name}: {parameters / 1e9:.2f} billion parameters, {shape.layers} layers", ""),
        ("bundle", f"{one.made.dialect} for {PRODUCTS[one.made.backend]}, {one.made.activations} activations", ""),
        ("weights", f"{one.precision}: {size(one.weights.total)}", stored),
        ("  in memory", size(one.need.weights), "" if one.need.weights == one.weights.total else _repacked(one)),
        ("rotary tables", size(one.need.tables), ""),
        (
            "cache",
            size(one.need.cache),
            f"{one.context:,} tokens of {_texts(one.wish.batch)} in {one.load.cache_dtype}",
        ),
        ("activations", size(one.need.workspace), f"while {min(one.load.prefill_chunk, one.context)} tokens are read"),
        ("programs", size(one.need.runtime), ""),
        ("total", size(one.need.total), f"of {budget_text(one.target)}"),
        *_engine_rows(one),
        *(row for speeds in one.speeds for row in _speed_rows(speeds)),
    ]
    return [
        f"{one.target.name}: {sentence(one)}",
        "",
        *columns(rows, indent="  "),
        "",
        *(f"  {note}" for note in notes(one)),
    ]


def sentence(one: Assessment) -> str:
    """The verdict, with what would have to change."""
    if one.verdict == DOES_NOT_FIT:
        return refusal(one)
    known = one.model.shape.max_positions
    if one.verdict == FITS:
        whole = one.wish.context is not None or one.context == known
        return f"fits with {one.precision} and {_tokens(one, of_all=not whole)}."
    return f"fits with {reduction(one)}."


def reduction(one: Assessment) -> str:
    """What is smaller than was asked for: "int8 instead of fp16, since ...", or a context."""
    parts = []
    if one.precision != one.asked:
        parts.append(f"{one.precision} instead of {one.asked} weights")
    if one.wish.context is not None and one.wish.context > one.largest:
        parts.append(f"--context {one.largest} instead of {one.wish.context}")
    elif one.precision == one.asked:
        parts.append(f"{one.precision} and only {one.largest:,} tokens")
    return " and ".join(parts)


def refusal(one: Assessment) -> str:
    """Why a model cannot run there at all, and what would help."""
    least = f"{size(one.need.total)} with a context of {one.context} tokens, of them weights {size(one.need.weights)}"
    head = f"does not fit: {one.precision} takes {least}, which is above the {budget_text(one.target)}"
    if one.headless_context:
        return f"{head}; with its desktop closed (about {size(DESKTOP_BYTES)}) {one.headless_context:,} tokens fit."
    if one.devices > 1 and one.wish.precision is None:
        return (
            f"{head}; {one.devices} of it would hold it, but a model is not split over devices: take a larger target."
        )
    return f"{head}; choose a smaller --precision or a larger --target."


def context_choice(one: Assessment, *, force: bool = False) -> ContextChoice:
    """The context of a build, and why; force: also where nothing fits.

    Raises LlamaExportError when nothing fits and `force` is not given.
    """
    shape, requested = one.model.shape, one.wish.context
    if one.verdict != DOES_NOT_FIT:
        return choose_context(one.target, one.load, shape.max_positions, requested, shape.longest)
    if not force:
        raise LlamaExportError(f"{one.model.name} on {one.target.name} {refusal(one)} --force builds it anyway.")
    context, taken = requested or min(USEFUL_CONTEXT, shape.max_positions), size(one.need.total)
    why = "as asked for" if requested else "although it does not fit"
    return ContextChoice(
        context,
        f"Context {context:,} tokens, {why}.",
        f"The model takes {taken}, which is above the {budget_text(one.target)}: it may not load there.",
    )


def precision_note(one: Assessment) -> str | None:
    """For `build`: that another precision than the target's default was taken, in one sentence."""
    if one.precision == one.asked:
        return None
    wanted = f"{one.wish.context or min(USEFUL_CONTEXT, one.model.shape.max_positions):,}"
    return (
        f"The weights are {one.precision} rather than {one.asked}, {one.target.name}'s default, with which a context "
        f"of {wanted} tokens does not fit the {budget_text(one.target)}."
    )


def notes(one: Assessment) -> Iterator[str]:
    """What else to know, in whole sentences."""
    if one.made.on_cpu:
        yield "No speed is predicted for a CPU, where arithmetic decides as much as bandwidth: build, and measure it."
    elif one.speeds and one.speeds[0].decode is None:
        yield f"No speed is predicted, since the catalogue knows no bandwidth of {one.target.name}: name a device."
    elif one.speeds:
        yield from _speed_notes(one)
    if one.target.shared_memory and one.loading_bytes > one.usable_bytes and one.verdict != DOES_NOT_FIT:
        yield (
            "While the weights are loaded, their file passes the page cache of the same memory "
            f"({size(one.loading_bytes)} in all): the system drops it again, which makes loading slower."
        )
    if one.devices > 1 and one.verdict == DOES_NOT_FIT:
        yield f"{one.devices} devices of this size would hold it; a model is not split over devices."


def _speed_notes(one: Assessment) -> Iterator[str]:
    low, high = (f"{share:.0%}" for share in BANDWIDTH_EFFICIENCY)
    pauses = " to ".join(f"{seconds * 1e6:g}" for seconds in reversed(LAYER_OVERHEAD_SECONDS))
    read = one.weights.read
    yield (
        f"Decode: a token reads {size(read)} of weights and the cache, at {low} to {high} of the bandwidth, with "
        f"pauses of {pauses} µs a layer; this is what published speeds on Jetsons keep to."
    )
    if one.made.dialect == TRT:
        yield f"A token reads the whole cache, used or not: a smaller --context is quicker{_with_short_context(one)}."
    if one.made.dialect == TRT_PRIMITIVE:
        yield "A token reads the used part of the cache twice and writes it once, since past and new are joined."
    quantised = any(format.quantised for format in one.formats.values())
    least, most = (f"{share:.0%}" for share in (QUANTISED_EFFICIENCY if quantised else DENSE_EFFICIENCY))
    if one.speeds[0].prefill is not None:
        yield f"Prefill: products run at {least} to {most} of the dense FP16 peak; the upper end is an assumption."
    else:
        yield f"Prefill is not predicted, since the catalogue knows no peak of {one.target.name}."


def _with_short_context(one: Assessment) -> str:
    """How quick a fixed cache of a usual length would be."""
    if one.context <= STATIC_CONTEXT:
        return ""
    precision = one.wish.precision if one.model.native and one.wish.precision is None else one.precision
    short = assess(one.target, one.made, one.model, replace(one.wish, precision=precision, context=STATIC_CONTEXT))
    return f", {_range(short.speeds[0].decode)} tokens/s with {STATIC_CONTEXT:,} tokens"


def to_json(model: Model, origin: str, wish: Wish, found: Sequence[Assessment]) -> dict[str, Any]:
    """All figures of all targets; bytes, tokens, and tokens a second."""
    shape = model.shape
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": model.name,
            "config": origin,
            "parameters": _parameters(model),
            "layers": shape.layers,
            "max_positions": shape.max_positions,
        },
        "request": {"precision": wish.precision, "context": wish.context, "batch": wish.batch},
        "plans": [_plan(one) for one in found],
    }


def _plan(one: Assessment) -> dict[str, Any]:
    return {
        "target": one.target.name,
        "backend": one.made.backend,
        "dialect": one.made.dialect,
        "jetpack": one.target.jetpack,
        "verdict": one.verdict,
        "sentence": sentence(one),
        "precision": one.precision,
        "precision_asked": one.asked,
        "context": one.context,
        "largest_context": one.largest,
        "weights": {"bytes": one.weights.total, "by_format": dict(one.weights.stored), "read_bytes": one.weights.read},
        "memory": {**asdict(one.need), "total": one.need.total, "usable": one.usable_bytes},
        "devices_needed": one.devices,
        "engine": None if one.engine is None else asdict(one.engine),
        "speeds": [asdict(speeds) for speeds in one.speeds],
        "notes": list(notes(one)),
    }


def _row(one: Assessment) -> tuple[str, ...]:
    speeds = one.speeds[0] if one.speeds else None
    share = one.need.total / one.usable_bytes
    return (
        one.target.name,
        one.made.backend,
        one.precision,
        size(one.weights.total),
        size(one.need.cache),
        size(one.need.total),
        f"{min(share, 99):.0%}" if share < 100 else "over 9900%",
        f"{one.context:,}",
        _range(speeds.decode if speeds else None),
        _range(speeds.prefill if speeds else None),
        _verdict(one),
    )


def _verdict(one: Assessment) -> str:
    if one.verdict == DOES_NOT_FIT:
        if one.headless_context:
            return f"only with its desktop closed: {one.headless_context:,} tokens"
        return f"does not fit; {one.devices} would hold it" if one.devices > 1 else "does not fit"
    words = "fits" if one.verdict == FITS else f"fits with {reduction(one)}"
    if one.engine is not None and not one.engine.fits:
        words += ", but not the building of its engine" + (" beside the desktop" if one.engine.headless else "")
    return words


def _engine_rows(one: Assessment) -> list[tuple[str, str, str]]:
    engine = one.engine
    if engine is None:
        return []
    where = "on the device" if engine.on_device else "on the computer that builds the bundle"
    if engine.fits:
        advice = ""
    elif engine.headless:
        advice = ": close the desktop first"
    else:
        advice = ": more than it has; `engine --force` with swap may do, or take a larger module"
    return [("engine build", size(engine.peak_bytes), f"{where}, an estimate{advice}")]


def _speed_rows(speeds: Speeds) -> list[tuple[str, str, str]]:
    mode = " (Super mode)" if speeds.boosted else ""
    return [
        (f"decode{mode}", f"{_range(speeds.decode)} tokens/s", f"with {speeds.fill:,} tokens in the cache"),
        (f"prefill{mode}", f"{_range(speeds.prefill)} tokens/s", f"for {speeds.prompt:,} tokens"),
    ]


def _range(found: Range | None) -> str:
    if found is None:
        return UNKNOWN
    low, high = (f"{value:,.{0 if value >= 10 else 1}f}" for value in (found.low, found.high))
    return f"{low} to {high}"


def _repacked(one: Assessment) -> str:
    if one.load.on_cpu:
        return "repacked by ONNX Runtime's CPU kernels"
    return "with fp16 in the layouts of prompts and of single tokens" if one.engine else "with an adapter"


def _tokens(one: Assessment, *, of_all: bool) -> str:
    known = f" of the model's {one.model.shape.max_positions:,}" if of_all else ""
    return f"{one.context:,} tokens{known}"


def _texts(count: int) -> str:
    return "one text" if count == 1 else f"{count} texts"


def _parameters(model: Model) -> int:
    return sum(math.prod(tensor.shape) for tensor in model.tensors.values())
