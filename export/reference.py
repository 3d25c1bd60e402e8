"""PyTorch's side of the proof: transformers' own layers on exactly the weights that the bundle stores, one layer in
memory.

Weights are read from the checkpoint and converted again, not read back from the bundle: what the writer did wrong
shows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedConfig

from ..optimize.formats import EMBEDDING, HEAD, Format
from ..optimize.quantise import stored_values
from ..optimize.tensors import Float32, SourceTensor
from ..progress import Progress
from ..runtime.reference import fingerprint
from .families import classes
from .lora.peft_folder import LowRank
from .rotary import rotary_embedding
from .trace import window_of

_STEP = 1 << 22
"""Values that are dequantised at a time."""


@dataclass
class ExactModel:
    """A model in float32 whose weights are those of a bundle: `formats` applied to `tensors`, scales in `scale_dtype`.

    context: of the bundle, for which the frequencies of the dynamic rope type are fixed. added: what an adapter adds to
    stored weights, its matrices in `scale_dtype` too.
    fingerprints: of every tensor that was used, by name: sha256 and norm of its dequantised values.
    """

    config: PreTrainedConfig
    tensors: Mapping[str, SourceTensor]
    formats: Mapping[str, Format]
    scale_dtype: npt.DTypeLike
    context: int
    added: Mapping[str, LowRank] = field(default_factory=dict)
    fingerprints: dict[str, tuple[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = copy.deepcopy(self.config)
        self.config._attn_implementation = "sdpa"
        self._classes = classes(self.config.model_type)

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[int]], progress: Progress) -> list[Float32]:
        """The logits [length, vocab] after each token of each sequence, all sequences in one pass over the weights."""
        total = sum(int(np.prod(tensor.shape)) for tensor in self.tensors.values()) * 4
        hidden = self._embed(sequences)
        rotary = rotary_embedding(self.config, self.context)
        positions = [torch.arange(len(sequence))[None] for sequence in sequences]
        angles = [rotary(state, position) for state, position in zip(hidden, positions, strict=True)]
        masks = [_window_mask(len(sequence), window_of(self.config)) for sequence in sequences]
        for index in range(self.config.num_hidden_layers):
            progress.advance(self._used_bytes(), total)
            layer = self._layer(index)
            hidden = [
                layer(state, attention_mask=mask, position_embeddings=angle, position_ids=position)
                for state, mask, angle, position in zip(hidden, masks, angles, positions, strict=True)
            ]
        progress.advance(self._used_bytes(), total)
        logits = self._head(torch.cat([state[0] for state in hidden]))
        progress.advance(total, total)
        return np.split(logits, np.cumsum([len(sequence) for sequence in sequences])[:-1])

    def _embed(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The embedding's rows of each sequence, [1, length, hidden]; the whole table passes by for its fingerprint."""
        wanted = np.unique(np.concatenate([np.asarray(sequence) for sequence in sequences]))
        rows: dict[int, Float32] = {}

        def passing() -> Iterator[Float32]:
            for start, part in self._parts(EMBEDDING):
                for token in wanted[(wanted >= start) & (wanted < start + len(part))]:
                    rows[int(token)] = part[token - start].copy()
                yield part

        self.fingerprints[EMBEDDING] = fingerprint(passing())
        return [torch.from_numpy(np.stack([rows[token] for token in sequence]))[None] for sequence in sequences]

    def _layer(self, index: int) -> torch.nn.Module:
        with torch.device("meta"):
            layer: torch.nn.Module = self._classes.layer(self.config, index)
        prefix = f"model.layers.{index}."
        state = {name: self._whole(prefix + name) for name in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        return layer.eval()

    def _head(self, hidden: torch.Tensor) -> Float32:
        with torch.device("meta"):
            norm: torch.nn.Module = self._classes.norm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self._whole("model.norm.weight")}, assign=True)
        normed = norm(hidden)
        name = HEAD if HEAD in self.tensors else EMBEDDING
        logits = np.empty((len(hidden), self.config.vocab_size), np.float32)

        def passing() -> Iterator[Float32]:
            for start, part in self._parts(name):
                logits[:, start : start + len(part)] = (normed @ torch.from_numpy(part).T).numpy()
                yield part

        self.fingerprints[name] = fingerprint(passing())
        return logits

    def _whole(self, name: str) -> torch.Tensor:
        parts = [part for _, part in self._parts(name)]
        self.fingerprints[name] = fingerprint(iter(parts))
        return torch.from_numpy(np.concatenate(parts))

    def _parts(self, name: str) -> Iterator[tuple[int, Float32]]:
        """The tensor's dequantised rows, from the first row on, a few at a time."""
        tensor, format = self.tensors[name], self.formats[name]
        step = max(1, _STEP // int(np.prod(tensor.shape[1:])))
        for start in range(0, tensor.shape[0], step):
            stop = min(tensor.shape[0], start + step)
            rows = stored_values(tensor, format, start, stop, self.scale_dtype)
            if name in self.added:
                rows = rows + self.added[name].delta(start, stop, self.scale_dtype)
            yield start, np.ascontiguousarray(rows)

    def _used_bytes(self) -> int:
        return sum(int(np.prod(self.tensors[name].shape)) * 4 for name in self.fingerprints)


def _window_mask(length: int, window: int | None) -> torch.Tensor | None:
    """True where a query sees a key, [1, 1, length, length]; None where it sees all before it, which sdpa knows."""
    if window is None or window >= length:
        return None
    return torch.ones((1, 1, length, length), dtype=torch.bool).tril().triu(1 - window)
