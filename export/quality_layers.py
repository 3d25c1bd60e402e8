"""What storing costs each matrix: its own error, and that of what it makes of its inputs in the original model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from ..optimize.formats import EMBEDDING
from ..optimize.plan import head_of
from ..optimize.tensors import Float32, SourceTensor
from .layerwise import LAST_NORM, Texts, cuts, decoder_layer, last_norm, layer_name, projections
from .reference import Exact

_WATCHED_TOKENS = 128
"""Tokens of the windows whose matrices' outputs are looked at: a third product with every matrix."""


_Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]


@dataclass(frozen=True)
class Errors:
    """Of a matrix, see `runtime.quality.Matrix`."""

    weight: float
    output: float


@dataclass
class _Squares:
    """Sums of squares: of the matrix and its error, and of what both make of the inputs."""

    weight: float = 0.0
    weight_error: float = 0.0
    output: float = 0.0
    output_error: float = 0.0

    @property
    def errors(self) -> Errors:
        return Errors(_relative(self.weight_error, self.weight), _relative(self.output_error, self.output))


def _relative(error: float, whole: float) -> float:
    if not error:
        return 0.0
    return float(np.sqrt(error / whole)) if whole else 1.0


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())


@dataclass
class _Read:
    """What a projection read and made: inputs [tokens, columns] of some sequences; the sum of squares of what it made
    of them, without bias.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    output: float = 0.0

    def hook(self, watched: Iterator[bool]) -> _Hook:
        """watched: of each sequence, whether it is looked at."""

        def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if next(watched):
                bias = getattr(module, "bias", None)
                self.inputs.append(inputs[0][0])
                self.output += _squares(output if bias is None else output - bias)

        return note


class MatrixErrors:
    """The errors of matrices while both sides pass: what of a `reference.Watch` concerns matrices.

    Where channel scales were moved between tensors, the stored matrix stands for the original with these scales, and
    reads inputs with their inverse. So the decoder layer on such tensors runs too, on the hidden states of the original
    model, which this layer leaves as they would be without.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        context: int,
        own: Mapping[str, SourceTensor],
        stored: Mapping[str, SourceTensor],
        sequences: Sequence[Sequence[int]],
    ) -> None:
        """own: the checkpoint's tensors. stored: those that are written."""
        self._config, self._context, self._sequences = config, context, sequences
        self._head_name = head_of(own)
        self._stood_for = {name: stood_for(own[name], stored[name]) for name in own}
        self._moved = {name for name, tensor in self._stood_for.items() if tensor is not own[name]}
        self._watched = _spread(list(map(len, sequences)))
        self._read: dict[str, _Read] = {}
        self._found: dict[str, _Squares] = {}
        self._before: Float32 = np.empty((0, 0), np.float32)

    @property
    def errors(self) -> dict[str, Errors]:
        """Of each matrix that has passed, by name."""
        return {name: squares.errors for name, squares in self._found.items()}

    @contextlib.contextmanager
    def layer(self, index: int, layer: torch.nn.Module, hidden: Sequence[torch.Tensor]) -> Iterator[None]:
        """See `Watch.layer`."""
        self._read = {}
        if any(name.startswith(layer_name(index, "")) for name in self._moved):
            self._run_moved(index, hidden)
            yield
            return
        handles = self._hooked(index, layer, [number in self._watched for number in range(len(hidden))])
        yield
        for handle in handles:
            handle.remove()

    def _hooked(self, index: int, layer: torch.nn.Module, watched: Sequence[bool]) -> list[RemovableHandle]:
        handles = []
        for name, module in projections(index, layer):
            self._read[name] = _Read()
            handles.append(module.register_forward_hook(self._read[name].hook(iter(watched))))
        return handles

    def _run_moved(self, index: int, hidden: Sequence[torch.Tensor]) -> None:
        """The layer on tensors into which scales have been moved, over the sequences that are looked at."""
        layer = decoder_layer(self._config, index, lambda name: torch.from_numpy(self._whole(name)))
        self._hooked(index, layer, [True] * len(self._watched))
        texts = Texts(self._config, self._context, [self._sequences[number] for number in self._watched])
        texts.run(layer, [hidden[number] for number in self._watched])

    def _whole(self, name: str) -> Float32:
        tensor = self._stood_for[name]
        values = np.empty(tensor.shape, np.float32)
        for start, stop in cuts(tensor):
            values[start:stop] = tensor.read(start, stop)
        return values

    def converted(self, name: str, before: Float32, after: Float32) -> None:
        """See `Watch.converted`."""
        if before.ndim == 1:
            return
        original = self._whole(name) if name in self._moved else before
        read, squares = self._read.pop(name), _Squares()
        self._found[name] = squares
        squares.output = read.output
        self._compare(squares, torch.cat(read.inputs), original, after)

    @staticmethod
    def _compare(squares: _Squares, inputs: torch.Tensor, original: Float32, after: Float32) -> None:
        """Take up rows. inputs: [tokens, columns]."""
        weight = torch.from_numpy(original)
        error = torch.from_numpy(after) - weight
        squares.weight += _squares(weight)
        found = _squares(error)
        if found:
            squares.weight_error += found
            squares.output_error += _squares(inputs @ error.T)

    def last(self, hidden: Sequence[torch.Tensor]) -> None:
        """See `Watch.last`."""
        norm = torch.from_numpy(self._whole(LAST_NORM))
        watched = torch.cat([hidden[number][0] for number in self._watched])
        self._read = {self._head_name: _Read([last_norm(self._config, watched, norm)])}
        self._found[self._head_name] = _Squares()

    def head(self, side: int, start: int, rows: Float32) -> None:
        """See `Watch.head`."""
        name = self._head_name
        if not side:
            tensor = self._stood_for[name]
            self._before = tensor.read(start, start + len(rows)) if name in self._moved else rows.copy()
            return
        inputs, squares = self._read[name].inputs[0], self._found[name]
        squares.output += _squares(inputs @ torch.from_numpy(self._before).T)
        self._compare(squares, inputs, self._before, rows)

    def embedding(self, exact: Exact) -> None:
        """An embedding that is not the head: its rows, and those that the text looks up. exact: the stored side."""
        if self._head_name == EMBEDDING:
            return
        squares, tensor = self._found.setdefault(EMBEDDING, _Squares()), self._stood_for[EMBEDDING]
        times = np.zeros(tensor.shape[0])
        for number in self._watched:
            np.add.at(times, np.asarray(self._sequences[number]), 1)
        for start, stop in cuts(tensor):
            rows = tensor.read(start, stop)
            own, error = _by_row(rows), _by_row(exact.rows(EMBEDDING, start, stop, None) - rows)
            squares.weight += float(own.sum())
            squares.weight_error += float(error.sum())
            squares.output += float(times[start:stop] @ own)
            squares.output_error += float(times[start:stop] @ error)


def _by_row(values: Float32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The sum of squares of each row."""
    sums: np.ndarray[tuple[int], np.dtype[np.float64]] = np.square(values).sum(1, dtype=np.float64)
    return sums


def stood_for(own: SourceTensor, stored: SourceTensor) -> SourceTensor:
    """What a tensor that is written stands for before it is rounded: the checkpoint's, or that with scales moved in."""
    if stored.scaled is not None:
        return stored.scaled
    return own if stored is own or stored.blocks is not None else stored


def _spread(lengths: Sequence[int]) -> tuple[int, ...]:
    """Sequences evenly spread over all, of about `_WATCHED_TOKENS` tokens."""
    count = max(1, min(len(lengths), round(_WATCHED_TOKENS * len(lengths) / sum(lengths))))
    return tuple(sorted({int(place) for place in np.linspace(0, len(lengths) - 1, count)}))
