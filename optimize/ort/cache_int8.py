"""A cache in int8: GroupQueryAttention rounds keys (after the rotary embedding) and values to a scale for each channel.

The op's k_scale and v_scale are constants of the graph (contrib op GroupQueryAttention, "Quantization"): what is cached
is round(x / scale) within [-128, 127], and attention reads code * scale, for the new tokens too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from ..graph import add_initializer
from ..tensors import Float32

NO_SCALES: Mapping[str, Float32] = MappingProxyType({})

_INPUTS = 12
"""Of GroupQueryAttention before k_scale and v_scale."""
_ATTRIBUTES: Mapping[str, str | int] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}


def scale_name(past: str) -> str:
    """What the scales of an input of the cache are called in the graph."""
    return f"{past}.scale"


def rounded_cache(attention: ir.Node, scales: Mapping[str, Float32]) -> None:
    """Needs a lowered GroupQueryAttention; leaves it with a cache in int8 where `scales` has its inputs' names.

    scales: float32 [1, kv_heads, 1, head_dim], positive, by `past_key_values.N.key|value`.
    """
    graph, pasts, presents = attention.graph, attention.inputs[3:5], attention.outputs[1:]
    assert graph is not None
    if not scales:
        return
    given = [add_initializer(graph, scale_name(str(past.name)), scales[str(past.name)]) for past in pasts if past]
    used = len(attention.inputs)
    attention.resize_inputs(_INPUTS + len(given))
    assert used <= _INPUTS
    for index, scale in enumerate(given, start=_INPUTS):
        attention.replace_input_with(index, scale)
    for name, value in _ATTRIBUTES.items():
        attention.attributes[name] = ir.convenience.convert_attribute(name, value)
    for cache in (*pasts, *presents):
        if cache is not None:
            cache.type = ir.TensorType(ir.DataType.INT8)
