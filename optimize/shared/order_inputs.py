"""A projection whose weight is stored with its columns in another order reads its input in that order.

Quantisers that sort columns by their importance (GPTQ's desc_act) leave blocks of columns that do not lie together.
Stored in their order, with the input gathered to match, they are plain blocks. MatMulNBits' own `g_idx` does the same a
hundred times slower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx_ir as ir

from ..graph import ORDER, Recorder, add_initializer
from ..linears import linears_of
from ..stored import parts_of
from ..tensors import Int64


def order_name(order: Int64) -> str:
    """The initializer that holds `order` [columns]; the same order is kept once."""
    return f"{ORDER}{hashlib.sha256(order.tobytes()).hexdigest()[:16]}"


def order_inputs(model: ir.Model, orders: Mapping[str, Int64]) -> None:
    """Needs MatMul(x, Transpose(weight)); leaves MatMul(Gather(x, order), ...) where the weight has an order, one
    Gather for all projections that read the same value in the same order.
    """
    gathered: dict[tuple[ir.Value, str], ir.Value] = {}
    for linear in linears_of(model):
        order = orders.get(parts_of(linear.weight)[0])
        if order is None:
            continue
        x, name = linear.matmul.inputs[0], order_name(order)
        assert x is not None
        if (x, name) not in gathered:
            record = Recorder(str(linear.matmul.name).removesuffix("/MatMul"))
            gathered[x, name] = record("Gather", x, add_initializer(model.graph, name, order), axis=-1)
            gathered[x, name].shape, gathered[x, name].type = x.shape, x.type
            model.graph.insert_before(linear.matmul, record.nodes)
        linear.matmul.replace_input_with(0, gathered[x, name])
