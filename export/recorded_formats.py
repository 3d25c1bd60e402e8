"""The formats of a bundle's weights, out of the records in its exact reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..errors import LlamaExportError
from ..names import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from ..optimize import policy
from ..optimize.formats import Format, format_named
from ..optimize.tensors import SourceTensor
from ..runtime.proof.reference import WeightRecord

_POLICIES: Mapping[str, policy.Policy] = {
    ONNXRUNTIME: policy.ORT,
    TENSORRT: policy.TENSORRT,
    TENSORRT_RTX: policy.TENSORRT_RTX,
}
"""By backend; whether scales must be positive is no part of a format's name."""


def recorded_formats(
    records: Iterable[WeightRecord], backend: str, tensors: Mapping[str, SourceTensor]
) -> dict[str, Format]:
    """The format of every tensor, by name. backend: of the bundle.

    Raises LlamaExportError for a format that is unknown, and for a tensor without a record.
    """
    signed, found = _POLICIES[backend], dict[str, Format]()
    for record in records:
        format = format_named(record.format)
        if format is None:
            raise LlamaExportError(f"The reference names an unknown format {record.format!r}; upgrade llama-export.")
        if format.block and format.coding == "int" and not signed.zeros:
            format = replace(format, positive=format.bits not in signed.signed)
        found.setdefault(record.name, format)
    for name in tensors:
        if name not in found:
            raise LlamaExportError(f"The reference has no record of {name}; build the bundle again.")
    return found
