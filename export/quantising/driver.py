"""The way of a calibrated method through a model: one decoder layer in memory, two streams of hidden states.

The original stream passes through the checkpoint's weights. The quantised one passes through what has been quantised so
far, so that every matrix is quantised for inputs that have the errors of those before it, in the order of a layer's
work: q, k and v; o; gate and up; down (the "true sequential" of GPTQ's published code, arXiv:2210.17323). Of both only
the hidden states between layers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...optimize.equivalence import Seam, scaled
from ...optimize.formats import EMBEDDING, FP32
from ...optimize.overlay import ours, rounded_by, searched
from ...optimize.quantise import dequantise, stored_values
from ...optimize.tensors import Float32, SourceTensor
from ...progress import Progress
from ..config import transformers_config
from ..layerwise import Texts
from ..memory import give_back
from .device import device_for, exact_arithmetic
from .head import solved_head
from .layer import PIECE, Hidden, Kept, LayerRun, Place, is_whole, kept_error, kept_scales
from .run import Run
from .stored_codes import fits, kept_tensor
from .work import WorkFolder

_HEAD = "head"
_ORIGINAL, _QUANTISED = "original", "quantised"


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint with the codes of a calibrated method, which are read from the work folder as long as that is there.

    tensors: as `Source.tensors`, so also to be read from several threads. errors: of each decoder layer, how far the
    hidden states that it leaves are from the unquantised model's over the text: the root mean square of the differences
    over that of the states. taken_over: layers that an interrupted build had finished.
    """

    tensors: Mapping[str, SourceTensor]
    errors: tuple[float, ...]
    taken_over: int = 0


def calibrated(run: Run, work: WorkFolder, progress: Progress) -> Calibrated:
    """Quantise every matrix whose format is blocks of integers and that does not keep codes of its own, and keep each
    layer in `work` as soon as it is done. What is there already is taken over.

    Memory: one decoder layer in float32, the sums of products for one matrix with what the solver makes of them, and
    the hidden states of the text two to three times, five where the method asks for `cross`. Raises LlamaExportError
    where weights or activations are not finite, and where the disk is full.
    """
    with exact_arithmetic():
        return _Pass(run, work, progress).run()


class _Pass:
    """One pass over the weights."""

    def __init__(self, run: Run, work: WorkFolder, progress: Progress) -> None:
        self._run, self._work, self._progress = run, work, progress
        config = transformers_config(run.source.config)
        texts = Texts(config, run.context, run.text.sequences)
        self._place = Place(config, texts, device_for(*_sizes(run)))
        self._layers = run.source.shape.layers
        self._kept = [self._found(index) for index in range(self._layers)]
        self._taken_over = sum(kept is not None for kept in self._kept)

    def run(self) -> Calibrated:
        head = self._found_head()
        if self._taken_over:
            self._progress.stage(f"Going on after {self._taken_over} layers that an interrupted build finished")
        self._progress.stage(self._title)
        if None in self._kept or (head is None and self._run.head is not None):
            head = self._compute(head)
        self._progress.count(self._layers + 1, self._layers + 1)
        kept = [one for one in self._kept if one is not None]
        return Calibrated(self._overlay(kept, head), tuple(map(kept_error, kept)), self._taken_over)

    @property
    def _title(self) -> str:
        on = " on the GPU" if self._place.device.type == "cuda" else ""
        return f"Quantising {self._layers} layers by {self._run.method.name} over {self._run.text.tokens:,} tokens{on}"

    def _compute(self, head: Kept | None) -> Kept | None:
        """Make what is missing; returns the head, where it is made."""
        first, original, quantised = self._streams()
        for index in range(first, self._layers):
            self._layer(index, original, quantised)
            give_back()
            self._progress.count(index + 1, self._layers + 1, first)
        if head is not None or self._run.head is None:
            return head

        def advance(share: float) -> None:
            self._progress.count(self._layers + share, self._layers + 1, first)

        made = self._work.save(_HEAD, solved_head(self._run, self._place, original, quantised, advance))
        self._work.remove(_states(self._layers - 1))
        return made

    def _layer(self, index: int, original: Hidden, quantised: Hidden) -> None:
        """Take a layer over, or make it and keep it; then keep where both streams are."""
        kept = self._kept[index]
        arrays = LayerRun(self._run, self._place, index, kept).run(original, quantised)
        if kept is None:
            self._kept[index] = self._work.save(_layer(index), arrays)
        if index + 1 < self._layers or self._run.head is not None:
            states = {_ORIGINAL: torch.cat(original, 1)[0].numpy(), _QUANTISED: torch.cat(quantised, 1)[0].numpy()}
            self._work.save(_states(index), states)
        self._work.remove(_states(index - 1))

    def _found(self, index: int) -> Kept | None:
        kept = self._work.find(_layer(index))
        return kept if kept is not None and is_whole(self._run, index, kept) else None

    def _found_head(self) -> Kept | None:
        name, kept = self._run.head, self._work.find(_HEAD)
        if name is None or kept is None:
            return None
        return kept if fits(kept, name, self._run.source.tensors[name].shape, self._run.formats[name]) else None

    def _streams(self) -> tuple[int, Hidden, Hidden]:
        """The first layer that is to be run, and the hidden states before it: those that were kept, where all layers
        before are whole, else the text's.
        """
        whole = next((index for index, kept in enumerate(self._kept) if kept is None), self._layers)
        lengths = [len(sequence) for sequence in self._run.text.sequences]
        shape = (sum(lengths), self._run.source.shape.hidden)
        for index in reversed(range(whole)):
            found = self._work.find(_states(index)) or {}
            streams = [found.get(name) for name in (_ORIGINAL, _QUANTISED)]
            if all(one is not None and (one.dtype, one.shape) == ("F32", shape) for one in streams):
                original, quantised = (_cut(one.floats(0, shape[0]), lengths) for one in streams if one is not None)
                return index + 1, original, quantised
        return 0, self._embedded(stored=False), self._embedded(stored=True)

    def _embedded(self, *, stored: bool) -> Hidden:
        """What the embedding gives of each sequence. stored: as the bundle stores it. One that is the head too gets its
        codes at the end; until then data-free ones stand for them, whose errors are of the same size.
        """
        tensor, format = self._run.source.tensors[EMBEDDING], self._run.formats[EMBEDDING]
        sequences, dtype = self._run.text.sequences, self._run.scale_dtype
        tokens = np.unique(np.concatenate([np.asarray(sequence) for sequence in sequences]))
        rows = np.concatenate([tensor.read(int(token), int(token) + 1) for token in tokens])
        if stored and ours(tensor, format):
            data_free = self._run.data_free
            blocks = rounded_by(lambda asked: data_free.rows(EMBEDDING, rows, asked), format, dtype)
            rows = dequantise(blocks, tensor.shape[1])
        elif stored and format != FP32:
            each = [stored_values(tensor, format, int(token), int(token) + 1, dtype) for token in tokens]
            rows = np.concatenate(each)
        places = np.searchsorted(tokens, np.concatenate([np.asarray(sequence) for sequence in sequences]))
        return _cut(rows[places], [len(sequence) for sequence in sequences])

    def _overlay(self, layers: list[Kept], head: Kept | None) -> dict[str, SourceTensor]:
        run, scales, solved = self._run, dict[Seam, Float32](), dict[str, Kept]()
        for index, kept in enumerate(layers):
            scales |= kept_scales(run, index, kept)
            solved |= {name: kept for name in run.layer(index) if run.solves(name)}
        if head is not None and run.head is not None:
            solved[run.head] = head
        moved = scaled(run.source.tensors, scales)

        def tensor(name: str, other: SourceTensor) -> SourceTensor:
            if name not in solved:
                return other
            before = None if moved[name] is run.source.tensors[name] else moved[name]
            return kept_tensor(solved[name], other, run.formats[name], run.method.told, before)

        others = searched(moved, run.formats, run.data_free.rows, run.scale_dtype)
        return {name: tensor(name, other) for name, other in others.items()}


def _layer(index: int) -> str:
    return f"layer-{index:04}"


def _states(index: int) -> str:
    return f"states-{index:04}"


def _cut(rows: Float32, lengths: list[int]) -> Hidden:
    """Rows [tokens, hidden] by sequence, in memory that PyTorch aligns."""
    return [part.clone()[None] for part in torch.split(torch.from_numpy(rows), lengths)]


def _sizes(run: Run) -> tuple[int, int]:
    """Bytes of a layer in float32, or of what is solved of the head at a time, and columns of the widest matrix."""
    shapes = [tensor.shape for tensor in run.layer(0).values()]
    return 4 * max(sum(map(math.prod, shapes)), PIECE), max(shape[-1] for shape in shapes)
