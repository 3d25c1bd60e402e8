"""One decoder layer: both streams through it, and its matrices quantised on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedConfig

from ...errors import LlamaExportError
from ...optimize.equivalence import Seam, factors_of, scaled, seams_of
from ...optimize.formats import FP32
from ...optimize.overlay import rounded_by
from ...optimize.quantise import dequantise, stored_values
from ...optimize.tensors import Blocks, Float32, SourceTensor
from ..layerwise import Texts, cuts, decoder_layer, layer_name
from ..safetensors_file import StoredTensor
from .run import Run
from .stages import GROUPS, Placed, Stages
from .statistics import Channels, ChannelSums, Statistics, Sums, token_weights
from .stored_codes import arrays_of, fits, kept_blocks
from .work import Arrays

Kept = Mapping[str, StoredTensor]
Hidden = list[torch.Tensor]
"""Hidden states of each sequence, float32 [1, length, hidden] on the CPU."""

_ERROR = "error"

PIECE = 1 << 23
"""Values of a matrix that are solved together: a method holds several numbers for each."""


@dataclass(frozen=True)
class Place:
    """Where layers run. device: that computes."""

    config: PreTrainedConfig
    texts: Texts
    device: torch.device


def values_of(tensor: SourceTensor, start: int, stop: int) -> torch.Tensor:
    """Rows in float32, in memory that PyTorch aligns: sums come out the same wherever it lies.

    Raises LlamaExportError where they are not finite.
    """
    values = torch.empty((stop - start, *tensor.shape[1:]))
    for first, last in cuts(replace(tensor, shape=(stop - start, *tensor.shape[1:]))):
        values.numpy()[first:last] = tensor.read(start + first, start + last)
        if not values[first:last].isfinite().all():
            raise LlamaExportError(
                f"The checkpoint's tensor {tensor.name} holds NaN or infinite values in rows {start + first} to "
                f"{start + last - 1}, read as {tensor.dtype}; a model's weights are finite, so the file is damaged or "
                "its training diverged."
            )
    return values


def solved(run: Run, name: str, weight: torch.Tensor, statistics: Statistics) -> Blocks:
    """The codes that the method makes of a matrix, or of some rows of it, with scales as they are stored."""
    return rounded_by(lambda format: run.method.solve(weight, statistics, format), run.formats[name], run.scale_dtype)


def row_parts(tensor: SourceTensor) -> Iterator[tuple[int, int]]:
    """Rows that are solved together."""
    step = max(1, PIECE // tensor.shape[1])
    for start in range(0, tensor.shape[0], step):
        yield start, min(tensor.shape[0], start + step)


def joined(parts: dict[str, list[np.ndarray]]) -> Arrays:
    """The parts of each array together; those are let go one after another."""
    return {name: np.concatenate(parts.pop(name)) for name in list(parts)}


def seams(run: Run, index: int) -> tuple[Seam, ...]:
    """Those of a decoder layer."""
    return seams_of(run.source.tensors, run.source.shape, index)


def kept_scales(run: Run, index: int, kept: Kept) -> dict[Seam, Float32]:
    """The channel scales that were kept with a layer."""
    found = {seam: kept.get(_seam(number)) for number, seam in enumerate(seams(run, index))}
    return {seam: one.array(0, seam.channels) for seam, one in found.items() if one is not None}


def kept_error(kept: Kept) -> float:
    """How far a layer's hidden states are from the unquantised model's, relative."""
    return float(kept[_ERROR].array(0, 1)[0])


def is_whole(run: Run, index: int, kept: Kept) -> bool:
    """Whether all of a layer is there."""
    names = [name for name in run.layer(index) if run.solves(name)]
    codes = all(fits(kept, name, run.source.tensors[name].shape, run.formats[name]) for name in names)
    sizes = [(kept.get(_seam(number)), seam.channels) for number, seam in enumerate(seams(run, index))]
    scales = all(one is None or (one.dtype, one.shape) == ("F32", (channels,)) for one, channels in sizes)
    return codes and scales and _ERROR in kept


def _seam(number: int) -> str:
    return f"seam.{number}"


class LayerRun:
    """One decoder layer. kept: what an interrupted build made of it, which is then taken instead of solving."""

    def __init__(self, run: Run, place: Place, index: int, kept: Kept | None) -> None:
        self._run, self._place, self._index, self._kept = run, place, index, kept
        self._tensors = run.layer(index)
        self._values = {
            name: values_of(tensor, 0, tensor.shape[0]).to(place.device) for name, tensor in self._tensors.items()
        }
        self._weights: list[torch.Tensor] = []
        self._arrays: dict[str, np.ndarray] = {}

    def run(self, original: Hidden, quantised: Hidden) -> Arrays:
        """Put both streams through the layer, and quantise it in between. Returns what is to be kept of it."""
        layer = decoder_layer(self._place.config, self._index, self._values.__getitem__)
        before = list(original) if self._run.method.cross and self._kept is None else None
        channels = self._through(layer, original)
        self._move(channels)
        self._weights = [token_weights(state) for state in original]
        self._staged(Stages(layer, self._place.device), quantised, before)
        self._arrays[_ERROR] = np.array([_error(original, quantised)], np.float32)
        return self._arrays

    def _through(self, layer: torch.nn.Module, original: Hidden) -> Mapping[str, Channels]:
        """Put the original stream through the layer as it is; what its matrices read, where scales are to be chosen."""
        sums: dict[str, ChannelSums] = {}
        with ExitStack() as stack:
            if self._chooses:
                for names in GROUPS:
                    sums[names[0]] = ChannelSums()
                    hook = _adding(sums[names[0]])
                    stack.enter_context(layer.get_submodule(names[0]).register_forward_pre_hook(hook))
            self._place.texts.run(Placed(layer, self._place.device), original)
        found = {first: one.channels() for first, one in sums.items()}
        return {self._weight(name): found[names[0]] for names in GROUPS for name in names if names[0] in found}

    @property
    def _chooses(self) -> bool:
        return self._kept is None and self._run.moves_scales(self._index)

    def _move(self, channels: Mapping[str, Channels]) -> None:
        """Move channel scales: the layer computes the same as before."""
        scales: Mapping[Seam, Float32] = {}
        between = seams(self._run, self._index)
        if self._kept is not None:
            scales = kept_scales(self._run, self._index, self._kept)
        elif self._chooses and self._run.method.scales is not None:
            scales = self._run.method.scales(between, self._values, channels, self._run.formats)
        for name, factors in factors_of(scales).items():
            values, place = self._values[name], self._place.device
            if factors.columns is not None:
                values.mul_(torch.from_numpy(factors.columns).to(place))
            if factors.rows is not None:
                rows = torch.from_numpy(factors.rows).to(place)
                values.mul_(rows if values.dim() == 1 else rows[:, None])
        self._tensors = scaled(self._tensors, scales)
        self._arrays |= {
            _seam(number): scales[seam].astype(np.float32) for number, seam in enumerate(between) if seam in scales
        }

    def _staged(self, stages: Stages, hidden: Hidden, before: Hidden | None) -> None:
        """The quantised stream, matrix for matrix; where the solver asks for it, the original one beside it, which
        always passes through matrices that are not quantised yet.
        """
        attended = None if before is None else self._attended(stages, before)
        self._settle(GROUPS[0], self._gathered(GROUPS[0], stages.before_attention, hidden, before))
        read = self._attended(stages, hidden)
        beside = None
        if before is not None and attended is not None:
            beside = _each(stages.after_attention, before, attended)
            before.clear()
        statistics = self._gathered(GROUPS[1], self._to_device, read, attended)
        del attended
        self._settle(GROUPS[1], statistics)
        for number, state in enumerate(read):
            hidden[number] = stages.after_attention(hidden[number], state)
        del read
        mlp = None if beside is None else copy.deepcopy(stages.mlp)
        self._settle(GROUPS[2], self._gathered(GROUPS[2], stages.before_mlp, hidden, beside))
        statistics = self._gathered(GROUPS[3], stages.activated, hidden, beside, partial(stages.activated, mlp=mlp))
        del beside, mlp  # the widest matrix is solved for, which takes the most memory
        self._settle(GROUPS[3], statistics)
        for number, state in enumerate(hidden):
            hidden[number] = stages.after_mlp(state)

    def _attended(self, stages: Stages, hidden: Hidden) -> Hidden:
        passed = self._place.texts.passed
        return [passed(stages.attended, number, state) for number, state in enumerate(hidden)]

    def _to_device(self, state: torch.Tensor) -> torch.Tensor:
        return state.to(self._place.device)

    def _gathered(
        self,
        group: Sequence[str],
        reads: Callable[[torch.Tensor], torch.Tensor],
        states: Hidden,
        beside: Hidden | None,
        beside_reads: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Statistics | None:
        """What the matrices of a group read; None where none of them is to be solved for. reads: what they read of
        `states`; of `beside`, the same of the original stream.
        """
        asked = self._asked(group)
        if not asked:
            return None
        sums = Sums(asked[0], self._tensors[asked[0]].shape[1], self._place.device, cross=beside is not None)
        adds = group in (GROUPS[1], GROUPS[3])  # to the hidden states, whose sizes differ from token to token
        for number, state in enumerate(states):
            other = None if beside is None else (beside_reads or reads)(beside[number])
            sums.add(reads(state), other, self._weights[number] if adds else None)
        return sums.statistics()

    def _asked(self, group: Sequence[str]) -> list[str]:
        names = [self._weight(name) for name in group]
        return [name for name in names if self._run.solves(name)] if self._kept is None else []

    def _settle(self, group: Sequence[str], statistics: Statistics | None) -> None:
        """Make of the matrices of a group what is stored."""
        if statistics is not None:
            for name in self._asked(group):
                self._solve(name, statistics)
        for name in map(self._weight, group):
            for start, rows in self._stored(name):
                self._put(name, start, rows)

    def _solve(self, name: str, statistics: Statistics) -> None:
        """Let the method choose the codes of a matrix, a part of its rows at a time."""
        found, columns = dict[str, list[np.ndarray]](), self._tensors[name].shape[1]
        for start, stop in row_parts(self._tensors[name]):
            blocks = solved(self._run, name, self._values[name][start:stop], statistics)
            for part, array in arrays_of(name, blocks).items():
                found.setdefault(part, []).append(array)
            self._put(name, start, dequantise(blocks, columns))
        self._arrays |= joined(found)

    def _stored(self, name: str) -> Iterator[tuple[int, Float32]]:
        """The rows of what was not solved just now, as the bundle will store them."""
        tensor, format = self._tensors[name], self._run.formats[name]
        for start, stop in cuts(tensor):
            if not self._run.solves(name):
                if format != FP32:
                    yield start, stored_values(tensor, format, start, stop, self._run.scale_dtype)
            elif self._kept is not None:
                yield start, dequantise(kept_blocks(self._kept, name, format, start, stop), tensor.shape[1])

    def _put(self, name: str, start: int, rows: Float32) -> None:
        self._values[name][start : start + len(rows)].copy_(torch.from_numpy(np.ascontiguousarray(rows)))

    def _weight(self, projection: str) -> str:
        return layer_name(self._index, f"{projection}.weight")


def _adding(sums: ChannelSums) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    return lambda _module, inputs: sums.add(inputs[0])


def _each(function: Callable[..., torch.Tensor], *states: Hidden) -> Hidden:
    return [function(*given) for given in zip(*states, strict=True)]


def _error(original: Hidden, quantised: Hidden) -> float:
    pairs = zip(original, quantised, strict=True)
    differences = sum(float((after - before).square().sum(dtype=torch.float64)) for before, after in pairs)
    sizes = sum(float(before.square().sum(dtype=torch.float64)) for before in original)
    return (differences / sizes) ** 0.5 if sizes else 0.0
