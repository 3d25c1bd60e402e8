"""Calibration: the largest magnitudes that the inputs of projections reach over a text, by transformers' own layers.

TensorRT takes static scales of 8-bit activations (NVIDIA's TensorRT documentation, "Working with Quantized Types"): one
a tensor, fixed when the graph is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from ..errors import LlamaExportError
from ..optimize.formats import FP16, INT8_ROW, Format
from ..optimize.plan import head_of
from ..optimize.tensors import SourceTensor
from ..optimize.trt.linear import InputScale
from ..progress import Progress
from .calibration_text import CalibrationText
from .config import transformers_config
from .layerwise import Layerwise, Parts, cuts, float32_bytes, projections
from .source import Source

LEAST_SCALE = 2.0**-14
"""The smallest normal float16: graphs hold scales in the dtype of activations, where smaller ones lose digits, and one
divided by them is infinite.
"""

_LARGEST = {"int": (ir.DataType.INT8, 127), "fp8": (ir.DataType.FLOAT8E4M3FN, 448)}
"""By a format's coding: the dtype that inputs are rounded to, and its largest number."""

MOST_NOISE = 0.05
"""Of an input that is rounded to int8, over its own size: more, and it is not rounded at all.

With one scale a tensor a few tokens decide for all. Llamas have massive activations (arXiv:2402.17762): at the first
token the input of some down_proj is a thousand times larger than at others, which all round to nothing.
"""


@dataclass(frozen=True)
class Calibration:
    """What enters each projection, by the checkpoint name of its weight; that of the head is the embedding's where they
    are one.

    amax: the largest magnitude, finite and not below zero. typical: of a token in the middle of all, the root of the
    mean of squares.
    """

    text: CalibrationText
    amax: Mapping[str, float]
    typical: Mapping[str, float]

    def int8_noise(self, name: str) -> float:
        """What rounding to int8 adds to a typical token over its size: a step makes errors of step / sqrt(12)."""
        step = self.amax[name] / 127
        return step / math.sqrt(12) / self.typical[name] if self.typical[name] else math.inf


@dataclass
class _Watched:
    """What has been seen: of inputs what `Calibration` says, of weights the bytes in float32.

    sizes: of each token, of the inputs in the layer that runs.
    """

    tensors: Mapping[str, SourceTensor]
    amax: dict[str, float] = field(default_factory=dict)
    typical: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    passed_bytes: int = 0

    def parts(self, name: str) -> Parts:
        """The tensor's rows as the checkpoint has them."""
        for start, stop in cuts(self.tensors[name]):
            rows = self.tensors[name].read(start, stop)
            yield start, rows
            self.passed_bytes += rows.size * 4

    def note(self, name: str, values: torch.Tensor) -> None:
        """`values` enter the projection with this weight."""
        largest = values.abs().max().item()
        if not math.isfinite(largest):
            raise LlamaExportError(
                f"The input of {name} is not finite in float32, so it cannot be calibrated; the checkpoint is damaged, "
                "download or copy it again."
            )
        self.amax[name] = max(self.amax.get(name, 0.0), largest)
        self.sizes.setdefault(name, []).append(values.square().mean(-1).sqrt().flatten())

    def settle(self) -> None:
        """All of a layer has been noted. Little tensors that stay would keep its memory in pieces."""
        self.typical |= {name: torch.cat(sizes).median().item() for name, sizes in self.sizes.items()}
        self.sizes.clear()

    def hook(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _module, inputs: self.note(name, inputs[0])


def calibrate(source: Source, text: CalibrationText, context: int, progress: Progress) -> Calibration:
    """Run the model over `text` in float32 with the weights that the checkpoint has (adapters that are merged into
    `source` included), one decoder layer in memory, and note the largest magnitude of each projection's input.

    context: of the bundle. Raises LlamaExportError where an input is not finite, naming the projection.
    """
    watched, total = _Watched(source.tensors), float32_bytes(source.tensors)
    model = Layerwise(transformers_config(source.config), source.tensors, context, watched.parts)

    def begin(index: int, layer: torch.nn.Module) -> None:
        progress.advance(watched.passed_bytes, total)
        watched.settle()
        for name, module in projections(index, layer):
            module.register_forward_pre_hook(watched.hook(name))

    hidden = model.decoded(text.sequences, begin)
    watched.note(head_of(source.tensors), model.normed(torch.cat([state[0] for state in hidden])))
    progress.advance(total, total)
    watched.settle()
    return Calibration(text, watched.amax, watched.typical)


def settled_formats(
    calibration: Calibration, formats: Mapping[str, Format], instead: Format = FP16
) -> dict[str, Format]:
    """`formats` where projections whose input would lose too much as int8 (`MOST_NOISE`) are stored as `instead` of
    "int8-row", and so read it as it is.
    """
    coarse = {
        name for name in calibration.amax if formats[name] == INT8_ROW and calibration.int8_noise(name) > MOST_NOISE
    }
    return {name: instead if name in coarse else format for name, format in formats.items()}


def input_scales(calibration: Calibration, formats: Mapping[str, Format]) -> dict[str, InputScale]:
    """How inputs of projections are rounded, by weight: those whose weights have one 8-bit scale a row ("int8-row",
    "fp8"), so that the product is one of 8-bit numbers. The others multiply what they read as it is.

    scale: what calibration found over the largest number of the dtype, at least `LEAST_SCALE`, rounded to float16, so
    that graphs with scales of either size and the reference hold the same number.
    """
    scales = {}
    for name, amax in calibration.amax.items():
        format = formats[name]
        if format.whole and format.coding in _LARGEST:
            dtype, largest = _LARGEST[format.coding]
            scales[name] = InputScale(float(np.float16(max(amax / largest, LEAST_SCALE))), dtype)
    return scales
