"""transformers' own layers in float32 over a few texts, one layer in memory: for references, calibration, bisection."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..optimize.formats import EMBEDDING
from ..optimize.tensors import Float32, SourceTensor
from .families import ATTENTION, MLP, classes
from .rotary import rotary_embedding
from .trace import window_of

_STEP = 1 << 22
"""Values of a tensor that are read at a time."""

Parts = Iterator[tuple[int, Float32]]
"""A tensor's rows from the first to the last, a few at a time, each time with the number of the first."""


@dataclass(frozen=True)
class Layerwise:
    """A model whose weights pass by: `parts` of a checkpoint name are the values that it computes with.

    tensors: the checkpoint's, of which only shapes are looked at. context: of the bundle, for which the frequencies of
    the dynamic rope type are fixed.
    """

    config: PreTrainedConfig
    tensors: Mapping[str, SourceTensor]
    context: int
    parts: Callable[[str], Parts]

    @torch.no_grad()
    def decoded(
        self,
        sequences: Sequence[Sequence[int]],
        begin: Callable[[int, torch.nn.Module], None],
        caches: Sequence[KeptCache] | None = None,
        end: Callable[[int, torch.nn.Module], None] | None = None,
    ) -> list[torch.Tensor]:
        """What the last decoder layer leaves of each sequence, [1, length, hidden], all sequences in one pass over the
        weights. begin: called with each layer's index and the layer before it runs; end: after; then the layer is gone.
        caches: one for each sequence, which every layer gives its keys and values.
        """
        texts = Texts(self.config, self.context, sequences)
        hidden = embedded(sequences, self.parts)

        def run(index: int) -> None:  # a frame of its own, which lets go of the layer before the next is read
            layer = decoder_layer(self.config, index, self._whole)
            begin(index, layer)
            texts.run(layer, hidden, caches)
            if end is not None:
                end(index, layer)

        for index in range(self.config.num_hidden_layers):
            run(index)
        return hidden

    @torch.no_grad()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's input: `hidden` [..., hidden] after the last norm."""
        return last_norm(self.config, hidden, self._whole(LAST_NORM))

    def _whole(self, name: str) -> torch.Tensor:
        values = np.empty(self.tensors[name].shape, np.float32)
        for start, part in self.parts(name):
            values[start : start + len(part)] = part
        return torch.from_numpy(values)


class Texts:
    """Sequences of tokens on their way through decoder layers: what every layer is given beside its hidden states."""

    def __init__(self, config: PreTrainedConfig, context: int, sequences: Sequence[Sequence[int]]) -> None:
        rotary, like = rotary_embedding(config, context), torch.empty((), dtype=torch.float32)
        self._positions = [torch.arange(len(sequence))[None] for sequence in sequences]
        self._angles = [rotary(like, position) for position in self._positions]
        self._masks = [_window_mask(len(sequence), window_of(config)) for sequence in sequences]

    @torch.no_grad()
    def run(
        self, layer: torch.nn.Module, hidden: list[torch.Tensor], caches: Sequence[KeptCache] | None = None
    ) -> None:
        """Put every sequence through a layer: `hidden` [1, length, hidden size] each is replaced. caches: one for each
        sequence, which takes up its keys and values.
        """
        for number in range(len(self._positions)):
            hidden[number] = self.passed(layer, number, hidden[number], None if caches is None else caches[number])

    def passed(
        self, layer: torch.nn.Module, number: int, state: torch.Tensor, cache: KeptCache | None = None
    ) -> torch.Tensor:
        """What a layer makes of the hidden states [1, length, hidden size] of one sequence; gradients are kept where
        they are asked for.
        """
        result: torch.Tensor = layer(
            state,
            attention_mask=self._masks[number],
            position_embeddings=self._angles[number],
            position_ids=self._positions[number],
            past_key_values=cache,
        )
        return result


class KeptCache:
    """What transformers' attention asks of a cache, for one text in one piece: it keeps what the layer that runs puts
    there, keys after the rotary embedding, [1, kv_heads, length, head_dim] each.
    """

    def __init__(self) -> None:
        self.keys = self.values = torch.empty(0)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values


def embedded(sequences: Sequence[Sequence[int]], parts: Callable[[str], Parts]) -> list[torch.Tensor]:
    """The embedding's rows of each sequence, [1, length, hidden]."""
    wanted = np.unique(np.concatenate([np.asarray(sequence) for sequence in sequences]))
    rows: dict[int, Float32] = {}
    for start, part in parts(EMBEDDING):
        for token in wanted[(wanted >= start) & (wanted < start + len(part))]:
            rows[int(token)] = part[token - start].copy()
    return [torch.from_numpy(np.stack([rows[token] for token in sequence]))[None] for sequence in sequences]


def decoder_layer(config: PreTrainedConfig, index: int, values: Callable[[str], torch.Tensor]) -> torch.nn.Module:
    """transformers' decoder layer on `values` of each checkpoint name, which it shares."""
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        layer: torch.nn.Module = classes(config.model_type).layer(config, index)
    layer.load_state_dict({name: values(layer_name(index, name)) for name in layer.state_dict()}, assign=True)
    return layer.eval()


def layer_name(index: int, name: str) -> str:
    """The checkpoint name of a tensor of a decoder layer."""
    return f"model.layers.{index}.{name}"


LAST_NORM = "model.norm.weight"


@torch.no_grad()
def last_norm(config: PreTrainedConfig, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden` [..., hidden] after the norm that stands before the head."""
    normed: torch.Tensor = norm_before_head(config, weight)(hidden)
    return normed


def norm_before_head(config: PreTrainedConfig, weight: torch.Tensor) -> torch.nn.Module:
    """transformers' norm on `weight` [hidden], which it shares."""
    with torch.device("meta"):
        norm: torch.nn.Module = classes(config.model_type).norm(config.hidden_size, config.rms_norm_eps)
    norm.load_state_dict({"weight": weight}, assign=True)
    return norm


def projections(index: int, layer: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The projections of decoder layer `index`, each with the checkpoint name of its weight."""
    for name in (*ATTENTION, *MLP):
        yield layer_name(index, f"{name}.weight"), layer.get_submodule(name)


def cuts(tensor: SourceTensor) -> Iterator[tuple[int, int]]:
    """Where a tensor's rows are cut when they are read a few at a time: start and stop of each part."""
    step = max(1, _STEP // int(np.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], step):
        yield start, min(tensor.shape[0], start + step)


def float32_bytes(tensors: Mapping[str, SourceTensor]) -> int:
    """Bytes of all values in float32, in which they are computed with."""
    return sum(int(np.prod(tensor.shape)) * 4 for tensor in tensors.values())


def _window_mask(length: int, window: int | None) -> torch.Tensor | None:
    """True where a query sees a key, [1, 1, length, length]; None where it sees all before it, which sdpa knows."""
    if window is None or window >= length:
        return None
    return torch.ones((1, 1, length, length), dtype=torch.bool).tril().triu(1 - window)
