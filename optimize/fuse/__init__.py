"""Passes that turn the trace into the canonical graph: standard ONNX ops of opset 24, the same for every backend."""

from __future__ import annotations

import onnx_ir as ir

from .rms_norm import fuse_rms_norm
from .rotary import fuse_rotary
from .simplify import simplify
from .static_reshape import fuse_static_reshape

PASSES = (simplify, fuse_static_reshape, fuse_rms_norm, fuse_rotary, simplify)


def fuse(model: ir.Model) -> None:
    """Leave Attention, TensorScatter, RotaryEmbedding, RMSNormalization and MatMul, with no shape arithmetic between
    them.
    """
    for run in PASSES:
        run(model)
