"""Checkpoints of the hub that come quantised: packed codes, scales and zero points instead of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import LlamaExportError
from ...optimize.tensors import SourceTensor
from ..safetensors_file import StoredTensor


def prequantised_tensors(settings: Any, stored: Mapping[str, StoredTensor]) -> tuple[dict[str, SourceTensor], str]:
    """The weights of a checkpoint by Hugging Face name, and the name of the method that quantised them.

    settings: config.json's quantization_config. Packed matrices keep their own codes (`SourceTensor.blocks`).
    Raises LlamaExportError for a method or a variant of one that is not read, naming those that are.
    """
    method = settings.get("quant_method", "an unnamed method") if isinstance(settings, Mapping) else settings
    raise LlamaExportError(
        f"The checkpoint is already quantised with {method!r}, but this version reads F32, F16 and BF16 "
        "safetensors and GGUF files; take the unquantised checkpoint."
    )
