"""Are the stored weights the ones that PyTorch used? Dequantised on the device and compared by hash, tensor by tensor.

This decodes the data file from the format's definition and shares no code with what wrote it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import LlamaExportError
from .arrays import Float32
from .bundle import DATA_FILE, GRAPH_FILE, Bundle
from .onnx_file import Initializer
from .reference import WeightRecord, fingerprint
from .session import read_graph, weight_places

_BLOCK = 32
_STEP_VALUES = 1 << 21


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


def _refuse_unrecorded(records: tuple[WeightRecord, ...], initializers: Mapping[str, Initializer]) -> None:
    """Rows without a record could hold anything. Places count, not names: a tied embedding and head are two names."""
    rows: Counter[int] = Counter()
    for record in records:
        for name in record.initializers.values():
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
    except (KeyError, ValueError) as error:
        raise LlamaExportError(
            f"{GRAPH_FILE} does not store {record.name} as {record.format}, as the reference says; build the bundle "
            "again."
        ) from error
    return None if digest == record.sha256 else WeightDifference(record.name, norm, record.norm)


def _rows(record: WeightRecord, initializers: Mapping[str, Initializer], file: FileIO) -> Iterator[Float32]:
    """The record's tensor, dequantised, a few rows at a time: [n, columns]."""
    stored = {role: _initializer(record, name, initializers) for role, name in record.initializers.items()}
    rows, columns = record.shape[0], math.prod(record.shape[1:])
    decode = _DECODERS.get(record.format)
    if decode is None:
        raise LlamaExportError(f"The reference names an unknown format {record.format!r}; upgrade llama-export.")
    step = max(1, _STEP_VALUES // columns)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        parts = {role: _read(tensor, record.row + start, record.row + stop, file) for role, tensor in stored.items()}
        with np.errstate(over="ignore", invalid="ignore"):  # damage shows in the comparison
            values = decode(parts)
        if not 0 <= values.shape[1] - columns < (_BLOCK if "codes" in parts else 1):
            raise ValueError(f"rows of {values.shape[1]} values")
        yield values[:, :columns]


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


Parts = Mapping[str, npt.NDArray[np.generic]]


def _dense(parts: Parts) -> Float32:
    return parts["values"].astype(np.float32)


def _int8(parts: Parts) -> Float32:
    return _scaled(parts["codes"].astype(np.float32) - np.float32(128), parts)


def _int4(parts: Parts) -> Float32:
    packed = parts["codes"].astype(np.uint8)
    codes = np.stack((packed & 0x0F, packed >> 4), axis=-1)  # the even column is in the low nibble
    return _scaled(codes.astype(np.float32).reshape(len(packed), -1) - np.float32(8), parts)


def _scaled(codes: Float32, parts: Parts) -> Float32:
    blocks = codes.reshape(len(codes), -1, _BLOCK) * parts["scales"].astype(np.float32)[..., None]
    if "offsets" in parts:
        blocks += parts["offsets"].astype(np.float32)[..., None]
    return blocks.reshape(len(codes), -1)


_DECODERS: Mapping[str, Callable[[Parts], Float32]] = {
    "fp32": _dense,
    "fp16": _dense,
    "bf16": _dense,
    "int8": _int8,
    "int4": _int4,
    "int4-offset": _int4,
}
