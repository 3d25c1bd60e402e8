"""What `--precision` takes, as data: schemes of quantisation, and where each of them runs.

A scheme is a word (`int4`) or says its bits and block itself (`int8-b128`, `int4-b32-zeros`). What it makes of a weight
is a `formats.Format`; which graph of which backend takes it, from which version and GPU on, and how activations are
multiplied there, is a `Place`. The command line, targets, the planner, error messages and the documents read it here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ..errors import UsageError, did_you_mean
from ..names import DIALECTS, ONNXRUNTIME, ORT, TENSORRT, TENSORRT_RTX, TRT
from .formats import BLOCK, BLOCKS, FP8, FP16, FP32, INT4, INT8, INT8_ROW, NVFP4, Format, int_format

AUTO = "auto"
"""Bits by layer, as a budget allows: decided before anything is planned."""

CPU, CUDA = "cpu", "cuda"
"""What ONNX Runtime computes on; for TensorRT there is one answer."""

Activations = Literal["as they are", "int8, dynamic", "int8, static", "fp8, static"]
PLAIN: Activations = "as they are"
INT8_DYNAMIC: Activations = "int8, dynamic"
INT8_STATIC: Activations = "int8, static"
FP8_STATIC: Activations = "fp8, static"


@dataclass(frozen=True)
class Place:
    """Where a scheme runs.

    backend: of `names.BACKENDS`; on: CPU or CUDA of ONNX Runtime, "" of others. format: of the weights; scales in
    float16 are beside activations in float32 alone, see `policy`. version: the lowest of the backend; since: the
    lowest compute capability, "" where no GPU computes; dialects: of the graphs that hold it. activations: what
    products read; static scales come from calibration. calibrated: it cannot be had without. note: a sentence for the
    user, or "".
    """

    backend: str
    format: Format
    version: str
    since: str
    source: str
    on: str = ""
    dialects: tuple[str, ...] = DIALECTS
    activations: Activations = PLAIN
    calibrated: bool = False
    note: str = ""


@dataclass(frozen=True)
class Scheme:
    """What one name of `--precision` stands for. title: in a few words. named_block: the user chose the block, so no
    other may take its place.
    """

    name: str
    title: str
    places: tuple[Place, ...]
    named_block: bool = False

    @property
    def quantises(self) -> bool:
        return all(place.format.quantised for place in self.places)

    def place(self, backend: str, *, version: str = "", dialect: str = "", on: str = "") -> Place | None:
        """Where it runs: on this backend, of this version and dialect where they are given; None where it does not."""
        return next(
            (
                place
                for place in self.places
                if (place.backend, place.on) == (backend, on)
                and (not dialect or dialect in place.dialects)
                and (not version or _numbers(place.version) <= _numbers(version))
            ),
            None,
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


DEFAULT_INT4, DEFAULT_INT8 = int_format(4, zeros=True, half=True), int_format(8, half=True)
"""What `int4` and `int8` are in the `ort` dialect: 4.625 and 8.5 bits a weight."""

DEFAULT_EMBEDDING = DEFAULT_INT8
"""Of an embedding that is not the head too, in the `ort` dialect."""

_KERNELS = "MatMulNBits and GatherBlockQuantized of ONNX Runtime (docs/ContribOperators.md); run with 1.23.2 and 1.32"
_LEAST_ORT = "1.23.2"
RTX_BUILT = "parsed and built with TensorRT-RTX 1.7.1 on a computer without a GPU"
_DYNAMIC_NOTE = (
    "w8a8 in ONNX Runtime on a CPU is int8 by another name: its kernel (MatMulNBits at accuracy level 4) rounds what "
    "it multiplies to int8 in blocks at run time, with VNNI or the like where the processor has it."
)


def _on_ort(
    format: Format, *, level4: bool = True, on: Iterable[str] = (CPU, CUDA), note: str = ""
) -> tuple[Place, ...]:
    """level4: the CPU's kernel rounds activations to int8, which is dynamic W8A8 or W4A8."""
    return tuple(
        Place(
            ONNXRUNTIME,
            format,
            _LEAST_ORT,
            "",
            _KERNELS if format.quantised else "ONNX Runtime's plain products",
            on=one,
            dialects=(ORT,),
            activations=INT8_DYNAMIC if level4 and one == CPU else PLAIN,
            note=note,
        )
        for one in on
    )


_W8A8_TENSORRT = Place(
    TENSORRT,
    INT8_ROW,
    "8.6",
    "6.1",
    "NVIDIA's TensorRT documentation: INT8 takes Q/DQ on both sides of a product; weight-only exists for INT4 alone",
    activations=INT8_STATIC,
    calibrated=True,
)
_EVERY_GPU = "NVIDIA's TensorRT support matrix: every GPU that these releases run on"
_INT4_TENSORRT = "TensorRT 10.0 release notes: INT4 weight-only by blocked DequantizeLinear; Ampere and later"
_RTX_NO_75 = f"{RTX_BUILT}: not for 7.5"

_WORDS = (
    Scheme("fp32", "floating point of 32 bits", _on_ort(FP32, level4=False)),
    Scheme(
        "fp16",
        "floating point of 16 bits",
        (
            *_on_ort(FP16, level4=False),
            Place(TENSORRT, FP16, "8.6", "5.3", _EVERY_GPU),
            Place(TENSORRT_RTX, FP16, "1.7", "7.5", RTX_BUILT),
        ),
    ),
    Scheme(
        "int8",
        "integers of 8 bits",
        (
            *_on_ort(DEFAULT_INT8),
            _W8A8_TENSORRT,
            Place(
                TENSORRT_RTX,
                INT8,
                "1.7",
                "8.0",
                f"{RTX_BUILT}: weight-only; the TensorRT-RTX support matrix has none for 7.5",
            ),
        ),
    ),
    Scheme(
        "int4",
        "integers of 4 bits",
        (
            *_on_ort(DEFAULT_INT4),
            Place(TENSORRT, INT4, "10.0", "8.0", _INT4_TENSORRT),
            Place(TENSORRT_RTX, INT4, "1.7", "8.0", _RTX_NO_75),
        ),
    ),
    Scheme(
        "fp8",
        "E4M3 numbers, one scale a row",
        (
            Place(
                TENSORRT,
                FP8,
                "10.0",
                "8.9",
                "NVIDIA's TensorRT documentation: FP8 products from compute capability 8.9",
                activations=FP8_STATIC,
            ),
            Place(TENSORRT_RTX, FP8, "1.7", "8.9", f"{RTX_BUILT}: from 8.9", activations=FP8_STATIC),
        ),
    ),
    Scheme(
        "nvfp4",
        "E2M1 numbers in blocks of 16 with E4M3 scales",
        (
            Place(
                TENSORRT,
                NVFP4,
                "10.8",
                "10.0",
                "TensorRT 10.8 release notes: FP4 from compute capability 10.0",
                dialects=(TRT,),
            ),
            Place(TENSORRT_RTX, NVFP4, "1.7", "12.0", f"{RTX_BUILT}: from 12.0"),
        ),
    ),
    Scheme(
        "w8a8",
        "integers of 8 bits times activations of 8 bits",
        (
            *_on_ort(DEFAULT_INT8, on=(CPU,), note=_DYNAMIC_NOTE),
            _W8A8_TENSORRT,
            Place(
                TENSORRT_RTX,
                INT8_ROW,
                "1.7",
                "8.0",
                f"{RTX_BUILT}: Q/DQ on both sides of a product",
                activations=INT8_STATIC,
                calibrated=True,
            ),
        ),
    ),
)


def _block_scheme(bits: int, block: int, *, zeros: bool) -> Scheme:
    """TensorRT's DequantizeLinear refuses zero points, and 8 bits for weights alone are TensorRT-RTX's."""
    name = f"int{bits}-b{block}{'-zeros' * zeros}"
    title = f"integers of {bits} bits in blocks of {block}{', with zero points' * zeros}"
    places = _on_ort(int_format(bits, block, zeros=zeros, half=True))
    if not zeros:
        plain = int_format(bits, block)
        places = (*places, Place(TENSORRT_RTX, plain, "1.7", "8.0", _RTX_NO_75))
        if bits == 4:
            places = (*places, Place(TENSORRT, plain, "10.0", "8.0", _INT4_TENSORRT))
    return Scheme(name, title, places, named_block=True)


_BLOCKED = tuple(
    _block_scheme(bits, block, zeros=zeros) for bits in (4, 8) for zeros in (False, True) for block in BLOCKS
)

PRECISIONS = tuple(scheme.name for scheme in _WORDS)
"""The words."""

BLOCK_SCHEMES = tuple(scheme.name for scheme in _BLOCKED)
"""The names that say their block."""

SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in (*_WORDS, *_BLOCKED)})
"""By name."""

_SHORT = {name.replace(f"-b{BLOCK}", ""): name for name in BLOCK_SCHEMES if name.endswith(f"-b{BLOCK}-zeros")}
"""Formats leave their usual block out of their names: `int4-zeros` is `int4-b32-zeros`."""

BLOCKS_TOLD = f"int4-bN or int8-bN in blocks of N = {', '.join(map(str, BLOCKS))}, with zero points as int4-bN-zeros"
"""The block schemes in a few words."""


def scheme_named(name: str) -> Scheme | None:
    """The scheme of this name; None where there is none, and for `AUTO`, which stands for several."""
    return SCHEMES.get(_SHORT.get(name, name))


def known_scheme(name: str) -> Scheme:
    """The same; raises UsageError, which says what there is."""
    found = scheme_named(name)
    if found is None:
        raise UsageError(f"Unknown precision {name!r}; {choices_told(name)}")
    return found


def choices_told(name: str, *, also: Iterable[str] = ()) -> str:
    """What may be chosen instead of a name that is none, as the end of a sentence. also: words beside the schemes."""
    words = (*PRECISIONS, *also)
    hint = did_you_mean(name, (*words, *BLOCK_SCHEMES, *_SHORT))
    return f"choose one of {', '.join(words)}, or {BLOCKS_TOLD}.{hint}"


def formats_on(backend: str, *, version: str = "", on: str = "") -> Mapping[str, Format]:
    """What each scheme makes of a matrix where it runs on this backend, by its name."""
    found = {name: scheme.place(backend, version=version, on=on) for name, scheme in SCHEMES.items()}
    return MappingProxyType({name: place.format for name, place in found.items() if place is not None})
