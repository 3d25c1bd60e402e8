"""The file of an adapter that stays beside the weights, see `runtime.adapters`."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import LlamaExportError
from ...optimize.ort.low_rank import A_SUFFIX, B_SUFFIX, Slot
from ...optimize.quantise import dense_format
from ...runtime.bundle import adapter_file
from ...runtime.proof.reference import WeightRecord, fingerprint
from .peft_folder import Adapter

_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that zip knows: the same adapter gives the same file


def write_adapter(adapter: Adapter, slots: Sequence[Slot], folder: Path, dtype: npt.DTypeLike) -> list[WeightRecord]:
    """Write the matrices of `adapter` for every slot of the graph, in `dtype`, into the bundle that is being made; one
    product at a time is in memory.

    Returns what verify compares, of the matrices that hold anything. Raises LlamaExportError when a number is not
    finite, or not in `dtype`.
    """
    path = folder / adapter_file(adapter.name)
    path.parent.mkdir(exist_ok=True)
    records = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for slot in slots:
            for name, matrix in _matrices(adapter, slot, dtype):
                if not np.isfinite(matrix).all():
                    raise LlamaExportError(
                        f"The adapter {adapter.name} holds numbers in {name} that are NaN, infinite, or too large for "
                        f"{np.dtype(dtype)}; take the adapter again, or use -t cpu, which computes in float32."
                    )
                with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, matrix, version=(1, 0), allow_pickle=False)
                if matrix.size:
                    sha256, norm = fingerprint(iter([matrix.astype(np.float32)]))
                    records.append(WeightRecord(name, dense_format(dtype).name, matrix.shape, 0, {}, sha256, norm))
    return records


def _matrices(adapter: Adapter, slot: Slot, dtype: npt.DTypeLike) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """A [inputs, rank] and B [rank, outputs] of the stacked product: ranks add up, and B has a block for each part."""
    parts = [adapter.parts.get(part) for part in slot.parts]
    rank, outputs = sum(part.rank for part in parts if part is not None), sum(slot.rows)
    a, b = np.zeros((slot.columns, rank), dtype), np.zeros((rank, outputs), dtype)
    across = down = 0
    with np.errstate(over="ignore"):  # the caller looks for infinity
        for part, rows in zip(parts, slot.rows, strict=True):
            if part is not None:
                a[:, across : across + part.rank] = part.a.floats(0, part.rank).T
                b[across : across + part.rank, down : down + rows] = part.scaled_b(0, rows).T
                across += part.rank
            down += rows
    yield slot.name + A_SUFFIX, a
    yield slot.name + B_SUFFIX, b
