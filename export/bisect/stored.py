"""The stored weights, tensor by tensor; where the right values are known, down to the row and the block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedConfig

from ...optimize.formats import format_named
from ...optimize.graph import ROTARY_TABLES
from ...optimize.tensors import Float32
from ...progress import Progress
from ...runtime.bundle import Bundle
from ...runtime.proof.input_scales import InputDifference, compare_inputs
from ...runtime.proof.reference import Index, WeightRecord
from ...runtime.proof.weights import StoredTensors, WeightDifference, compare_weights
from ...runtime.session import read_graph
from ..rotary import rotary_tables
from .finding import STORED, WEIGHTS_PASS, Row
from .weights import SourceWeights

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

Rows = Callable[[int, int], Float32]
"""The right values of a tensor's rows [start, stop)."""


def compare_stored(
    bundle: Bundle,
    index: Index,
    config: PreTrainedConfig,
    known: SourceWeights | None,
    progress: Progress,
    threads: int,
) -> list[Row]:
    """A row for each tensor that is not bit for bit as recorded, and each input that is not rounded so. known: the
    right values, where a checkpoint is at hand; those of the rotary tables follow from the config.
    """
    records = (*index.weights, *index.tables)
    differences = compare_weights(bundle, records, progress.advance, threads)
    stored = StoredTensors(bundle)
    return [
        *(_row(one, records, stored, _right(one.name, bundle, config, known)) for one in differences),
        *map(_input_row, compare_inputs(read_graph(bundle), index)),
    ]


def _right(name: str, bundle: Bundle, config: PreTrainedConfig, known: SourceWeights | None) -> Rows | None:
    if name in ROTARY_TABLES:
        table = rotary_tables(config, bundle.manifest.limits.context)[ROTARY_TABLES.index(name)]
        return lambda start, stop: table[start:stop]
    if known is None or name not in known.tensors:
        return None
    return lambda start, stop: known.rows(name, start, stop)


def _row(
    difference: WeightDifference, records: Sequence[WeightRecord], stored: StoredTensors, right: Rows | None
) -> Row:
    record = next(one for one in records if one.name == difference.name)
    layer, place = _place(difference.name)
    initializers = ", ".join(dict.fromkeys(record.initializers.values()))
    hint = f"norm {difference.norm:.6g} instead of {difference.expected_norm:.6g}"
    if right is not None:
        hint = "; ".join(filter(None, (hint, _located(record, stored.rows(record), right))))
    return Row(WEIGHTS_PASS, layer, place, f"initializer {initializers}", STORED, 1.0, 0.0, hint)


def _input_row(difference: InputDifference) -> Row:
    layer, place = _place(difference.name)
    return Row(WEIGHTS_PASS, layer, place, "rounding of activations", STORED, 1.0, 0.0, difference.problem)


def _place(name: str) -> tuple[int | None, str]:
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def _located(record: WeightRecord, parts: Iterator[Float32], right: Rows) -> str:
    """Which rows and blocks are wrong, and whether a factor explains them."""
    start, wrong, first = 0, 0, ""
    for part in parts:
        want = right(start, start + len(part)).reshape(part.shape)
        differs = part.view(np.uint32) != np.ascontiguousarray(want).astype(np.float32).view(np.uint32)
        lines = np.flatnonzero(differs.any(axis=1))
        if len(lines) and not first:
            line = int(lines[0])
            first = f"first in row {start + line}{_block(record, part[line], want[line], differs[line])}"
        wrong, start = wrong + len(lines), start + len(part)
    return f"{wrong} of {start} rows, {first}" if wrong else ""


def _block(record: WeightRecord, got: Float32, want: Float32, differs: np.ndarray) -> str:
    columns = np.flatnonzero(differs)
    format = format_named(record.format)
    block = format.block if format is not None and format.block else 0
    where = f", {len(columns)} values from column {columns[0]} on"
    if not block:
        return where
    number = int(columns[0]) // block
    inside = slice(number * block, (number + 1) * block)
    where = f", block {number} (columns {inside.start} to {inside.stop - 1})"
    given = want[inside] != 0
    with np.errstate(all="ignore"):
        factors = got[inside][given] / want[inside][given]
    if (
        len(factors) > 1
        and np.isfinite(factors).all()
        and np.ptp(factors) <= 1e-3 * abs(factors[0])
        and factors[0] != 1
    ):
        return f"{where}, all by a factor of {factors[0]:.4g}: its scale"
    return where
