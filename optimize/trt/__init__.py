"""Passes that lower the canonical graph to the `trt` dialect: standard ops of opset 24, for TensorRT 10.15 and later
and for TensorRT-RTX.

Attention and TensorScatter stay as they are: TensorRT makes of them one fused kernel and an update of the cache in
place. So the cache is static: past and present are [batch, kv_heads, context, head_dim] and share one address. The mask
is boolean and made in the graph from position_ids, a sliding window included, because `nonpad_kv_seqlen` is dropped by
the parser without an error. Norms are RMSNormalization on float16, summed in float32 (stash_type 1).

Inputs: input_ids, position_ids int64 [batch, sequence]; logits_positions int64 [batch, kept];
past_key_values.N.key|value. Outputs: logits float32 [batch, kept, vocab]; present.N.key|value. What the cache holds
beyond a row's tokens is masked, but must be finite: a masked key has probability 0, and 0 times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from ..formats import Format
from ..shared.finish import finish
from ..shared.order_inputs import order_inputs
from ..shared.pack_linears import pack_linears
from ..tensors import Float32, Int64
from .embedding import lower_embedding
from .kept_positions import keep_asked_positions
from .linear import InputScale, lower_linears
from .odd_heads import pad_heads
from .rotary_tables import store_rotary_tables

OPSET, IR_VERSION = 24, 12


@dataclass(frozen=True)
class TrtOptions:
    """What both TensorRT dialects are lowered by.

    formats: how each checkpoint tensor is stored. rotary: tables of cos and sin, float32 [context, head_dim / 2].
    orders: by checkpoint tensor, the order of its stored columns where that is not the natural one.
    inputs: by checkpoint weight, how what its projection reads is rounded, where that is quantised too.
    """

    formats: Mapping[str, Format]
    rotary: tuple[Float32, Float32]
    orders: Mapping[str, Int64] = field(default_factory=dict)
    inputs: Mapping[str, InputScale] = field(default_factory=dict)


def lower(model: ir.Model, options: TrtOptions) -> None:
    """Lower the canonical graph in place; leaves every weight described by `stored.Stored`, none with values."""
    store_rotary_tables(model, options.rotary)
    pad_heads(model)
    keep_asked_positions(model)
    order_inputs(model, options.orders)
    pack_linears(model, options.formats)
    lower_linears(model, options.formats, opset=OPSET, inputs=options.inputs)
    lower_embedding(model, options.formats)
    finish(model, {"": OPSET}, IR_VERSION)
