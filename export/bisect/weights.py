"""What PyTorch computes with: a bundle's tensors as it stores them, or a checkpoint's in the bundle's formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ...errors import LlamaExportError
from ...optimize.formats import EMBEDDING, HEAD, Format
from ...optimize.plan import plan_formats
from ...optimize.quantise import stored_values
from ...optimize.tensors import Float32, SourceTensor
from ...runtime.bundle import Bundle
from ...runtime.proof.reference import WeightRecord
from ...runtime.proof.weights import StoredTensors
from ..layerwise import Parts, cuts
from ..recorded_formats import recorded_formats

_DENSE = ("fp32", "fp16")


class Weights(Protocol):
    """The tensors of a model by checkpoint name, in float32."""

    @property
    def told(self) -> str:
        """Where they come from."""

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""

    def parts(self, name: str) -> Parts:
        """A tensor's rows, a few at a time. `HEAD` is the head's also where it is the embedding."""


def whole(weights: Weights, name: str) -> torch.Tensor:
    """A tensor in one piece."""
    return torch.from_numpy(np.concatenate([part for _, part in weights.parts(name)]))


class StoredWeights:
    """A bundle's own tensors, as the records of its exact reference say where they lie."""

    told = "the weights as the bundle stores them"

    def __init__(self, bundle: Bundle, records: Sequence[WeightRecord]) -> None:
        self._stored = StoredTensors(bundle)
        self._records: dict[str, list[WeightRecord]] = {}
        for record in records:
            self._records.setdefault(record.name, []).append(record)

    @property
    def tied(self) -> bool:
        return HEAD not in self._records

    def parts(self, name: str) -> Parts:
        record, start = self._record(name), 0
        for rows in self._stored.rows(record):
            yield start, np.ascontiguousarray(rows).reshape(-1, *record.shape[1:])
            start += len(rows)

    def _record(self, name: str) -> WeightRecord:
        """Of a tensor that is stored in two layouts, the one that the embedding or the head reads."""
        found = self._records.get(EMBEDDING if name == HEAD and self.tied else name)
        if found is None:
            raise LlamaExportError(
                f"The bundle's reference has no record of {name}, which config.json asks for; build the bundle again."
            )
        module = name.removesuffix(".weight")
        own = (one for one in found if any(stored.startswith(module) for stored in one.initializers.values()))
        return next(own, found[0])


@dataclass(frozen=True)
class SourceWeights:
    """A checkpoint's tensors, converted to the bundle's formats again. scale_dtype: of the bundle's scales."""

    tensors: Mapping[str, SourceTensor]
    formats: Mapping[str, Format]
    scale_dtype: npt.DTypeLike
    told: str
    exact: ClassVar[bool] = True

    @property
    def tied(self) -> bool:
        return HEAD not in self.tensors

    def parts(self, name: str) -> Parts:
        name = EMBEDDING if name == HEAD and self.tied else name
        for start, stop in cuts(self.tensors[name]):
            yield start, np.ascontiguousarray(self.rows(name, start, stop))

    def rows(self, name: str, start: int, stop: int) -> Float32:
        return stored_values(self.tensors[name], self.formats[name], start, stop, self.scale_dtype)


@dataclass(frozen=True)
class NearWeights:
    """A checkpoint's own tensors, near which a bundle's must be, where no checkpoint tells the codes that it stores."""

    tensors: Mapping[str, SourceTensor]
    exact: ClassVar[bool] = False

    def rows(self, name: str, start: int, stop: int) -> Float32:
        return self.tensors[name].read(start, stop)


Known = SourceWeights | NearWeights
"""What is known of a bundle's tensors from a checkpoint."""


def source_weights(
    bundle: Bundle, tensors: Mapping[str, SourceTensor], records: Sequence[WeightRecord] | None, model_id: str
) -> SourceWeights:
    """The tensors of the checkpoint `model_id` as the bundle should store them.

    records: of the bundle's exact reference, which name the formats; without them only a bundle in floating point can
    be told. Raises LlamaExportError for any other, and when the checkpoint is of another model.
    """
    told = f"{model_id}, in the formats that the bundle stores"
    dtype = np.dtype(bundle.manifest.shape.activations)
    if records is None:
        precision = bundle.manifest.precision
        if precision not in _DENSE:
            raise LlamaExportError(
                f"The bundle has no exact reference, so the formats of its weights ({precision}) cannot be told; build "
                "it again without --no-reference."
            )
        return SourceWeights(tensors, plan_formats(tensors, precision), dtype, told)
    _refuse_other_tensors(tensors, records, model_id)
    return SourceWeights(tensors, recorded_formats(records, bundle.manifest.backend, tensors), dtype, told)


def _refuse_other_tensors(tensors: Mapping[str, SourceTensor], records: Sequence[WeightRecord], model_id: str) -> None:
    recorded = {record.name: record.shape for record in records}
    for name in sorted(recorded.keys() | tensors.keys()):
        if name not in recorded or name not in tensors or tensors[name].shape != recorded[name]:
            raise LlamaExportError(
                f"{model_id} is not the model of this bundle, as {name} differs in shape or is in only one of them; "
                "name the checkpoint that the bundle was built from."
            )
