"""Checkpoints of the hub that come quantised: packed codes, scales and zero points instead of weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import LlamaExportError
from ...optimize.formats import FLOATS
from ...optimize.tensors import SourceTensor
from ..config import expected_tensors
from ..safetensors_file import StoredTensor, plain_tensor
from . import compressed
from .awq import AwqSettings, read_awq
from .compressed import CompressedSettings, read_compressed
from .gptq import GptqSettings, read_gptq
from .grouped import GroupedMatrix
from .methods import AWQ, COMPRESSED, GPTQ, Method, Settings, method_of
from .modules import Module
from .stripes import Stripes

Reader = Callable[[Module], GroupedMatrix]


@dataclass(frozen=True)
class Prequantised:
    """tensors: by Hugging Face name. method: config.json's name of what quantised them. notes: what of the
    checkpoint's quantisation is not taken over, as whole sentences.
    """

    tensors: dict[str, SourceTensor]
    method: str | None
    notes: tuple[str, ...] = ()


def check_quantisation(settings: Any) -> None:
    """Raise LlamaExportError when a quantization_config is of a method, or a variant of one, that is not read."""
    method_of(settings)


def prequantised_tensors(settings: Any, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Prequantised:
    """The weights of a checkpoint. Packed matrices keep their own codes (`SourceTensor.blocks`); what is not packed
    (embedding, norms, mostly the head) stays as it is.

    settings: config.json's quantization_config. Raises LlamaExportError as `check_quantisation` does, and for parts
    that are missing, unknown, of another type or shape.
    """
    method, settings = method_of(settings)
    read, expected = _READERS[method.name](settings), expected_tensors(config)
    tensors, modules = {}, _modules(method, stored)
    for name, parts in modules.items():
        shape = expected.get(f"{name}.weight", ())
        if len(shape) != 2:
            raise LlamaExportError(
                f"The checkpoint holds {next(iter(parts.values())).name}, but config.json describes no matrix "
                f"{name}.weight; the two do not belong together, take the checkpoint again."
            )
        tensors[f"{name}.weight"] = read(Module(name, (shape[0], shape[1]), parts, method.title)).tensor()
    taken = {part.name for parts in modules.values() for part in parts.values()}
    for name, tensor in stored.items():
        if name in taken or _is_harmless(tensor, method, expected):
            continue
        if name in tensors:
            raise LlamaExportError(
                f"The checkpoint holds {name} beside what {method.title} stores for it, and nothing says which of the "
                "two counts; take the checkpoint again."
            )
        tensors[name] = _plain(tensor, method)
    return Prequantised(tensors, method.name, compressed.notes(settings) if method is COMPRESSED else ())


def _gptq(settings: Settings) -> Reader:
    known, stripes = GptqSettings.of(settings), Stripes()
    return lambda module: read_gptq(module, known, stripes)


def _awq(settings: Settings) -> Reader:
    known, stripes = AwqSettings.of(settings), Stripes()
    return lambda module: read_awq(module, known, stripes)


def _compressed(settings: Settings) -> Reader:
    known = CompressedSettings.of(settings)
    return lambda module: read_compressed(module, known)


_READERS: Mapping[str, Callable[[Settings], Reader]] = {
    GPTQ.name: _gptq,
    AWQ.name: _awq,
    COMPRESSED.name: _compressed,
}


def _modules(method: Method, stored: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The quantised modules and their parts."""
    found: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part in method.parts or (method is COMPRESSED and part == "weight" and tensor.dtype not in FLOATS):
            found[module][part] = tensor
    if method is COMPRESSED:  # a weight that is not packed is a part, too
        for module, parts in found.items():
            if (weight := stored.get(f"{module}.weight")) is not None:
                parts["weight"] = weight
    return found


def _is_harmless(tensor: StoredTensor, method: Method, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether to leave a tensor out: a bias of zeros, which some writers of GPTQ add, or what quantises activations."""
    module, _, part = tensor.name.rpartition(".")
    if method is COMPRESSED and part in compressed.ACTIVATION_PARTS:
        return True
    if part != "bias" or tensor.name in expected or f"{module}.weight" not in expected or tensor.dtype not in FLOATS:
        return False
    return len(tensor.shape) == 1 and not tensor.floats(0, tensor.shape[0]).any()


def _plain(tensor: StoredTensor, method: Method) -> SourceTensor:
    if tensor.dtype not in FLOATS:
        raise LlamaExportError(
            f"The checkpoint holds the tensor {tensor.name} as {tensor.dtype}, which is no part of what {method.title} "
            "stores; take another quantisation, or the unquantised checkpoint."
        )
    return plain_tensor(tensor)
