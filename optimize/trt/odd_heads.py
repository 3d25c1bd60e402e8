"""Heads whose dimension TensorRT's attention kernels do not take are padded with zeros.

NVIDIA names 16 <= head_dim <= 256 and multiples of 8 (github.com/NVIDIA/TensorRT/issues/2981, from its developer
guide); TensorRT-RTX 1.7 builds Attention for these and refuses 8, 20, 100 and 264. Zeros add nothing to a product of
queries and keys, and make values that are cut off again.
"""

from __future__ import annotations

import onnx_ir as ir

from ...errors import LlamaExportError
from ..graph import Recorder, ints, nodes_of, producer

_MULTIPLE, _LEAST, _MOST = 8, 16, 256


def cache_head_dim(head_dim: int) -> int:
    """The head dimension of the `trt` dialect's cache: padded where it has to be.

    Raises LlamaExportError for heads beyond all kernels.
    """
    if head_dim > _MOST:
        raise LlamaExportError(
            f"The model's heads have {head_dim} values and TensorRT's attention takes up to {_MOST}; use --backend "
            "onnxruntime."
        )
    return max(_LEAST, -(-head_dim // _MULTIPLE) * _MULTIPLE)


def pad_heads(model: ir.Model) -> None:
    """Needs the queries, keys and values rotated; leaves Attention and TensorScatter on heads of `cache_head_dim`."""
    for attention in nodes_of(model, "Attention"):
        query, result = attention.inputs[0], attention.outputs[0]
        assert query is not None and query.shape is not None
        head_dim = int(query.shape[3])  # type: ignore[arg-type]
        wanted = cache_head_dim(head_dim)
        if wanted == head_dim:
            continue
        _pad_input(model.graph, attention, 0, wanted)
        for cache in attention.inputs[1:3]:
            scatter = producer(cache, "TensorScatter")
            assert scatter is not None
            _pad_input(model.graph, scatter, 1, wanted)
            for value in (scatter.inputs[0], scatter.outputs[0]):
                assert value is not None and value.shape is not None
                value.shape = ir.Shape([*value.shape[:3], wanted])
        _cut(model.graph, attention, result, head_dim, wanted)


def _pad_input(graph: ir.Graph, node: ir.Node, index: int, wanted: int) -> None:
    x = node.inputs[index]
    assert x is not None and x.shape is not None
    record = Recorder(f"{node.name}/padding")
    padded = record("Pad", x, ints(graph, *[0] * 7, wanted - int(x.shape[3])), mode="constant")  # type: ignore[arg-type]
    padded.shape, padded.type = ir.Shape([*x.shape[:3], wanted]), x.type
    graph.insert_before(node, record.nodes)
    node.replace_input_with(index, padded)


def _cut(graph: ir.Graph, attention: ir.Node, result: ir.Value, head_dim: int, wanted: int) -> None:
    record, users = Recorder(f"{attention.name}/cut"), list(result.uses())
    cut = record("Slice", result, ints(graph, 0), ints(graph, head_dim), ints(graph, 3))
    cut.shape, cut.type = result.shape, result.type
    assert result.shape is not None
    result.shape = ir.Shape([*result.shape[:3], wanted])
    graph.insert_after(attention, record.nodes)
    for user, index in users:
        user.replace_input_with(index, cut)
