"""GPTQ, as AutoGPTQ, GPTQModel and others store it (https://github.com/AutoGPTQ/AutoGPTQ, `QuantLinear.pack`).

qweight  int32 [inputs * bits / 32, outputs]   packed along the inputs
qzeros   int32 [groups, outputs * bits / 32]   packed along the outputs; less one, except in `gptq_v2`
scales   float [groups, outputs]
g_idx    int32 [inputs]                        the group of each input, not in order where desc_act is true
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import LlamaExportError
from ...optimize.tensors import Float32, UInt8
from ..safetensors_file import StoredTensor, to_floats
from .grouped import GroupedMatrix, Groups
from .modules import FLOATING, WHOLE, Module
from .packing import UNIT, packed_words, unpack
from .stripes import Columns, Stripes

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
_ONES = {2: np.uint32(0x55555555), 4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}
"""A one in each number of a word."""
_STEP = 1 << 20
"""Zero points looked at in one go."""


@dataclass(frozen=True)
class GptqSettings:
    """What config.json says: less_one: stored zero points are less by one; symmetric: all are said to be in the middle;
    groups: the columns of a group, where one is named; sorted: columns are said to be in an order of importance.
    """

    less_one: bool
    symmetric: bool
    groups: tuple[int, ...]
    sorted: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> GptqSettings:
        """Read them out of a quantization_config of GPTQ."""
        size = settings.get("group_size")
        return cls(
            less_one=_format(settings) == "gptq",
            # gptqmodel's `dynamic` may say otherwise for some modules.
            symmetric=settings.get("sym") is True and not settings.get("dynamic"),
            groups=(size,) if type(size) is int else (),
            sorted=settings.get("desc_act") is True,
        )


def variant_problem(settings: Mapping[str, Any]) -> str | None:
    """Why a quantization_config of GPTQ is not read, as the middle of a sentence; None when it is."""
    if settings.get("is_marlin_format"):
        return "in the format 'marlin'; gptq and gptq_v2 are read"
    if _format(settings) not in ("gptq", "gptq_v2"):
        return f"in the format {_format(settings)!r}; gptq and gptq_v2 are read"
    if settings.get("bits") not in BITS:
        return f"in {settings.get('bits')!r} bits; {', '.join(map(str, BITS))} are read"
    return None


def _format(settings: Mapping[str, Any]) -> str:
    found = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    return str(found).lower()[:40]


def read_gptq(module: Module, settings: GptqSettings, stripes: Stripes) -> GroupedMatrix:
    """The weight that a module's parts stand for.

    Raises LlamaExportError when they are missing or contradict config.json or each other.
    """
    outputs, inputs = module.shape
    packed = module.part("qweight", WHOLE)
    bits = _bits(module, packed)
    scales = module.part("scales", FLOATING)
    if len(scales.shape) != 2 or scales.shape[1] != outputs:
        raise module.misshapen(scales, f"[groups, {outputs}]")
    groups = scales.shape[0]
    zeros = module.part("qzeros", WHOLE, (groups, packed_words(outputs, bits)))
    group = module.group_of(scales, groups, settings.groups)
    order = None
    if "g_idx" in module.parts or settings.sorted:
        order = module.order_of(module.part("g_idx", WHOLE, (inputs,)), group)
    points = _ZeroPoints(zeros, bits, outputs, settings.less_one, stripes)
    rows = _Rows(Columns(packed, stripes), points, Columns(scales, stripes), scales.dtype, bits, inputs)
    keeps = _has_zeros(module, points, settings)
    reader = rows.groups if keeps else rows.symmetric_groups
    return GroupedMatrix(f"{module.name}.weight", module.shape, module.method, bits, group, keeps, reader, order)


def _bits(module: Module, packed: StoredTensor) -> int:
    outputs, inputs = module.shape
    for bits in BITS:
        if packed.shape == (packed_words(inputs, bits), outputs) and inputs * bits % 32 == 0:
            return bits
    raise module.misshapen(packed, f"[{inputs} * bits / 32, {outputs}] for {', '.join(map(str, BITS))} bits")


class _ZeroPoints:
    """The zero points of some outputs: uint8 [groups, outputs].

    Where they are stored less one, GPTQModel subtracts and adds the ones of a word at once, so that a zero point of 0
    borrows from its neighbour; with 3 bits, which cross words, number by number. transformers reads them so.
    """

    def __init__(self, stored: StoredTensor, bits: int, outputs: int, less_one: bool, stripes: Stripes) -> None:
        self.stored, self.bits, self.outputs, self._less_one = stored, bits, outputs, less_one
        self._columns = Columns(stored, stripes)

    def read(self, start: int, stop: int) -> UInt8:
        first = start // UNIT * UNIT  # where a word begins
        words = self._columns(first * self.bits // 32, min(self.stored.shape[1], packed_words(stop, self.bits)))
        if self._less_one and self.bits in _ONES:
            words = words.view(np.uint32) + _ONES[self.bits]
        points = unpack(words, self.bits)[:, start - first : stop - first]
        if self._less_one and self.bits not in _ONES:
            points = (points + np.uint8(1)) & np.uint8(2**self.bits - 1)
        return points


@dataclass(frozen=True, eq=False)
class _Rows:
    packed: Columns
    points: _ZeroPoints
    scales: Columns
    scale_dtype: str
    bits: int
    inputs: int

    def groups(self, start: int, stop: int) -> Groups:
        return Groups(self._codes(start, stop), self._scales(start, stop), self.points.read(start, stop).T)

    def symmetric_groups(self, start: int, stop: int) -> Groups:
        return Groups(self._codes(start, stop), self._scales(start, stop), None)

    def _codes(self, start: int, stop: int) -> UInt8:
        return unpack(self.packed(start, stop).T, self.bits)[:, : self.inputs]

    def _scales(self, start: int, stop: int) -> Float32:
        return to_floats(self.scales(start, stop), self.scale_dtype).T


def _has_zeros(module: Module, points: _ZeroPoints, settings: GptqSettings) -> bool:
    """Whether any zero point is not the middle. They are few, and a bundle without them is smaller and quicker."""
    middle, outputs = 2 ** (points.bits - 1), points.outputs
    step = max(UNIT, _STEP // max(1, points.stored.shape[0]) // UNIT * UNIT)
    odd: set[int] = set()
    for start in range(0, outputs, step):
        odd |= set(np.unique(points.read(start, min(outputs, start + step))).tolist()) - {middle}
        if odd and not settings.symmetric:
            return True
    if odd:
        raise LlamaExportError(
            f"The quantization_config says sym: true, but {points.stored.name} holds the zero point {min(odd)} instead "
            f"of {middle}; correct its checkpoint_format (gptq or gptq_v2, which store them differently) or its sym."
        )
    return False
