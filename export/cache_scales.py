"""The scales of a cache in int8: how large keys and values become over a text, for each channel, by transformers' own
layers.

Keys are cached after the rotary embedding, which turns two channels at a time by the token's position: in a short text
a slow pair has seen few angles. The length of the pair is the same at every position, so both channels get the scale of
the longest. Every second sequence is cut into short pieces, since the first token of a text has keys of its own (the
attention sink, arXiv:2309.17453), and they differ with the token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import LlamaExportError
from ..optimize.graph import past_name
from ..optimize.tensors import Float32
from ..progress import Progress
from .calibration_text import CalibrationText
from .config import transformers_config
from .layerwise import KeptCache, Layerwise, Parts, cuts, float32_bytes
from .source import Source

PIECE = 64
"""Tokens of a piece, so that many tokens come first."""

MARGIN = 1.25
"""Room above what the text reaches: one key that is cut off costs more than steps that are a quarter larger. SmolLM2 on
512 tokens of WikiText: KL 0.0038 without, its largest at one position 0.84; with it 0.0024 and 0.04.
"""

_LARGEST = 127
_LEAST = 1e-6
"""The smallest scale, of a channel that stays zero."""


class _Longest(KeptCache):
    """Keeps of every layer the longest pair of channels of keys and the largest values, [kv_heads, head_dim] each."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, torch.Tensor] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *rest: object, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values: [1, kv_heads, length, head_dim]; the first of `rest` is the layer's number."""
        layer = rest[0]
        assert isinstance(layer, int)
        low, high = keys.chunk(2, dim=-1)
        pairs = torch.hypot(low, high)
        self._note(past_name(layer, "key"), torch.cat([pairs, pairs], dim=-1))
        self._note(past_name(layer, "value"), values.abs())
        return keys, values

    def _note(self, name: str, sizes: torch.Tensor) -> None:
        found = sizes[0].amax(dim=1)
        before = self.largest.get(name)
        self.largest[name] = found if before is None else torch.maximum(before, found)


def cache_scales(
    source: Source, text: CalibrationText, context: int, head_dim: int, progress: Progress
) -> dict[str, Float32]:
    """Scales of keys and values, float32 [1, kv_heads, 1, head_dim], by `past_key_values.N.key|value`: the largest
    times `MARGIN` over 127.

    Runs the model over `text` in float32, one decoder layer in memory. context: of the
    bundle; head_dim: of its cache, whose padding of zeros has scales of 1. Raises LlamaExportError where a key or value
    is not finite, naming the layer.
    """
    total, passed, longest = float32_bytes(source.tensors), 0, _Longest()

    def parts(name: str) -> Parts:
        nonlocal passed
        for start, stop in cuts(source.tensors[name]):
            rows = source.tensors[name].read(start, stop)
            yield start, rows
            passed += rows.size * 4

    sequences = _pieces(text.sequences, source)
    model = Layerwise(transformers_config(source.config), source.tensors, context, parts)
    model.decoded(sequences, lambda *_: progress.advance(passed, total), [longest] * len(sequences))
    progress.advance(total, total)
    return {name: _scale(name, found.numpy(), head_dim) for name, found in longest.largest.items()}


def _pieces(sequences: Sequence[Sequence[int]], source: Source) -> list[tuple[int, ...]]:
    """The sequences, every second one cut shorter, each piece with what the tokenizer puts before a text."""
    before = (source.tokens.bos,) if source.tokens.add_bos and source.tokens.bos is not None else ()
    pieces = [
        (*before, *sequence[start : start + PIECE])
        for sequence in sequences[::2]
        for start in range(len(before), len(sequence), PIECE)
    ]
    return [*pieces, *map(tuple, sequences[1::2])]


def _scale(name: str, largest: Float32, head_dim: int) -> Float32:
    if not math.isfinite(float(largest.max())):
        raise LlamaExportError(
            f"Numbers for {name} are not finite in float32, so its scales cannot be calibrated; the checkpoint is "
            "damaged, download or copy it again."
        )
    scale = np.ones((1, len(largest), 1, head_dim), np.float32)
    scale[0, :, 0, : largest.shape[1]] = np.maximum(largest * np.float32(MARGIN / _LARGEST), np.float32(_LEAST))
    return scale
