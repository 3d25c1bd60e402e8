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
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes import common

from ..formats import Format
from ..ort.order_inputs import order_inputs
from ..ort.pack_linears import pack_linears
from ..ort.vectors import lower_vectors
from ..tensors import Float32, Int64
from ..trt.embedding import lower_embedding
from ..trt.kept_positions import keep_asked_positions
from ..trt.linear import InputScale, lower_linears
from ..trt.rotary_tables import store_rotary_tables
from .attention import lower_attention
from .norms import lower_norms
from .rotary import lower_rotary

IR_VERSIONS: Mapping[int, int] = {17: 8, 21: 10}
"""The opsets of this dialect, and the IR version that came with each."""


@dataclass(frozen=True)
class PrimitiveOptions:
    """formats: how each checkpoint tensor is stored. rotary: tables of cos and sin, float32 [context, head_dim / 2].
    opset: 17 or 21. orders: by checkpoint tensor, the order of its stored columns where that is not the natural one.
    inputs: by checkpoint weight, how what its projection reads is rounded, where that is quantised too.
    """

    formats: Mapping[str, Format]
    rotary: tuple[Float32, Float32]
    opset: int
    orders: Mapping[str, Int64] = field(default_factory=dict)
    inputs: Mapping[str, InputScale] = field(default_factory=dict)


def lower(model: ir.Model, options: PrimitiveOptions) -> None:
    """Lower the canonical graph in place; leaves every weight described by `stored.Stored`, none with values."""
    store_rotary_tables(model, options.rotary)
    lower_attention(model)
    lower_rotary(model)
    keep_asked_positions(model)
    order_inputs(model, options.orders)
    pack_linears(model, options.formats)
    lower_norms(model, options.opset)
    lower_linears(model, options.formats, opset=options.opset, inputs=options.inputs)
    lower_embedding(model, options.formats)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    lower_vectors(model)
    common.TopologicalSortPass()(model)
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update({"": options.opset})
    model.ir_version = IR_VERSIONS[options.opset]
