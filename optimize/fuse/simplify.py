"""Fold constants and drop what they leave behind."""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

_SMALL = 1 << 16
"""Bytes up to which a constant is folded: the mask's index row is, a weight never is."""


def simplify(model: ir.Model) -> None:
    """Fold small constants (TensorRT wants constant axes and shapes), drop unused nodes, join equal ones."""
    logger = logging.getLogger("onnx_ir.passes.common.initializer_deduplication")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each weight without values, and here all are
    try:
        onnxscript.optimizer.optimize_ir(
            model, num_iterations=2, onnx_shape_inference=False, input_size_limit=_SMALL, output_size_limit=_SMALL
        )
    finally:
        logger.setLevel(level)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
