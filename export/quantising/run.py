"""What decides a quantisation: the model, its formats, the text and the method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...optimize.formats import EMBEDDING, Format
from ...optimize.overlay import ours
from ...optimize.plan import head_of
from ...optimize.tensors import SourceTensor
from ..calibration_text import CalibrationText
from ..source import Source
from .method import ROUND_TO_NEAREST, DataFree, Method

VERSION = 1
"""Of what the driver gives a method: an interrupted build goes on only where it is the same."""


@dataclass(frozen=True)
class Run:
    """What decides a quantisation.

    source: the tensors that are quantised. sha256: of the checkpoint, see `identity.model_sha256`. formats: of every
    tensor. scale_dtype: of stored scales where the format does not say. context: of the bundle. scaling: whether the
    method may move channel scales between tensors; not where an adapter stays beside the weights. data_free: for what
    no text tells of.
    """

    source: Source
    sha256: str
    formats: Mapping[str, Format]
    scale_dtype: npt.DTypeLike
    text: CalibrationText
    context: int
    method: Method
    scaling: bool = True
    data_free: DataFree = ROUND_TO_NEAREST

    @property
    def key(self) -> dict[str, Any]:
        """Runs with equal keys give equal codes."""
        formats = {name: (format.name, format.positive) for name, format in self.formats.items()}
        return {
            "version": VERSION,
            "model_sha256": self.sha256,
            "formats": _digest(formats),
            "scales": np.dtype(self.scale_dtype).name,
            "text": _digest(self.text.sequences),
            "context": self.context,
            "method": [self.method.name, self.method.version],
            "settings": dict(self.method.settings),
            "scaling": self.scaling and self.method.scales is not None,
            "data_free": [self.data_free.name, self.data_free.version],
        }

    @property
    def head(self) -> str | None:
        """The head's weight where the method makes its codes."""
        name = head_of(self.source.tensors)
        return name if self.solves(name) else None

    def solves(self, name: str) -> bool:
        """Whether the method makes the codes of this tensor. Of an embedding that is not the head no text tells: a
        token reads one row of it.
        """
        looked_up = name == EMBEDDING and head_of(self.source.tensors) != EMBEDDING
        return not looked_up and ours(self.source.tensors[name], self.formats[name])

    def layer(self, index: int) -> dict[str, SourceTensor]:
        """The tensors of a decoder layer."""
        prefix = f"model.layers.{index}."
        return {name: tensor for name, tensor in self.source.tensors.items() if name.startswith(prefix)}

    def moves_scales(self, index: int) -> bool:
        """Whether channel scales may move in this layer: not where a matrix keeps the checkpoint's own codes."""
        wanted = self.scaling and self.method.scales is not None
        return wanted and movable(self.source.tensors, self.formats, index)


def movable(tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format], index: int) -> bool:
    """Whether channel scales may move in this decoder layer: not where a matrix keeps the checkpoint's own codes."""
    prefix = f"model.layers.{index}."
    return not any(tensor.keeps_own(formats[name]) for name, tensor in tensors.items() if name.startswith(prefix))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
