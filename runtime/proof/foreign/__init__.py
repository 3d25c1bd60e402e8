"""Decoders that other tools exported, without a manifest: recognised, compared with a reference, and replayed."""

from __future__ import annotations

from .folder import GENAI, ONNX, OPTIMUM, ForeignFolder, is_foreign, open_foreign
from .identity import check_reference
from .replayer import ForeignReplayer

__all__ = [
    "GENAI",
    "ONNX",
    "OPTIMUM",
    "ForeignFolder",
    "ForeignReplayer",
    "check_reference",
    "is_foreign",
    "open_foreign",
]
