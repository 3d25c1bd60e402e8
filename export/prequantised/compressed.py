"""compressed-tensors, as llm-compressor writes it (https://github.com/vllm-project/compressed-tensors).

Format pack-quantized, integers of 1 to 8 bits, stored plus 2**(bits - 1):

    weight_packed      int32 [outputs, inputs * bits / 32]   packed along the inputs, as one stream of bits
    weight_scale       float [outputs, groups], or one of all
    weight_zero_point  int32 [outputs * bits / 32, groups]   packed along the outputs; absent where symmetric
    weight_shape       outputs and inputs
    weight_g_idx       int32 [inputs]                        the group of each input, by files of earlier versions

Formats int-quantized and naive-quantized:

    weight             int8 [outputs, inputs]
    weight_scale       as above
    weight_zero_point  int8, shaped as weight_scale; absent where symmetric
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import LlamaExportError
from ...optimize.tensors import Float32, UInt8
from ..safetensors_file import StoredTensor
from .grouped import GroupedMatrix, Groups
from .modules import FLOATING, WHOLE, Module
from .packing import UNIT, packed_words, unpack

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
ACTIVATION_PARTS = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    *("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point"),
)
"""How activations and the cache were quantised, which a bundle does not repeat."""

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_MIXED = "mixed-precision"
"""Of modules of several formats, each of which their group names."""
_STRATEGIES = ("group", "channel", "tensor")
_READ = f"the formats {', '.join(_FORMATS)} of integers are read"
_BYTE = ("I8",)


@dataclass(frozen=True)
class CompressedSettings:
    """What config.json says: bits: of all groups of modules, as a module may have any; groups: the columns of a scale's
    group, as far as they are named.
    """

    bits: tuple[int, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> CompressedSettings:
        """Read them out of a quantization_config of compressed-tensors."""
        weights = [scheme["weights"] for scheme in _schemes(settings) if isinstance(scheme.get("weights"), Mapping)]
        sizes = {scheme.get("group_size") for scheme in weights}
        return cls(
            tuple(sorted({int(scheme["num_bits"]) for scheme in weights})),
            tuple(sorted(size for size in sizes if type(size) is int)),
        )


def variant_problem(settings: Mapping[str, Any]) -> str | None:
    """Why a quantization_config of compressed-tensors is not read, as the middle of a sentence; None when it is."""
    return next(_problems(settings), None)


def _problems(settings: Mapping[str, Any]) -> Iterator[str]:
    sparsity, transforms = settings.get("sparsity_config"), settings.get("transform_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        yield f"with the sparsity {sparsity['format']!r:.40}; dense weights are read"
    if (status := settings.get("quantization_status", "compressed")) != "compressed":
        yield f"with the status {status!r:.40}; 'compressed' is read, as save_pretrained makes it"
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        yield "with a transform_config; models without transforms are read"
    if (found := settings.get("format", _MIXED)) not in (*_FORMATS, _MIXED):
        yield f"in the format {found!r:.40}; {_READ}"
    schemes = [scheme for scheme in _schemes(settings) if scheme.get("weights")]
    if not schemes:
        yield f"with config_groups that tell of no weights; {_READ}"
    for scheme in schemes:
        yield from _scheme_problems(scheme, scheme["weights"])


def _scheme_problems(scheme: Mapping[str, Any], weights: Any) -> Iterator[str]:
    if not isinstance(weights, Mapping):
        yield f"with weights of {weights!r:.40}; {_READ}"
        return
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if scheme.get("format") not in (None, *_FORMATS):
        yield f"in the format {scheme['format']!r:.40}; {_READ}"
    if kind != "int":
        yield f"as {kind!r:.40} of {bits!r:.40} bits; {_READ}"
    if type(bits) is not int or not 1 <= bits <= 8:
        yield f"in {bits!r:.40} bits; 1 to 8 are read"
    if weights.get("strategy") not in (None, *_STRATEGIES):
        yield f"with the strategy {weights['strategy']!r:.40}; {', '.join(_STRATEGIES)} are read"


def _schemes(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    if isinstance(groups, Mapping):
        yield from (scheme for scheme in groups.values() if isinstance(scheme, Mapping))


def notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the checkpoint's quantisation a bundle does not take over: whole sentences."""
    found = []
    if any(scheme.get("input_activations") or scheme.get("output_activations") for scheme in _schemes(settings)):
        found.append(
            "The checkpoint's quantised weights are kept; the quantisation of activations that it asks for as well is "
            "not repeated."
        )
    if settings.get("kv_cache_scheme"):
        found.append("The quantisation of the cache that the checkpoint asks for is not repeated.")
    return tuple(found)


def read_compressed(module: Module, settings: CompressedSettings) -> GroupedMatrix:
    """The weight that a module's parts stand for.

    Raises LlamaExportError when they are missing or contradict config.json or each other.
    """
    scales = module.part("weight_scale", FLOATING)
    groups = _group_count(module, scales)
    group = module.group_of(scales, groups, settings.groups)
    packed = "weight_packed" in module.parts
    bits, codes = _packed_codes(module, settings) if packed else _byte_codes(module, settings)
    points = _zero_points(module, bits, scales, groups)
    order = None
    if "weight_g_idx" in module.parts:
        order = module.order_of(module.part("weight_g_idx", WHOLE, module.shape[1:]), group)
    rows = _Rows(codes, scales, points, groups)
    return GroupedMatrix(
        f"{module.name}.weight", module.shape, module.method, bits, group, points is not None, rows.groups, order
    )


def _group_count(module: Module, scales: StoredTensor) -> int:
    outputs = module.shape[0]
    if scales.shape in ((), (1,), (1, 1), (outputs,)):
        return 1
    if len(scales.shape) != 2 or scales.shape[0] != outputs:
        raise module.misshapen(scales, f"[{outputs}, groups]")
    return scales.shape[1]


@dataclass(frozen=True, eq=False)
class _PackedCodes:
    stored: StoredTensor
    bits: int
    columns: int

    def __call__(self, start: int, stop: int) -> UInt8:
        return unpack(self.stored.array(start, stop), self.bits)[:, : self.columns]


def _packed_codes(module: Module, settings: CompressedSettings) -> tuple[int, _PackedCodes]:
    outputs, inputs = module.shape
    packed = module.part("weight_packed", WHOLE)
    if "weight_shape" in module.parts:
        shape = module.part("weight_shape", ("I64", "I32"), (2,))
        if tuple(shape.array(0, 2).tolist()) != module.shape:
            raise LlamaExportError(
                f"The checkpoint's tensor {shape.name} says {shape.array(0, 2).tolist()}, but config.json expects "
                f"{list(module.shape)}; the two do not belong together, take the checkpoint again."
            )
    for bits in settings.bits:
        if packed.shape == (outputs, packed_words(inputs, bits)):
            return bits, _PackedCodes(packed, bits, inputs)
    raise module.misshapen(packed, f"[{outputs}, {inputs} * bits / 32] for {' or '.join(map(str, settings.bits))} bits")


@dataclass(frozen=True, eq=False)
class _ByteCodes:
    """Signed bytes, as numbers from 0 on; also of zero points."""

    stored: StoredTensor
    bits: int

    def __call__(self, start: int, stop: int) -> UInt8:
        stored, middle = self.stored.array(start, stop), 2 ** (self.bits - 1)
        if self.bits < 8 and stored.size and not -middle <= stored.min() <= stored.max() < middle:
            raise LlamaExportError(
                f"The checkpoint's tensor {self.stored.name} holds numbers that do not fit the {self.bits} bits that "
                "config.json says; take the checkpoint again."
            )
        return stored.view(np.uint8) + np.uint8(middle)


def _byte_codes(module: Module, settings: CompressedSettings) -> tuple[int, _ByteCodes]:
    bits = max(settings.bits)
    return bits, _ByteCodes(module.part("weight", _BYTE, module.shape), bits)


@dataclass(frozen=True, eq=False)
class _PackedPoints:
    """Zero points packed along the outputs."""

    stored: StoredTensor
    bits: int

    def __call__(self, start: int, stop: int) -> UInt8:
        first = start // UNIT * UNIT  # where a word begins
        end = min(self.stored.shape[0], packed_words(stop, self.bits))
        words = self.stored.array(first * self.bits // 32, end)
        return unpack(words.T, self.bits)[:, start - first : stop - first].T


def _zero_points(module: Module, bits: int, scales: StoredTensor, groups: int) -> _PackedPoints | _ByteCodes | None:
    if "weight_zero_point" not in module.parts:
        return None
    points = module.part("weight_zero_point", (*WHOLE, *_BYTE))
    if points.dtype == "I32":
        shape = (packed_words(module.shape[0], bits), groups)
        return _PackedPoints(module.part("weight_zero_point", WHOLE, shape), bits)
    return _ByteCodes(module.part("weight_zero_point", _BYTE, scales.shape), bits)


@dataclass(frozen=True, eq=False)
class _Rows:
    codes: _PackedCodes | _ByteCodes
    scales: StoredTensor
    points: _PackedPoints | _ByteCodes | None
    count: int

    def groups(self, start: int, stop: int) -> Groups:
        rows, single = stop - start, self.scales.shape in ((), (1,), (1, 1))
        first, last = (0, 1) if single else (start, stop)
        scales: Float32 = np.broadcast_to(self.scales.floats(first, last).reshape(-1, self.count), (rows, self.count))
        zeros = None
        if self.points is not None:
            read = self.points(start, stop) if isinstance(self.points, _PackedPoints) else self.points(first, last)
            zeros = np.broadcast_to(read.reshape(-1, self.count), (rows, self.count))
        return Groups(self.codes(start, stop), scales, zeros)
