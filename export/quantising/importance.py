"""What a data-free method knows of a model: factors that make columns alike, and what each column of a matrix counts
for: the squares of what it multiplies while the model reads tokens that are drawn at random.

A squared error in a weight costs what the square of its input is worth, and channels differ by orders of magnitude.
Which are large is a matter of the weights before (norms, outlier channels, the products of an MLP's gates) more than of
the text: on SmolLM2-135M in 4 bits random tokens were worth nearly as much as real ones (docs/quantisation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ...optimize.equivalence import Factors, Seam, factors_of, seams_of
from ...optimize.formats import Format
from ...optimize.plan import head_of
from ...optimize.quantisers.equalise import Sizes, column_sizes, equalised, read_sizes
from ...optimize.tensors import Float32, SourceTensor
from ...progress import Progress
from ..config import transformers_config
from ..layerwise import Layerwise, Parts, cuts, float32_bytes, layer_name, projections
from ..source import Source
from .run import movable
from .statistics import not_finite, token_weights

TOKENS, LENGTH = 512, 128
"""Tokens in all, and of a sequence: of SmolLM2's loss, more tokens changed less than a fiftieth."""

_SEED = 20_240_601


def random_tokens(source: Source, context: int) -> list[list[int]]:
    """Sequences of `TOKENS` tokens in all, each begun as the tokenizer begins a text; the same for the same model."""
    length, draw = max(1, min(LENGTH, context)), np.random.default_rng(_SEED)
    bos = source.tokens.bos if source.tokens.add_bos else None
    sequences = draw.integers(0, source.shape.vocab, (-(-TOKENS // length), length)).tolist()
    return [sequence if bos is None else [bos, *sequence[1:]] for sequence in sequences]


@dataclass(frozen=True)
class Known:
    """scales: factors to be moved at seams, see `optimize.equivalence`. importances: of each matrix that multiplies, by
    checkpoint name, what its columns count for once they are moved: float32 [columns], 1 on average.
    """

    scales: Mapping[Seam, Float32]
    importances: Mapping[str, Float32]


@dataclass
class _Watched:
    """Sums over tokens of the squares of what each matrix reads; of the layer that runs also what o and down read,
    which count for less where the hidden states that they add to are large.
    """

    tensors: Mapping[str, SourceTensor]
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    waiting: dict[str, torch.Tensor] = field(default_factory=dict)
    passed_bytes: int = 0

    def parts(self, name: str) -> Parts:
        """The tensor's rows as the checkpoint has them."""
        for start, stop in cuts(self.tensors[name]):
            rows = self.tensors[name].read(start, stop)
            yield start, rows
            self.passed_bytes += rows.size * 4

    def watch(self, index: int, layer: torch.nn.Module) -> None:
        for name, module in projections(index, layer):
            module.register_forward_pre_hook(lambda _, inputs, name=name: self.waiting.__setitem__(name, inputs[0]))
        layer.register_forward_hook(lambda _, __, left: self.settle(left))

    def settle(self, left: torch.Tensor) -> None:
        """A sequence has passed a layer, which `left` these hidden states."""
        weights = token_weights(left)
        for name, read in self.waiting.items():
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            self.add(name, read, weights if adds else torch.ones_like(weights))
        self.waiting.clear()

    def add(self, name: str, read: torch.Tensor, weights: torch.Tensor) -> None:
        squares = weights.flatten() @ read.flatten(0, -2).square()
        if not squares.isfinite().all():
            raise not_finite(name)
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares


def known(
    source: Source, formats: Mapping[str, Format], context: int, progress: Progress, *, scaling: bool = True
) -> Known:
    """Run the model in float32, one decoder layer in memory. scaling: whether factors may move between tensors.

    Raises LlamaExportError where an input is not finite.
    """
    watched, total = _Watched(source.tensors), float32_bytes(source.tensors)
    sizes: dict[Seam, torch.Tensor] = {}
    model = Layerwise(transformers_config(source.config), source.tensors, context, watched.parts)

    def begin(index: int, layer: torch.nn.Module) -> None:
        progress.advance(watched.passed_bytes, total)
        if scaling and movable(source.tensors, formats, index):
            values = {layer_name(index, name): value.detach() for name, value in layer.named_parameters()}
            sizes.update({seam: column_sizes(seam, values) for seam in seams_of(source.tensors, source.shape, index)})
        watched.watch(index, layer)

    hidden = model.decoded(random_tokens(source, context), begin)
    normed = model.normed(torch.cat([state[0] for state in hidden]))
    watched.add(head_of(source.tensors), normed, torch.ones(len(normed)))
    progress.advance(total, total)
    scales = {
        seam: equalised(
            Sizes(columns, read_sizes(seam, watched.sums[seam.consumers[0]])),
            [formats[name] for name in seam.consumers],
        )
        for seam, columns in sizes.items()
    }
    moved = factors_of(scales)
    return Known(scales, {name: _relative(sums, moved.get(name)) for name, sums in watched.sums.items()})


def _relative(sums: torch.Tensor, moved: Factors | None) -> Float32:
    """1 on average, and nowhere less than a millionth: a channel that random tokens never use may be used."""
    if moved is not None and moved.columns is not None:
        sums = sums / torch.from_numpy(moved.columns).square()
    mean = sums.mean()
    if not mean > 0:
        return np.ones(len(sums), np.float32)
    values: Float32 = (sums / mean).clamp(min=1e-6).numpy()
    return values
