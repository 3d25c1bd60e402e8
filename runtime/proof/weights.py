"""Are the stored weights the ones that PyTorch used? Dequantised on the device and compared by hash, tensor by tensor.

This decodes the data file from the format's definition and shares no code with what wrote it.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import LlamaExportError
from ..arrays import Float32
from ..bundle import DATA_FILE, GRAPH_FILE, Bundle
from ..onnx_file import BITS, Initializer
from ..session import read_graph, weight_places
from .reference import GLOBAL, INDEX, ORDER, WeightRecord, fingerprint
from .stored_numbers import Numbers, Place, bytes_at

_BLOCK = 32
"""Columns of a block where a format's name does not say."""
_STEP_VALUES = 1 << 21
_PANEL = 1 << 24
"""Numbers of a transposed matrix that are read together, as each of its lines holds only a few of them."""
_DENSE = ("fp32", "fp16", "bf16", ORDER, INDEX)
_INTEGERS = re.compile(r"int(?P<bits>4|8)(-b(?P<block>\d{1,4}))?(?P<zeros>-zeros)?(?P<offset>-offset)?(-f16)?")
"""Scales say their own type, whether or not the name does (-f16)."""

Parts = Mapping[str, Numbers]
Decoder = Callable[[Parts], Float32]


@dataclass(frozen=True)
class WeightDifference:
    """A stored tensor that is not what PyTorch used. norm: root of its sum of squares; expected_norm: what it should
    be.
    """

    name: str
    norm: float
    expected_norm: float

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.name}: the root of the sum of squares is {self.norm:.6g}, PyTorch's is {self.expected_norm:.6g}"


def compare_weights(
    bundle: Bundle, records: tuple[WeightRecord, ...], advance: Callable[[int, int], None], threads: int
) -> list[WeightDifference]:
    """The tensors of the bundle whose dequantised values differ from the recorded ones in any bit.

    advance: told values done and values in all. Raises LlamaExportError when the records do not fit the bundle's files,
    or leave a row of them out.
    """
    data, initializers = bundle.path / DATA_FILE, weight_places(bundle, read_graph(bundle))
    _refuse_unrecorded(records, initializers)
    total, done = sum(math.prod(record.shape) for record in records), 0
    differences = []
    with ThreadPoolExecutor(threads) as pool:
        compared = pool.map(lambda record: _compare(record, initializers, data), records)
        for record, difference in zip(records, compared, strict=True):
            done += math.prod(record.shape)
            advance(done, total)
            if difference is not None:
                differences.append(difference)
    return differences


class StoredTensors:
    """The tensors of a bundle, dequantised as its data file holds them."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises LlamaExportError as `weight_places` does."""
        self._data, self._initializers = bundle.path / DATA_FILE, weight_places(bundle, read_graph(bundle))

    def rows(self, record: WeightRecord, start: int = 0, stop: int | None = None) -> Iterator[Float32]:
        """Its rows [start, stop), by default all, a few at a time: [n, columns], columns in their natural order; a
        vector as one column.

        Raises LlamaExportError when the bundle does not store the tensor as the record says.
        """
        with _readable(record), FileIO(self._data) as file:  # of its own, as threads would move each other's place
            yield from _rows(record, self._initializers, file, start, stop)


def compare_matrices(
    matrices: Mapping[str, npt.NDArray[Any]], records: tuple[WeightRecord, ...]
) -> list[WeightDifference]:
    """The matrices of an adapter that differ from the recorded ones in any bit, or are not recorded; those of rank 0
    hold nothing.
    """
    recorded, differences = {record.name: record for record in records}, []
    for name in sorted(recorded.keys() | {name for name, matrix in matrices.items() if matrix.size}):
        record, matrix = recorded.get(name), matrices.get(name)
        digest, norm = fingerprint(iter([matrix.astype(np.float32)])) if matrix is not None else ("", 0.0)
        if record is None or digest != record.sha256:
            differences.append(WeightDifference(name, norm, record.norm if record is not None else 0.0))
    return differences


def _refuse_unrecorded(records: tuple[WeightRecord, ...], initializers: Mapping[str, Initializer]) -> None:
    """Rows without a record could hold anything. Offsets count, not names: a tied embedding and head are two names."""
    recorded: Counter[int] = Counter()
    transposed, halves, single = set[int](), set[int](), set[int]()
    for record in records:
        places = list(_places(record, initializers).values())
        offsets = [place.initializer.offset for place in places]
        recorded.update(dict.fromkeys(offsets, record.shape[0]))
        if record.transposed:
            transposed.update(offsets)
            if any(BITS[place.initializer.dtype] < 8 for place in places):
                halves.update(offsets)
        if GLOBAL in record.initializers:
            single.add(_named(record, record.initializers[GLOBAL], initializers).offset)
    for name, stored in initializers.items():
        rows = recorded[stored.offset]
        padded = rows + rows % 2 if stored.offset in halves else rows  # to whole bytes, and cut off after use
        found = Place(stored, stored.offset in transposed).rows
        if stored.offset not in single and (not found or found not in (rows, padded)):
            raise LlamaExportError(
                f"The reference does not say what all of {name!r} should hold; build the bundle again."
            )


def _compare(record: WeightRecord, initializers: Mapping[str, Initializer], data: Path) -> WeightDifference | None:
    with _readable(record), FileIO(data) as file:  # of its own, as threads would move each other's place in it
        digest, norm = fingerprint(_rows(record, initializers, file))
    return None if digest == record.sha256 else WeightDifference(record.name, norm, record.norm)


@contextlib.contextmanager
def _readable(record: WeightRecord) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, IndexError) as error:
        raise LlamaExportError(
            f"{GRAPH_FILE} does not store {record.name} as {record.format}, as the reference says; build the bundle "
            "again."
        ) from error


def _rows(
    record: WeightRecord,
    initializers: Mapping[str, Initializer],
    file: FileIO,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[Float32]:
    """The record's tensor, dequantised, columns in their natural order, a few rows at a time: [n, columns]."""
    places, columns = _places(record, initializers), math.prod(record.shape[1:])
    decode, block = _decoder(record.format)
    order, scale = _order(record, initializers, file), _global(record, initializers, file)
    step = max(1, _STEP_VALUES // columns)
    together = max(step, _PANEL // columns // 64 * 64) if record.transposed else step
    end = record.shape[0] if end is None else end
    for first in range(begin, end, together):
        last = min(end, first + together)
        panel = {role: place.read(record.row + first, record.row + last, file) for role, place in places.items()}
        for start in range(0, last - first, step):
            parts = {role: numbers[start : start + step] for role, numbers in panel.items()}
            with np.errstate(over="ignore", invalid="ignore"):  # damage shows in the comparison
                values = decode({**parts, **scale})
            if not 0 <= values.shape[1] - columns < block:
                raise ValueError(f"rows of {values.shape[1]} values")
            values = values[:, :columns]
            if order is not None:
                placed = np.zeros_like(values)
                placed[:, order] = values
                values = placed
            yield values


def _places(record: WeightRecord, initializers: Mapping[str, Initializer]) -> dict[str, Place]:
    """Where the record's rows lie, by role."""
    found = {}
    for role, name in record.initializers.items():
        if role not in (ORDER, GLOBAL):
            found[role] = Place(_named(record, name, initializers), record.transposed)
            if record.row < 0 or record.row + record.shape[0] > found[role].rows:
                raise _not_as_recorded(record, name)
    return found


def _named(record: WeightRecord, name: str, initializers: Mapping[str, Initializer]) -> Initializer:
    if name not in initializers:
        raise _not_as_recorded(record, name)
    return initializers[name]


def _not_as_recorded(record: WeightRecord, name: str) -> LlamaExportError:
    return LlamaExportError(
        f"{GRAPH_FILE} has no {name!r} with the rows of {record.name}, as the reference says; build the bundle again."
    )


def _global(record: WeightRecord, initializers: Mapping[str, Initializer], file: FileIO) -> dict[str, Numbers]:
    """The one number that scales the whole tensor, where it has one."""
    if GLOBAL not in record.initializers:
        return {}
    found = _named(record, record.initializers[GLOBAL], initializers)
    if found.dtype != "float32" or found.size != 4:
        raise ValueError("its scale is no number")
    return {GLOBAL: np.frombuffer(bytes_at(found.offset, found.size, file), "<f4")}


def _order(record: WeightRecord, initializers: Mapping[str, Initializer], file: FileIO) -> npt.NDArray[np.int64] | None:
    """Which column each stored column is; None where they stand in place."""
    if ORDER not in record.initializers:
        return None
    found = initializers.get(record.initializers[ORDER])
    columns = math.prod(record.shape[1:])
    if found is None or found.dtype != "int64" or tuple(found.shape) != (columns,):
        raise ValueError("its order is missing")
    order = np.frombuffer(bytes_at(found.offset, found.size, file), "<i8")
    inside: npt.NDArray[np.int64] = np.clip(order, 0, columns - 1)  # damage shows in the comparison
    return inside


def _decoder(format: str) -> tuple[Decoder, int]:
    """How parts become values, and the columns that rows are padded to a multiple of."""
    if format in _DENSE:
        return _dense, 1
    if format in _SCALED:
        return _SCALED[format].decode, max(1, _SCALED[format].block)
    match = _INTEGERS.fullmatch(format)
    if match is None or int(match["block"] or _BLOCK) == 0:
        raise LlamaExportError(f"The reference names an unknown format {format!r}; upgrade llama-export.")
    scaled = _Scaled(int(match["bits"]), int(match["block"] or _BLOCK), bool(match["zeros"]), bool(match["offset"]))
    return scaled.decode, scaled.block


def _dense(parts: Parts) -> Float32:
    return parts["values"].astype(np.float32)


@dataclass(frozen=True)
class _Scaled:
    """Codes in blocks of `block` columns, 0 for whole rows: scale * (code - zero) + offset; codes that are signed or
    are numbers themselves have no zero. Unsigned ones of 4 `bits` come two in a byte.
    """

    bits: int
    block: int = 0
    zeros: bool = False
    offset: bool = False

    def decode(self, parts: Parts) -> Float32:
        scales = parts["scales"].astype(np.float32)
        if GLOBAL in parts:
            scales *= parts[GLOBAL].astype(np.float32)
        codes = parts["codes"]
        numbers = self._unpacked(codes) if codes.dtype == np.uint8 else codes
        blocks = numbers.astype(np.float32).reshape(len(scales), -1, self.block or numbers.shape[1])
        if codes.dtype == np.uint8:
            middle = np.float32(2 ** (self.bits - 1))
            blocks -= self._unpacked(parts["zeros"])[:, : scales.shape[1], None] if self.zeros else middle
        blocks *= scales[..., None]
        if self.offset:
            blocks += parts["offsets"].astype(np.float32)[..., None]
        return blocks.reshape(len(scales), -1)

    def _unpacked(self, packed: Numbers) -> npt.NDArray[np.uint8]:
        numbers = packed.astype(np.uint8, copy=False)
        if self.bits == 8:
            return numbers
        return np.stack((numbers & 0x0F, numbers >> 4), axis=-1).reshape(len(numbers), -1)  # the even one is low


_SCALED = {"int8-row": _Scaled(8), "fp8": _Scaled(8), "nvfp4": _Scaled(4, 16)}
"""Formats whose names are not made of their properties."""
