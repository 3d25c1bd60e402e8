"""The walk through a model: every layer of transformers beside what the graph showed of it, one layer in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from ...optimize.formats import HEAD
from ...optimize.tensors import Float32, Int64
from ...progress import Progress
from ..layerwise import LAST_NORM, Texts, decoder_layer, embedded, norm_before_head
from ..rotary import frequencies, rotary_embedding
from ..trace import window_of
from . import places as at
from .anatomy import Anatomy, Seen
from .finding import CACHE, CUMULATIVE, GAIN, LOCAL, Row
from .limits import cumulative_figure, cumulative_limit, gain_figure, gain_limit, local_figure, local_limit
from .local import LayerOps, Result, Surroundings, norm_result, product_result
from .probe import Piece, Probe
from .weights import Weights, whole

_SHOWN_BYTES = 256 << 20
"""Of values that are taken out of the graph in one run over the text."""

Shown = dict[str, torch.Tensor]
"""What the graph had at each place, of one piece."""


@dataclass
class Walk:
    """config, context, weights: PyTorch's side. dtype: of the graph's activations. found: the worst row of each pass,
    layer, place and kind so far.
    """

    config: PreTrainedConfig
    context: int
    weights: Weights
    anatomy: Anatomy
    probe: Probe
    ids: Int64
    pieces: Sequence[Piece]
    dtype: str
    found: dict[tuple[object, ...], Row] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, progress: Progress) -> tuple[Row, ...]:
        """Compare every place in every piece."""
        layers, sequence = self.config.num_hidden_layers, [self.ids.tolist()]
        texts, hidden = Texts(self.config, self.context, sequence), embedded(sequence, self.weights.parts)
        outside = [groups[0] for groups in self._shown([self.anatomy.outside])]
        before = [shown[at.EMBEDDED] for shown in outside]
        for piece, given in zip(self.pieces, before, strict=True):
            want = hidden[0][0, piece.first : piece.stop]
            self._judge(piece, None, Result(at.EMBEDDED, given, want, want.abs()))
        for index, inner in self._layers():
            layer = decoder_layer(self.config, index, lambda name: whole(self.weights, name))
            self._compare(index, layer, inner, before)
            with _Watch(layer) as watch:
                texts.run(layer, hidden)
            self._compare_whole(index, inner, {**watch.seen, at.LEFT: hidden[0][0]})
            before = [shown[at.LEFT] for shown in inner]
            progress.share((index + 1) / (layers + 1))
        self._finish(hidden[0][0], outside, before)
        progress.share(1)
        return tuple(self.found.values())

    def _layers(self) -> Iterator[tuple[int, list[Shown]]]:
        """Each layer with what the graph shows of it in each piece, so many layers in one run as fit."""
        count = self.config.num_hidden_layers
        width = 16 * self.config.hidden_size + 4 * self.config.intermediate_size
        step = max(1, _SHOWN_BYTES // (4 * width * len(self.ids)))
        for start in range(0, count, step):
            runs = self._shown(self.anatomy.layers[start : start + step])
            for number in range(min(step, count - start)):
                yield start + number, [run[number] for run in runs]

    def _shown(self, wanted: Sequence[Mapping[str, Seen]]) -> list[list[Shown]]:
        """The text through the graph: of each piece, of each of the groups of values that are wanted."""
        names = list(dict.fromkeys(seen.name for group in wanted for seen in group.values()))
        self.probe.begin()
        runs = []
        for piece in self.pieces:
            found = self.probe.run(self.ids[piece.first : piece.stop], piece, names)
            runs.append(
                [
                    {place: self._arranged(place, found[seen.name], seen) for place, seen in group.items()}
                    for group in wanted
                ]
            )
        return runs

    def _arranged(self, place: str, value: Float32, seen: Seen) -> torch.Tensor:
        """[n, width]; what has heads [heads, n, head_dim], without padding."""
        head_dim = self.config.head_dim
        if seen.columns is not None:
            value = value[:, slice(*seen.columns)]
        if place in at.WITH_HEADS:
            value = value if value.ndim == 3 else value.reshape(len(value), -1, head_dim).swapaxes(0, 1)
            value = value[..., :head_dim]
        return torch.from_numpy(np.ascontiguousarray(value))

    def _compare(self, index: int, layer: torch.nn.Module, inner: list[Shown], before: list[torch.Tensor]) -> None:
        """The layer's op groups, each on its own, and the rows of the cache that were there before."""
        ops, earlier = LayerOps(layer), Shown()
        for piece, shown, given in zip(self.pieces, inner, before, strict=True):
            for result in ops.results(shown, given, self._around(piece)):
                self._judge(piece, index, result)
            for place in (at.CACHED_KEYS, at.CACHED_VALUES):
                if place in earlier:
                    changed = cumulative_figure(shown[place][:, : piece.first], earlier[place])
                    self._add(piece, index, place, CACHE, changed, 0.0)
                earlier[place] = shown[place]

    def _compare_whole(self, index: int, inner: list[Shown], own: Shown) -> None:
        """The same places against a run of PyTorch's own."""
        limit = cumulative_limit(index, self.dtype)
        for piece, shown in zip(self.pieces, inner, strict=True):
            for place, value in own.items():
                figure = cumulative_figure(shown[place], value[piece.first : piece.stop], value)
                self._add(piece, index, place, CUMULATIVE, figure, limit)

    def _finish(self, hidden: torch.Tensor, outside: list[Shown], before: list[torch.Tensor]) -> None:
        """The last norm and the head."""
        norm = norm_before_head(self.config, whole(self.weights, LAST_NORM))
        normed, limit = norm(hidden), cumulative_limit(self.config.num_hidden_layers, self.dtype)
        for piece, shown, given in zip(self.pieces, outside, before, strict=True):
            self._judge(piece, None, norm_result(at.NORM, norm, given, shown[at.NORM]))
            figure = cumulative_figure(shown[at.NORM], normed[piece.first : piece.stop], normed)
            self._add(piece, None, at.NORM, CUMULATIVE, figure, limit)
        own = []
        for start, rows in self.weights.parts(HEAD):
            weight = torch.from_numpy(rows)
            own.append(normed @ weight.T)
            for piece, shown in zip(self.pieces, outside, strict=True):
                got = shown[at.LOGITS][:, start : start + len(rows)]
                self._judge(piece, None, product_result(at.LOGITS, weight, None, shown[at.NORM], got))
        logits = torch.cat(own, dim=1)
        for piece, shown in zip(self.pieces, outside, strict=True):
            figure = cumulative_figure(shown[at.LOGITS], logits[piece.first : piece.stop], logits)
            self._add(piece, None, at.LOGITS, CUMULATIVE, figure, limit)

    def _around(self, piece: Piece) -> Surroundings:
        rotary, like = rotary_embedding(self.config, self.context), torch.empty((), dtype=torch.float32)
        positions, keys = torch.arange(piece.first, piece.stop), torch.arange(piece.stop)
        window = window_of(self.config)
        visible = keys[None] <= positions[:, None]
        if window is not None:
            visible &= keys[None] > positions[:, None] - window
        rope: dict[str, Any] = self.config.rope_parameters
        theta = float(rope["rope_theta"]) if rope["rope_type"] == "default" else None
        turns = torch.from_numpy(frequencies(self.config, self.context)).double()
        return Surroundings(lambda shift: rotary(like, positions[None] + shift), visible, positions, turns, theta)

    def _judge(self, piece: Piece, layer: int | None, result: Result) -> None:
        figure, limit = local_figure(result, self.dtype), local_limit(result, self.dtype)
        self._add(piece, layer, result.place, LOCAL, figure, limit, result)
        if result.gains is not None:
            self._add(
                piece, layer, result.place, GAIN, gain_figure(result.gains), gain_limit(result, self.dtype), result
            )

    def _add(
        self,
        piece: Piece,
        layer: int | None,
        place: str,
        kind: str,
        measured: float,
        limit: float,
        result: Result | None = None,
    ) -> None:
        key, seen = (piece.name, layer, place, kind), self._seen(layer, place)
        if key in self.found and self.found[key].measured >= measured:
            return
        hint = result.hint() if result is not None and not measured <= limit and math.isfinite(measured) else ""
        self.found[key] = Row(piece.name, layer, place, seen.op, kind, measured, limit, hint, seen.contains)

    def _seen(self, layer: int | None, place: str) -> Seen:
        return (self.anatomy.outside if layer is None else self.anatomy.layers[layer])[place]


class _Watch:
    """What transformers' own layer computes at each place while it runs, [tokens, width]."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.seen: Shown = {}
        self._layer = layer
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Watch:
        for place, name in at.RESULTS.items():
            self._handles.append(self._layer.get_submodule(name).register_forward_hook(self._keep(place)))
        for place, name in at.INPUTS.items():
            self._handles.append(self._layer.get_submodule(name).register_forward_pre_hook(self._keep(place)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, place: str) -> Any:
        def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...], *made: torch.Tensor) -> None:
            self.seen[place] = (made or given)[0][0]

        return keep
