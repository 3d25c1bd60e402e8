"""AWQ, as AutoAWQ and others store it (https://github.com/casper-hansen/AutoAWQ, `WQLinear_GEMM`, `WQLinear_GEMV`).

Version gemm, transposed, packed along the outputs, the eight of a word shuffled:

    qweight  int32 [inputs, outputs / 8]
    qzeros   int32 [groups, outputs / 8]
    scales   float [groups, outputs]

Version gemv, packed along the inputs; qzeros and scales are padded at the end of a row:

    qweight  int32 [outputs, inputs / 8]
    qzeros   int32 [outputs, groups / 8]
    scales   float [outputs, groups]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...optimize.tensors import UInt8
from ..safetensors_file import StoredTensor, to_floats
from .grouped import GroupedMatrix, Groups
from .modules import FLOATING, WHOLE, Module
from .packing import unpack, unpack_shuffled
from .stripes import Columns, Stripes

PARTS = ("qweight", "qzeros", "scales")
_BITS = 4
_WORD = 8
"""Numbers in a word."""


@dataclass(frozen=True)
class AwqSettings:
    """What config.json says: transposed: version gemm; groups: the columns of a group, where one is named."""

    transposed: bool
    groups: tuple[int, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> AwqSettings:
        """Read them out of a quantization_config of AWQ."""
        size = settings.get("group_size", settings.get("q_group_size"))
        return cls(_version(settings) == "gemm", (size,) if type(size) is int else ())


def variant_problem(settings: Mapping[str, Any]) -> str | None:
    """Why a quantization_config of AWQ is not read, as the middle of a sentence; None when it is."""
    if _version(settings) not in ("gemm", "gemv"):
        return f"in the version {_version(settings)!r}; gemm and gemv are read"
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    return None if bits == _BITS else f"in {bits!r} bits; {_BITS} are read"


def _version(settings: Mapping[str, Any]) -> str:
    if settings.get("backend") == "llm-awq":
        return "llm-awq"
    return str(settings.get("version") or settings.get("format") or "gemm").lower()[:40]


def read_awq(module: Module, settings: AwqSettings, stripes: Stripes) -> GroupedMatrix:
    """The weight that a module's parts stand for.

    Raises LlamaExportError when they are missing or contradict config.json or each other.
    """
    outputs, inputs = module.shape
    if not settings.transposed:
        return _read_gemv(module, settings)
    packed = module.part("qweight", WHOLE)
    if packed.shape != (inputs, outputs // _WORD) or outputs % _WORD:
        raise module.misshapen(packed, f"[{inputs}, {outputs} / {_WORD}]")
    scales = module.part("scales", FLOATING)
    if len(scales.shape) != 2 or scales.shape[1] != outputs:
        raise module.misshapen(scales, f"[groups, {outputs}]")
    zeros = module.part("qzeros", WHOLE, (scales.shape[0], outputs // _WORD))
    group = module.group_of(scales, scales.shape[0], settings.groups)
    rows = _Transposed(Columns(packed, stripes), Columns(zeros, stripes), Columns(scales, stripes), scales.dtype)
    return GroupedMatrix(f"{module.name}.weight", module.shape, module.method, _BITS, group, True, rows.groups)


@dataclass(frozen=True, eq=False)
class _Transposed:
    packed: Columns
    zeros: Columns
    scales: Columns
    scale_dtype: str

    def groups(self, start: int, stop: int) -> Groups:
        scales = to_floats(self.scales(start, stop), self.scale_dtype).T
        return Groups(_numbers(self.packed, start, stop), scales, _numbers(self.zeros, start, stop))


def _numbers(packed: Columns, start: int, stop: int) -> UInt8:
    """The numbers of outputs [start, stop): uint8 [outputs, rows of the stored matrix]."""
    first = start // _WORD
    words = packed(first, -(-stop // _WORD))
    return unpack_shuffled(words)[start - first * _WORD : stop - first * _WORD]


def _read_gemv(module: Module, settings: AwqSettings) -> GroupedMatrix:
    outputs, inputs = module.shape
    packed = module.part("qweight", WHOLE, (outputs, inputs // _WORD))
    zeros, scales = module.part("qzeros", WHOLE), module.part("scales", FLOATING)
    size = settings.groups[0] if settings.groups and settings.groups[0] > 0 else inputs
    groups = -(-inputs // size)
    if len(zeros.shape) != 2 or zeros.shape[0] != outputs or zeros.shape[1] * _WORD < groups:
        raise module.misshapen(zeros, f"[{outputs}, {groups} / {_WORD} or more]")
    if scales.shape != (outputs, zeros.shape[1] * _WORD):
        raise module.misshapen(scales, f"[{outputs}, {zeros.shape[1] * _WORD}]")
    rows = _InPlace(packed, zeros, scales, groups)
    return GroupedMatrix(f"{module.name}.weight", module.shape, module.method, _BITS, size, True, rows.groups)


@dataclass(frozen=True, eq=False)
class _InPlace:
    packed: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    count: int

    def groups(self, start: int, stop: int) -> Groups:
        return Groups(
            unpack(self.packed.array(start, stop), _BITS),
            self.scales.floats(start, stop)[:, : self.count],
            unpack(self.zeros.array(start, stop), _BITS)[:, : self.count],
        )
