"""The head, quantised last: it reads what the whole quantised model makes of the text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ...optimize.plan import head_of
from ..layerwise import LAST_NORM, norm_before_head
from .layer import Hidden, Place, joined, row_parts, solved, values_of
from .run import Run
from .statistics import Statistics, Sums
from .stored_codes import arrays_of
from .work import Arrays


def solved_head(
    run: Run, place: Place, original: Hidden, quantised: Hidden, advance: Callable[[float], None]
) -> Arrays:
    """What is to be kept of the head. advance: told the share that is done."""
    name = head_of(run.source.tensors)
    tensor, found = run.source.tensors[name], dict[str, list[np.ndarray]]()
    statistics = _statistics(run, place, name, original, quantised)
    for start, stop in row_parts(tensor):
        blocks = solved(run, name, values_of(tensor, start, stop).to(place.device), statistics)
        for part, array in arrays_of(name, blocks).items():
            found.setdefault(part, []).append(array)
        advance(stop / tensor.shape[0])
    return joined(found)


def _statistics(run: Run, place: Place, name: str, original: Hidden, quantised: Hidden) -> Statistics:
    weight = run.source.tensors[LAST_NORM]
    norm = norm_before_head(place.config, values_of(weight, 0, weight.shape[0]).to(place.device))
    cross = run.method.cross
    sums = Sums(name, run.source.tensors[name].shape[1], place.device, cross=cross)
    for before, after in zip(original, quantised, strict=True):
        sums.add(_normed(norm, after, place), _normed(norm, before, place) if cross else None)
    return sums.statistics()


def _normed(norm: torch.nn.Module, state: torch.Tensor, place: Place) -> torch.Tensor:
    result: torch.Tensor = norm(state.to(place.device))
    return result
