"""The canonical graph of a model: standard ONNX, opset 24, from which every dialect is lowered."""

from __future__ import annotations

import onnx_ir as ir
import torch
from transformers import PreTrainedConfig

from ..optimize.fuse import fuse
from ..optimize.stamp import stamp
from .trace import trace


def canonical(config: PreTrainedConfig, *, context: int, dtype: torch.dtype = torch.float32) -> ir.Model:
    """Trace one decoder layer, fuse it, repeat it. Inputs, outputs and initializers as `trace` says; weights have no
    values.
    """
    model = trace(config, context=context, dtype=dtype)
    fuse(model)
    stamp(model, config.num_hidden_layers)
    return model
