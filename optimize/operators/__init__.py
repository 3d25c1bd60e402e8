"""What each release of TensorRT's ONNX parser takes, as data, and what a graph has that it does not take."""

from __future__ import annotations

from .lint import unsupported
from .releases import Operators, all_operators, operators_of

__all__ = ["Operators", "all_operators", "operators_of", "unsupported"]
