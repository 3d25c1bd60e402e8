"""What a checkpoint says of its quantisation, and whether that is read: decided from config.json alone, before any
weight is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import LlamaExportError
from . import awq, compressed, gptq

Settings = Mapping[str, Any]

_READ = "read are GPTQ, AWQ, integers of compressed-tensors, and GGUF files"
_ADVICE = "take one of these, or the unquantised checkpoint, which --precision int4 or int8 quantises here"


@dataclass(frozen=True)
class Method:
    """A way to quantise that is read.

    name: that of config.json's quant_method. title: for people. parts: last parts of the names of its tensors.
    problem: why a variant of it is not read, None when it is.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    problem: Callable[[Settings], str | None]


GPTQ = Method("gptq", "GPTQ", gptq.PARTS, gptq.variant_problem)
AWQ = Method("awq", "AWQ", awq.PARTS, awq.variant_problem)
COMPRESSED = Method("compressed-tensors", "compressed-tensors", compressed.PARTS, compressed.variant_problem)
_METHODS: Mapping[str, Method] = {method.name: method for method in (GPTQ, AWQ, COMPRESSED)}

_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
"""AutoRound's packing_format -> the method whose files it writes."""

_WORDS = {
    "bitsandbytes": "stores numbers of a code book (nf4, fp4) or rows split by size (int8)",
    "fp8": "stores 8-bit floating point",
    "fbgemm_fp8": "stores 8-bit floating point",
    "mxfp4": "stores 4-bit floating point",
    "modelopt": "stores floating point of 4 or 8 bits",
    "aqlm": "stores entries of code books",
    "vptq": "stores entries of code books",
    "quip": "stores entries of code books",
    "higgs": "stores entries of code books",
    "bitnet": "stores three values",
}
"""What methods that are not read do otherwise than the block formats of the kernels, as far as it is one thing."""


def method_of(settings: Any) -> tuple[Method, Settings]:
    """The method of a quantization_config, and the settings to read it by.

    Raises LlamaExportError for one that is not read, or a variant of it that is not, naming those that are.
    """
    if not isinstance(settings, Mapping):
        raise LlamaExportError("config.json's quantization_config is no object; take the checkpoint's own config.json.")
    name = _name(settings)
    if name in ("auto-round", "intel/auto-round"):
        packing = str(settings.get("packing_format", "none"))
        if packing not in _PACKINGS:
            raise _refused("AutoRound", f"in the packing_format {packing[:40]!r}; {' and '.join(_PACKINGS)} are read")
        name = _PACKINGS[packing]
        settings = {key: value for key, value in settings.items() if key not in ("format", "version", "backend")}
    method = _METHODS.get(name)
    if method is None:
        words = f", which {_WORDS[name]}" if name in _WORDS else ""
        raise LlamaExportError(f"The checkpoint is quantised with {name!r}{words}; {_READ}; {_ADVICE}.")
    if problem := method.problem(settings):
        raise _refused(method.title, problem)
    return method, settings


def _name(settings: Settings) -> str:
    name = settings.get("quant_method")
    if name is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return "bitsandbytes"  # files of before quant_method
    return str(name or "an unnamed method")[:40]


def _refused(title: str, problem: str) -> LlamaExportError:
    return LlamaExportError(f"The checkpoint is quantised with {title} {problem}; {_ADVICE}.")
