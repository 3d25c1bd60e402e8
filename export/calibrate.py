"""Calibration: what enters projections over a text, by transformers' own layers, how far it is smoothed, and the scales
by which it is rounded.

TensorRT takes static scales of 8-bit activations (NVIDIA's TensorRT documentation, "Working with Quantized Types"): one
a tensor, fixed when the graph is made. Its parsers know no DynamicQuantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from ..errors import LlamaExportError
from ..optimize.equivalence import Seam, last_seams, seams_of
from ..optimize.formats import FP16, INT8_ROW, Format
from ..optimize.plan import head_of
from ..optimize.tensors import Float32, SourceTensor
from ..optimize.trt.linear import InputScale
from ..progress import Progress
from .calibration_text import CalibrationText
from .config import ModelShape, transformers_config
from .layerwise import Layerwise, Parts, cuts, float32_bytes, projections
from .smooth import TOKENS, Rows, Seen, Smoothed, in_parts, input_scale, smooth
from .source import Source

_DTYPES = {"int": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
"""By a format's coding: the dtype that inputs are rounded to."""

MOST_NOISE = 0.03
"""Of the products of a typical token that are made of 8-bit integers, over their own size: more, and neither the input
nor the weights are rounded.

With one scale a tensor a few tokens decide for all. Llamas have massive activations (arXiv:2402.17762): at the first
token the input of some down_proj is a thousand times larger than at others, and smoothing takes only a part of that.
"""

_STEP = 1 << 20
"""Values of a matrix that are rounded at a time."""


@dataclass(frozen=True)
class Calibration:
    """What enters each projection, by the checkpoint name of its weight; that of the head is the embedding's where they
    are one.

    amax: the largest magnitude, finite and not below zero, once `factors` have been moved. noise: of those that are
    rounded, see `smooth.Smoothed`; factors: by which `optimize.equivalence.scaled` smooths the model.
    """

    text: CalibrationText
    amax: Mapping[str, float]
    noise: Mapping[str, float]
    factors: Mapping[Seam, Float32]


@dataclass(frozen=True)
class _Input:
    """What the projections with these weights read, all the same. seam: through which it can be scaled."""

    names: tuple[str, ...]
    seam: Seam | None


@dataclass
class _Watched:
    """What has been seen and decided. every: of so many tokens one is kept, as long as their layer is there."""

    tensors: Mapping[str, SourceTensor]
    shape: ModelShape
    formats: Mapping[str, Format]
    every: int
    amax: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    factors: dict[Seam, Float32] = field(default_factory=dict)
    seen: dict[_Input, Seen] = field(default_factory=dict)
    passed_bytes: int = 0

    def parts(self, name: str) -> Parts:
        """The tensor's rows as the checkpoint has them."""
        for start, stop in cuts(self.tensors[name]):
            rows = self.tensors[name].read(start, stop)
            yield start, rows
            self.passed_bytes += rows.size * 4

    def note(self, entering: _Input, values: torch.Tensor) -> None:
        """`values` [tokens, columns] of a sequence enter."""
        if not math.isfinite(values.abs().max().item()):
            raise LlamaExportError(
                f"The input of {entering.names[0]} is not finite in float32, so it cannot be calibrated; the "
                "checkpoint is damaged, download or copy it again."
            )
        self.seen.setdefault(entering, Seen.nothing(values.shape[-1])).add(values, self.every)

    def hook(self, entering: _Input) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _module, inputs: self.note(entering, inputs[0].flatten(0, -2))

    def watch(self, index: int, layer: torch.nn.Module) -> None:
        """Note what enters the projections of decoder layer `index`."""
        modules = dict(projections(index, layer))
        for seam in seams_of(self.tensors, self.shape, index):
            modules[seam.consumers[0]].register_forward_pre_hook(self.hook(_Input(seam.consumers, seam)))

    def settle(self, matrix: Callable[[str], Rows]) -> None:
        """All that there is of these inputs has been noted: smooth them, and forget the tokens. matrix: the rows of a
        weight.
        """
        for entering, seen in self.seen.items():
            self.amax |= dict.fromkeys(entering.names, float(seen.whole.max()))
            names = [name for name in entering.names if _rounds(self.formats[name])]
            if names:
                seam = entering.seam if len(names) == len(entering.names) else None
                found = smooth(seam, seen, [matrix(name) for name in names], self.formats[names[0]])
                self._decide(names, seam, found)
        self.seen.clear()

    def _decide(self, names: Sequence[str], seam: Seam | None, found: Smoothed) -> None:
        self.noise |= dict.fromkeys(names, found.noise)
        if not _too_coarse(found.noise, self.formats[names[0]]):
            self.amax |= dict.fromkeys(names, found.amax)
            if seam is not None and found.factors is not None:
                self.factors[seam] = found.factors


def _rounds(format: Format) -> bool:
    """Whether inputs are rounded beside weights in `format`: those with one 8-bit scale a row, so that the product is
    one of 8-bit numbers.
    """
    return format.whole and format.coding in _DTYPES


def _too_coarse(noise: float, format: Format) -> bool:
    return format == INT8_ROW and noise > MOST_NOISE


@torch.no_grad()
def calibrate(
    source: Source, text: CalibrationText, context: int, formats: Mapping[str, Format], progress: Progress
) -> Calibration:
    """Run the model over `text` in float32 with the weights that the checkpoint has (adapters that are merged into
    `source` included), one decoder layer in memory, note what enters each projection, and smooth what is rounded.

    context: of the bundle. formats: of weights, by checkpoint name. Raises LlamaExportError where an input is not
    finite, naming the projection.
    """
    tensors, total = source.tensors, float32_bytes(source.tensors)
    watched = _Watched(tensors, source.shape, formats, max(1, text.tokens // TOKENS))
    model = Layerwise(transformers_config(source.config), tensors, context, watched.parts)

    def end(index: int, layer: torch.nn.Module) -> None:
        modules = dict(projections(index, layer))
        watched.settle(lambda name: lambda: in_parts(modules[name].get_parameter("weight"), _STEP))
        progress.advance(watched.passed_bytes, total)

    hidden = model.decoded(text.sequences, watched.watch, end=end)
    head = _Input((head_of(tensors),), next(iter(last_seams(tensors, source.shape)), None))
    for state in hidden:
        watched.note(head, model.normed(state[0]))
    watched.settle(lambda name: lambda: (torch.from_numpy(rows) for _, rows in watched.parts(name)))
    progress.advance(total, total)
    return Calibration(text, watched.amax, watched.noise, watched.factors)


def settled_formats(
    calibration: Calibration, formats: Mapping[str, Format], instead: Format = FP16
) -> dict[str, Format]:
    """`formats` where projections whose products would lose too much as int8 (`MOST_NOISE`) are stored as `instead` of
    "int8-row", and so read their input as it is.
    """
    noise = calibration.noise
    return {name: instead if _too_coarse(noise.get(name, 0.0), format) else format for name, format in formats.items()}


def input_scales(calibration: Calibration, formats: Mapping[str, Format]) -> dict[str, InputScale]:
    """How inputs of projections are rounded, by weight: to `smooth.input_scale` times 8-bit numbers beside weights in
    "int8-row" and "fp8". The others multiply what they read as it is.
    """
    return {
        name: InputScale(input_scale(amax, formats[name]), _DTYPES[formats[name].coding])
        for name, amax in calibration.amax.items()
        if _rounds(formats[name])
    }
