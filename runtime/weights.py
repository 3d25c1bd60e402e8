"""Are the stored weights the ones that PyTorch used? Dequantised on the device and compared by hash, tensor by tensor.

This decodes the data file from the format's definition and shares no code with what wrote it.
"""

from __future__ import annotations

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

from ..errors import LlamaExportError
from .arrays import Float32
from .bundle import DATA_FILE, GRAPH_FILE, Bundle
from .onnx_file import Initializer
from .reference import ORDER, WeightRecord, fingerprint
from .session import read_graph, weight_places

_BLOCK = 32
"""Columns of a block where a format's name does not say."""
_STEP_VALUES = 1 << 21
_DENSE = ("fp32", "fp16", "bf16", "order")
_INTEGERS = re.compile(r"int(?P<bits>4|8)(-b(?P<block>\d{1,4}))?(?P<zeros>-zeros)?(?P<offset>-offset)?")

Parts = Mapping[str, npt.NDArray[np.generic]]
Decoder = Callable[[Parts], Float32]


@dataclass(frozen=True)
class WeightDifference:
    """A stored tensor that is not what PyTorch used. norm: root of its sum of squares; expected_norm: what it should
    be.
    """

    name: str
    norm: float
    expected_norm: float


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
    """Rows without a record could hold anything. Places count, not names: a tied embedding and head are two names."""
    rows: Counter[int] = Counter()
    for record in records:
        for _, name in _by_rows(record):
            rows[_initializer(record, name, initializers).offset] += record.shape[0]
    for name, stored in initializers.items():
        if stored.shape[:1] != (rows[stored.offset],):
            raise LlamaExportError(
                f"The reference does not say what all of {name!r} should hold; build the bundle again."
            )


def _compare(record: WeightRecord, initializers: Mapping[str, Initializer], data: Path) -> WeightDifference | None:
    try:
        with FileIO(data) as file:  # of its own, as threads would move each other's place in it
            digest, norm = fingerprint(_rows(record, initializers, file))
    except (KeyError, ValueError, IndexError) as error:
        raise LlamaExportError(
            f"{GRAPH_FILE} does not store {record.name} as {record.format}, as the reference says; build the bundle "
            "again."
        ) from error
    return None if digest == record.sha256 else WeightDifference(record.name, norm, record.norm)


def _rows(record: WeightRecord, initializers: Mapping[str, Initializer], file: FileIO) -> Iterator[Float32]:
    """The record's tensor, dequantised, columns in their natural order, a few rows at a time: [n, columns]."""
    stored = {role: _initializer(record, name, initializers) for role, name in _by_rows(record)}
    rows, columns = record.shape[0], math.prod(record.shape[1:])
    decode, block = _decoder(record.format)
    order = _order(record, initializers, file)
    step = max(1, _STEP_VALUES // columns)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        parts = {role: _read(tensor, record.row + start, record.row + stop, file) for role, tensor in stored.items()}
        with np.errstate(over="ignore", invalid="ignore"):  # damage shows in the comparison
            values = decode(parts)
        if not 0 <= values.shape[1] - columns < block:
            raise ValueError(f"rows of {values.shape[1]} values")
        values = values[:, :columns]
        if order is not None:
            placed = np.zeros_like(values)
            placed[:, order] = values
            values = placed
        yield values


def _by_rows(record: WeightRecord) -> list[tuple[str, str]]:
    """Roles and names of the initializers that hold the record's rows."""
    return [(role, name) for role, name in record.initializers.items() if role != ORDER]


def _order(record: WeightRecord, initializers: Mapping[str, Initializer], file: FileIO) -> npt.NDArray[np.int64] | None:
    """Which column each stored column is; None where they stand in place."""
    if ORDER not in record.initializers:
        return None
    found = initializers.get(record.initializers[ORDER])
    columns = math.prod(record.shape[1:])
    if found is None or found.dtype != "int64" or tuple(found.shape) != (columns,):
        raise ValueError("its order is missing")
    order = np.frombuffer(_bytes_at(found.offset, found.size, file), "<i8")
    inside: npt.NDArray[np.int64] = np.clip(order, 0, columns - 1)  # damage shows in the comparison
    return inside


def _initializer(record: WeightRecord, name: str, initializers: Mapping[str, Initializer]) -> Initializer:
    found = initializers.get(name)
    if found is None or not found.shape or record.row < 0 or record.row + record.shape[0] > found.shape[0]:
        raise LlamaExportError(
            f"{GRAPH_FILE} has no {name!r} with the rows of {record.name}, as the reference says; build the bundle "
            "again."
        )
    return found


def _read(tensor: Initializer, start: int, stop: int, file: FileIO) -> npt.NDArray[np.generic]:
    """Rows [start, stop) of a stored tensor as [n, numbers in a row]."""
    row = tensor.size // tensor.shape[0]
    data = _bytes_at(tensor.offset + start * row, (stop - start) * row, file)
    if tensor.dtype == "bfloat16":
        widened = np.frombuffer(data, "<u2").astype("<u4") << 16
        return widened.view("<f4").reshape(stop - start, -1)
    return np.frombuffer(data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(stop - start, -1)


def _bytes_at(offset: int, size: int, file: FileIO) -> bytearray:
    """The `size` bytes from `offset` on: one read may give fewer."""
    data, done = bytearray(size), 0
    file.seek(offset)
    while done < size:
        count = file.readinto(memoryview(data)[done:])
        if not count:
            raise LlamaExportError(f"{DATA_FILE} became shorter while it was read; copy the bundle again.")
        done += count
    return data


def _decoder(format: str) -> tuple[Decoder, int]:
    """How parts become values, and the columns that rows are padded to a multiple of."""
    if format in _DENSE:
        return _dense, 1
    match = _INTEGERS.fullmatch(format)
    if match is None or int(match["block"] or _BLOCK) == 0:
        raise LlamaExportError(f"The reference names an unknown format {format!r}; upgrade llama-export.")
    integers = _Integers(int(match["bits"]), int(match["block"] or _BLOCK), bool(match["zeros"]), bool(match["offset"]))
    return integers.decode, integers.block


def _dense(parts: Parts) -> Float32:
    return parts["values"].astype(np.float32)


@dataclass(frozen=True)
class _Integers:
    """Codes of `bits` in blocks of `block` columns: scale * (code - zero) + offset."""

    bits: int
    block: int
    zeros: bool
    offset: bool

    def decode(self, parts: Parts) -> Float32:
        scales = parts["scales"].astype(np.float32)
        blocks = self._unpacked(parts["codes"]).astype(np.float32).reshape(len(scales), -1, self.block)
        middle = np.float32(2 ** (self.bits - 1))
        zeros = self._unpacked(parts["zeros"])[:, : scales.shape[1], None] if self.zeros else middle
        blocks = (blocks - zeros) * scales[..., None]
        if self.offset:
            blocks += parts["offsets"].astype(np.float32)[..., None]
        return blocks.reshape(len(scales), -1)

    def _unpacked(self, packed: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
        numbers = packed.astype(np.uint8)
        if self.bits == 8:
            return numbers
        return np.stack((numbers & 0x0F, numbers >> 4), axis=-1).reshape(len(numbers), -1)  # the even one is low
