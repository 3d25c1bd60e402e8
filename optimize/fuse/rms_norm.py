"""x * rsqrt(mean(x²) + ε) * weight becomes RMSNormalization (opset 23), its sum kept in float32."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.fusion import _rms_normalization as upstream


def fuse_rms_norm(model: ir.Model) -> None:
    """Needs folded constants; leaves one RMSNormalization for each norm of the model."""
    pattern.RewriteRuleSet(upstream.rms_normalization_rules).apply_to_model(model)
