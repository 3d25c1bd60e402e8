"""Inside of the graph: hidden states, keys and values of each layer, against the samples that a reference keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..arrays import Float32
from .gates import HIDDEN, Limits
from .reference import Reference
from .replayer import Replayer
from .replayers import GraphReplayer
from .verdict import Gate, LayerFigure
from .ways import cuts_of

Samples = dict[int, Float32]
"""By layer, [marks, channels]."""


@dataclass(frozen=True)
class _Found:
    """What the graph has at the marks of one prompt."""

    hidden: Samples
    keys: Samples
    values: Samples


def layer_figures(replayer: Replayer, reference: Reference) -> tuple[LayerFigure, ...]:
    """How far each sampled layer is from the reference, which keeps `layers`; read by one more pass over its prompts.

    Hidden states are None where the replayer does not show them, keys and values where its cache cannot be read.
    """
    found = [_sampled(replayer, reference, number) for number in range(len(reference.index.prompts))]
    samples = reference.layers
    assert samples is not None
    wanted = {"hidden": samples.hidden, "keys": samples.keys, "values": samples.values}
    return tuple(
        LayerFigure(
            layer, *(_distance([getattr(one, name) for one in found], layer, wanted[name][at]) for name in HIDDEN)
        )
        for at, layer in enumerate(reference.index.layers)
    )


def layer_gates(figures: Sequence[LayerFigure], limits: Limits) -> tuple[Gate, ...]:
    """The worst layer for each figure that could be read."""
    gates = []
    for id, name in HIDDEN.items():
        values = [getattr(figure, id) for figure in figures]
        if id in limits.limits and None not in values:
            gates.append(Gate(id, name, float(np.max(values)), limits.limits[id], reason=limits.reasons.get(id, "")))
    return tuple(gates)


def _sampled(replayer: Replayer, reference: Reference, number: int) -> _Found:
    index, samples = reference.index, reference.layers
    assert samples is not None
    ids, marks = np.array(index.prompts[number].ids, np.int64), list(index.marks[number])
    states: dict[int, list[Float32]] = {}
    replayer.begin(1)
    for start, stop in pairwise(cuts_of(replayer, len(ids))):
        for layer, state in _run(replayer, ids[start:stop], start).items():
            inside = [mark - start for mark in marks if start <= mark < stop]
            states.setdefault(layer, []).append(state[inside][:, samples.hidden_ids])
    found = _Found({layer: np.concatenate(parts) for layer, parts in states.items()}, {}, {})
    for layer in index.layers:
        view = replayer.cache(layer)
        if view is not None:
            for part, into in ((view.keys, found.keys), (view.values, found.values)):
                numbers = part[0][:, marks, : index.identity.head_dim]  # what lies behind is padding of the heads
                into[layer] = numbers.transpose(1, 0, 2).reshape(len(marks), -1)[:, samples.cache_ids]
    return found


def _run(replayer: Replayer, ids: npt.NDArray[np.int64], first: int) -> Samples:
    if isinstance(replayer, GraphReplayer):
        return replayer.run_watched(ids, first)[1]
    replayer.run(ids[None], [first], [len(ids)])
    return {}


def _distance(found: Sequence[Samples], layer: int, wanted: Float32) -> float | None:
    """Largest difference, relative to the largest number there. wanted: [marks of all prompts, channels]."""
    if any(layer not in one for one in found):
        return None
    numbers = np.concatenate([one[layer] for one in found])
    largest = max(float(np.abs(wanted).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(numbers - wanted).max()) / largest  # NaN stays NaN, and passes no gate
