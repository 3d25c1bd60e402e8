"""The stored weights, tensor by tensor; where the right values are known, down to the row and the block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
from .weights import Known

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

_FAR = 4
"""Times a tensor's usual error, beyond which a block is not what quantisation makes of it."""
_NEAR = 0.5
"""The largest usual error, in parts of the values, of a tensor that still says which of its blocks are wrong."""


@dataclass(frozen=True)
class _Right:
    """What a tensor should hold. rows: its values in rows [start, stop); exact: bit for bit, else before it was
    quantised.
    """

    rows: Callable[[int, int], Float32]
    exact: bool


def compare_stored(
    bundle: Bundle,
    index: Index,
    config: PreTrainedConfig,
    known: Known | None,
    progress: Progress,
    threads: int,
) -> list[Row]:
    """A row for each tensor that is not bit for bit as recorded, and each input that is not rounded so. known: the
    right values, or what they are near, where a checkpoint is at hand; those of the rotary tables follow from the
    config.
    """
    records = (*index.weights, *index.tables)
    differences = compare_weights(bundle, records, progress.advance, threads)
    stored = StoredTensors(bundle)
    return [
        *(_row(one, records, stored, _right(one.name, bundle, config, known)) for one in differences),
        *map(_input_row, compare_inputs(read_graph(bundle), index)),
    ]


def _right(name: str, bundle: Bundle, config: PreTrainedConfig, known: Known | None) -> _Right | None:
    if name in ROTARY_TABLES:
        table = rotary_tables(config, bundle.manifest.limits.context)[ROTARY_TABLES.index(name)]
        return _Right(lambda start, stop: table[start:stop], exact=True)
    if known is None or name not in known.tensors:
        return None
    return _Right(lambda start, stop: known.rows(name, start, stop), known.exact)


def _row(
    difference: WeightDifference, records: Sequence[WeightRecord], stored: StoredTensors, right: _Right | None
) -> Row:
    record = next(one for one in records if one.name == difference.name)
    layer, place = _place(difference.name)
    initializers = ", ".join(dict.fromkeys(record.initializers.values()))
    hint = f"norm {difference.norm:.6g} instead of {difference.expected_norm:.6g}"
    if right is not None:
        found = (_located if right.exact else _astray)(record, stored.rows(record), right)
        hint = "; ".join(filter(None, (hint, found)))
    return Row(WEIGHTS_PASS, layer, place, f"initializer {initializers}", STORED, 1.0, 0.0, hint)


def _input_row(difference: InputDifference) -> Row:
    layer, place = _place(difference.name)
    return Row(WEIGHTS_PASS, layer, place, "rounding of activations", STORED, 1.0, 0.0, difference.problem)


def _place(name: str) -> tuple[int | None, str]:
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def _located(record: WeightRecord, parts: Iterator[Float32], right: _Right) -> str:
    """Which rows and blocks are wrong, and whether a factor explains them."""
    start, wrong, first = 0, 0, ""
    for part in parts:
        want = right.rows(start, start + len(part)).reshape(part.shape)
        differs = part.view(np.uint32) != np.ascontiguousarray(want).astype(np.float32).view(np.uint32)
        lines = np.flatnonzero(differs.any(axis=1))
        if len(lines) and not first:
            line = int(lines[0])
            first = f"first in row {start + line}{_block(record, part[line], want[line], differs[line])}"
        wrong, start = wrong + len(lines), start + len(part)
    return f"{wrong} of {start} rows, {first}" if wrong else ""


def _block(record: WeightRecord, got: Float32, want: Float32, differs: np.ndarray) -> str:
    columns, block = np.flatnonzero(differs), _block_of(record)
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
        return f"{where}, all by a factor of {factors[0]:.3g}: its scale"
    return where


def _astray(record: WeightRecord, parts: Iterator[Float32], right: _Right) -> str:
    """Which rows and blocks are much farther from the values that were quantised than the rest of the tensor is."""
    start, factors, errors = 0, list[Float32](), list[Float32]()
    for part in parts:
        want = right.rows(start, start + len(part)).reshape(part.shape)
        factor, error = _fits(part, want, _block_of(record) or part.shape[1])
        factors.append(factor)
        errors.append(error)
        start += len(part)
    factor, error = np.concatenate(factors), np.concatenate(errors)
    usual = float(np.median(error))
    if not usual < _NEAR:
        return "all of it is far from the checkpoint's, as it also is where channel scales were moved"
    rows, blocks = np.nonzero(~(error <= _FAR * usual))
    if not len(rows):
        return ""
    told = f"{len(np.unique(rows))} of {len(error)} rows are far from the checkpoint's, first row {rows[0]}"
    block = _block_of(record)
    if not block:
        return told
    told += f", block {blocks[0]} (columns {blocks[0] * block} to {(blocks[0] + 1) * block - 1})"
    found, spread = factor[rows[0], blocks[0]], 2 * usual
    if abs(found - 1) > spread and error[rows[0], blocks[0]] <= abs(found - 1) + spread:
        return f"{told}, all by a factor of {found:.2g}: its scale"
    return told


def _fits(got: Float32, want: Float32, block: int) -> tuple[Float32, Float32]:
    """Of each block, [rows, blocks]: the factor that makes `want` most like `got`, and their relative difference."""
    more = -got.shape[1] % block
    cut = [np.pad(part, ((0, 0), (0, more))).reshape(len(part), -1, block) for part in (got, want)]
    with np.errstate(all="ignore"):
        size = np.square(cut[1]).sum(-1)
        factor = (cut[0] * cut[1]).sum(-1) / size
        error = np.sqrt(np.square(cut[0] - cut[1]).sum(-1) / size)
    given = size > 0
    return np.where(given, factor, 1), np.where(given, error, 0)


def _block_of(record: WeightRecord) -> int:
    """Columns of a block; 0 where the format has none."""
    format = format_named(record.format)
    return format.block if format is not None and format.block else 0
