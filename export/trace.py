"""transformers' own model of the family, traced without weights: one decoder layer, which `optimize.stamp` repeats.

The model is built under FakeTensorMode, so nothing is allocated. Its attention and its cache are replaced through the
interfaces that transformers offers for that (AttentionInterface, the `past_key_values` object) by the standard ops
Attention and TensorScatter of opset 24, so the graph has one op where the backends have one kernel.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedConfig

from ..optimize.formats import EMBEDDING, HEAD
from ..optimize.graph import INV_FREQ, past_name, present_name
from .families import classes
from .rotary import frequencies, with_fixed_rope

OPSET = 24
_ATTENTION = "llama_export_onnx"


class _OnnxCache:
    """Stands in for transformers' Cache: new keys [batch, kv_heads, sequence, head_dim] go into a static buffer
    [batch, kv_heads, context, head_dim] at each row's write index [batch]."""

    def __init__(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], write_indices: torch.Tensor
    ) -> None:
        self.keys, self.values, self.write_indices = list(keys), list(values), write_indices

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        for buffers, new in ((self.keys, key), (self.values, value)):
            old = buffers[layer]
            buffers[layer] = torch.onnx.ops.symbolic(
                "TensorScatter",
                (old, new, self.write_indices),
                {"axis": -2, "mode": "linear"},
                dtype=old.dtype,
                shape=old.shape,
                version=OPSET,
            )
        return self.keys[layer], self.values[layer]


def _onnx_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function as one Attention op: [batch, heads, sequence, head_dim] in, sequence first
    out."""
    result = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, mask),
        {"scale": float(scaling)},
        dtype=query.dtype,
        shape=query.shape,
        version=OPSET,
    )
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _onnx_attention)


class _Step(torch.nn.Module):
    """One call of the model on new tokens and the cache of the earlier ones, with its mask made from the positions."""

    def __init__(self, model: torch.nn.Module, context: int, window: int | None) -> None:
        super().__init__()
        self.model, self.context, self.window = model, context, window

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        cache = _OnnxCache(keys, values, position_ids[:, 0])
        # A key is visible when its index is at most the query's position: causal, and blind to unwritten cache.
        keys_at, queries_at = torch.arange(self.context)[None, None, None, :], position_ids[:, None, :, None]
        mask = keys_at <= queries_at
        if self.window is not None:
            mask = mask & (keys_at > queries_at - self.window)
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits, cache.keys, cache.values


def window_of(config: PreTrainedConfig) -> int | None:
    """The latest tokens that a token sees, itself included; None for all. Of a config whose layers are alike."""
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return getattr(config, "sliding_window", None) if kinds[0] == "sliding_attention" else None


def trace(config: PreTrainedConfig, *, context: int, layers: int = 1, dtype: torch.dtype = torch.float32) -> ir.Model:
    """Trace `layers` decoder layers of a model of this config, with a static cache of `context` positions, in opset 24.

    Inputs: input_ids and position_ids int64 [batch, sequence]; past_key_values.N.key|value [batch, kv_heads, context,
    head_dim]. Outputs: logits [batch, sequence, vocab]; present.N.key|value like the past. Initializers carry their
    Hugging Face names and no values, but for the rotary frequencies, which are computed here by transformers from the
    config and, where their type is dynamic, the context. A sliding window as long as the context is left out.
    """
    turns, window = frequencies(config, context), window_of(config)
    config = with_fixed_rope(config)
    _keep_layers(config, layers)
    config._attn_implementation = _ATTENTION
    with _default_dtype(dtype), FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        model = classes(config.model_type).model(config).eval()
        step = _Step(model, context, None if window is None or window >= context else window)
        example, dynamic = _example(config, context, layers, dtype)
        program = torch.export.export(step, example, dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(
            program, example, dynamo=True, opset_version=OPSET, dynamic_shapes=dynamic, optimize=False, verbose=False
        )
    assert exported is not None
    _rename(exported.model, layers)
    exported.model.graph.initializers[INV_FREQ].const_value = ir.tensor(turns, name=INV_FREQ)
    return exported.model


def _keep_layers(config: PreTrainedConfig, layers: int) -> None:
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]


def _example(
    config: PreTrainedConfig, context: int, layers: int, dtype: torch.dtype
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Example inputs (fake tensors) and which of their dimensions vary; sizes of 2 and 3, since 0 and 1 would
    specialise.
    """
    free = torch.export.Dim.DYNAMIC
    tokens = torch.zeros((2, 3), dtype=torch.long)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    buffers = [torch.empty((2, config.num_key_value_heads, context, head_dim), dtype=dtype)] * (2 * layers)
    keys, values = ([buffer.clone() for buffer in half] for half in (buffers[:layers], buffers[layers:]))
    example = (tokens, tokens.clone(), keys, values)
    return example, ({0: free, 1: free}, {0: free, 1: free}, [{0: free}] * layers, [{0: free}] * layers)


def _rename(model: ir.Model, layers: int) -> None:
    """Give inputs, outputs, weights and free dimensions the names of the ecosystem instead of torch's."""
    graph = model.graph
    past = [past_name(layer, part) for part in ("key", "value") for layer in range(layers)]
    present = [present_name(layer, part) for part in ("key", "value") for layer in range(layers)]
    for value, name in zip(graph.inputs, ["input_ids", "position_ids", *past], strict=True):
        value.name = name
    for value, name in zip(graph.outputs, ["logits", *present], strict=True):
        value.name = name
    by_layer = [(kind, index) for index in range(layers) for kind in (0, layers)]
    graph.inputs[2:] = [graph.inputs[2 + kind + index] for kind, index in by_layer]
    graph.outputs[1:] = [graph.outputs[1 + kind + index] for kind, index in by_layer]
    tied = not any("embed_tokens" in name for name in graph.initializers)
    for value in list(graph.initializers.values()):
        name = str(value.name).removeprefix("model.")  # the wrapper's own attribute
        value.name = EMBEDDING if tied and name == HEAD else name
        value.const_value = None
    tokens = graph.inputs[0].shape
    assert tokens is not None
    names = {str(tokens[0]): "batch", str(tokens[1]): "sequence"}
    for value in graph.inputs:
        for dimension in value.shape or ():
            if isinstance(dimension, ir.SymbolicDim):
                names.setdefault(str(dimension), "batch")
    for value in [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([names.get(str(size), size) for size in value.shape])


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter speaks of torchvision and of deprecated pytree calls; neither concerns the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
