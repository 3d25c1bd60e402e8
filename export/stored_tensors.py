"""A bundle's weights as if they were a checkpoint: what stands for tensors that no checkpoint and format alone tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import LlamaExportError
from ..optimize.formats import FP32
from ..optimize.tensors import Float32, SourceTensor
from ..runtime.bundle import Bundle
from ..runtime.proof.reference import WeightRecord
from ..runtime.proof.weights import StoredTensors

TOLD = "the weights as the bundle stores them"


def stored_tensors(
    bundle: Bundle, records: Sequence[WeightRecord], tensors: Mapping[str, SourceTensor]
) -> dict[str, SourceTensor]:
    """The bundle's values under the names of `tensors`, dequantised in float32, their format being that of such values.

    records: of its exact reference, which say where each lies. Raises LlamaExportError where a tensor has no record of
    this shape.
    """
    stored, first = StoredTensors(bundle), dict[str, WeightRecord]()
    for record in records:
        first.setdefault(record.name, record)
    found = {}
    for name, tensor in tensors.items():
        if name not in first or first[name].shape != tensor.shape:
            raise LlamaExportError(
                f"The exact reference of {bundle.path} does not say where {name} is stored; build the bundle again."
            )
        found[name] = _tensor(stored, first[name])
    return found


def _tensor(stored: StoredTensors, record: WeightRecord) -> SourceTensor:
    def read(start: int, stop: int) -> Float32:
        rows = np.concatenate(list(stored.rows(record, start, stop)))
        return np.ascontiguousarray(rows.reshape(-1, *record.shape[1:]))

    return SourceTensor(record.name, record.shape, record.format, FP32, read)
