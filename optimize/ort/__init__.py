"""Passes that lower the canonical graph to the `ort` dialect: com.microsoft ops in opset 21, for ONNX Runtime 1.23.2
and later.

The result also loads in onnxruntime-genai and optimum: inputs input_ids, attention_mask, past_key_values.N.key|value;
outputs logits, present.N.key|value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from ..formats import Format
from ..graph import MICROSOFT
from ..shared.finish import finish
from ..shared.order_inputs import order_inputs
from ..shared.pack_linears import pack_linears
from ..tensors import Float32, Int64
from .attention import lower_attention
from .embedding import lower_embedding
from .last_positions import keep_last_positions
from .linear import lower_linears
from .low_rank import add_low_rank
from .norms import lower_norms
from .pack_qkv import pack_qkv
from .scales import share_casts

OPSET, IR_VERSION = 21, 10


@dataclass(frozen=True)
class OrtOptions:
    """formats: how each checkpoint tensor is stored. rotary: tables of cos and sin [context, head_dim / 2].
    accuracy_level: MatMulNBits' (4: int8 activations; 0: as the inputs). orders: by checkpoint tensor, the order of its
    stored columns where that is not the natural one. adapted: weights that adapters are added to at run time.
    recordable: so that ONNX Runtime can record a step as a CUDA graph. cache: the scales of a cache in int8, see
    `cache_int8`; none for one in the dtype of the activations.
    """

    formats: Mapping[str, Format]
    rotary: tuple[Float32, Float32]
    accuracy_level: int
    orders: Mapping[str, Int64] = field(default_factory=dict)
    adapted: Collection[str] = ()
    recordable: bool = False
    cache: Mapping[str, Float32] = field(default_factory=dict)


def lower(model: ir.Model, options: OrtOptions) -> None:
    """Lower the canonical graph in place; leaves every weight described by `stored.Stored`, none with values."""
    lower_attention(model, options.rotary, options.cache)
    order_inputs(model, options.orders)
    pack_linears(model, options.formats)
    pack_qkv(model)
    keep_last_positions(model, recordable=options.recordable)
    add_low_rank(model, options.adapted)
    lower_norms(model)
    lower_linears(model, options.formats, options.accuracy_level)
    lower_embedding(model, options.formats)
    share_casts(model)
    finish(model, {"": OPSET, MICROSOFT: 1}, IR_VERSION)
