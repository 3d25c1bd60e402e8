"""What a calibrated method is to the driver: functions of one matrix, and of one layer's seams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...optimize.equivalence import Seam
from ...optimize.formats import Format
from ...optimize.overlay import QuantiseRows
from ...optimize.quantise import quantise
from ...optimize.tensors import Blocks, Float32
from .statistics import Channels, Statistics


class Solver(Protocol):
    """How a matrix is quantised."""

    def __call__(self, weight: torch.Tensor, statistics: Statistics, format: Format) -> Blocks:
        """weight: float32 [rows, columns], left as it is; rows do not depend on one another, so that a large matrix may
        come in several parts. Where `format.half`, the codes are made for scales that float16 holds.
        """


class ChooseScales(Protocol):
    """How channel scales of a decoder layer are chosen before its matrices are quantised."""

    def __call__(
        self,
        seams: tuple[Seam, ...],
        weights: Mapping[str, torch.Tensor],
        inputs: Mapping[str, Channels],
        formats: Mapping[str, Format],
    ) -> Mapping[Seam, Float32]:
        """Float32 [channels] of each seam that gets any: its producers will be divided by them.

        seams: those of the layer. weights: its tensors by checkpoint name, float32, left as they are. inputs: of each
        matrix, by name, what it reads. formats: in which the matrices will be stored.
        """


@dataclass(frozen=True)
class Method:
    """A calibrated method. name, version: of the algorithm, which changes with its results; told: as the type of a
    tensor, for people; settings: numbers that change the results; cross: whether the solver asks for
    `Statistics.cross`; scales: None where it moves none.
    """

    name: str
    version: int
    told: str
    solve: Solver
    cross: bool = False
    scales: ChooseScales | None = None
    settings: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataFree:
    """How a matrix that no text tells of is quantised: the embedding, whose rows are looked up."""

    name: str
    version: int
    rows: QuantiseRows


ROUND_TO_NEAREST = DataFree("rtn", 1, lambda _, rows, format: quantise(rows, format))
