"""Passes that lower the canonical graph to the `trt-primitive` dialect: primitive ops of opset 17 or 21, for TensorRT
8.6 (JetPack 6.0) and 10.0 to 10.14 (JetPack 6.1 to 7.1), which do not know Attention or TensorScatter.

Inputs: input_ids, position_ids int64 [batch, sequence]; logits_positions int64 [batch, kept];
past_key_values.N.key|value [batch, kv_heads, past_sequence, head_dim], at least one row long. Outputs: logits float32
[batch, kept, vocab]; present.N.key|value [batch, kv_heads, sequence, head_dim], the new rows alone, which the caller
puts behind its past. Rows of the past from position_ids[:, 0] on are not looked at, but must be finite: a hidden key
has probability 0, and 0 times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..shared.finish import finish
from ..shared.order_inputs import order_inputs
from ..shared.pack_linears import pack_linears
from ..trt import TrtOptions
from ..trt.embedding import lower_embedding
from ..trt.kept_positions import keep_asked_positions
from ..trt.linear import lower_linears
from ..trt.rotary_tables import store_rotary_tables
from .attention import lower_attention
from .norms import lower_norms
from .rotary import lower_rotary

IR_VERSIONS: Mapping[int, int] = {17: 8, 21: 10}
"""The opsets of this dialect, and the IR version that came with each."""


def lower(model: ir.Model, options: TrtOptions, opset: int) -> None:
    """Lower the canonical graph in place; leaves every weight described by `stored.Stored`, none with values.

    opset: a key of `IR_VERSIONS`.
    """
    store_rotary_tables(model, options.rotary)
    lower_attention(model)
    lower_rotary(model)
    keep_asked_positions(model)
    order_inputs(model, options.orders)
    pack_linears(model, options.formats)
    lower_norms(model, opset)
    lower_linears(model, options.formats, opset=opset, inputs=options.inputs)
    lower_embedding(model, options.formats)
    finish(model, {"": opset}, IR_VERSIONS[opset])
