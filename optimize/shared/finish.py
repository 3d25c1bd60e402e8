"""The end of every lowering: one of each node, the last weights described, nodes in order, versions."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from ..graph import sizes_of
from ..quantise import dense_format
from ..stored import Stored, parts_of, store, stored_of


def finish(model: ir.Model, opsets: Mapping[str, int], ir_version: int) -> None:
    """Needs the matrices described; leaves no node twice or unused, norm weights and biases described too, and the
    versions of the operators (by domain) and of the file written down.
    """
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _describe_vectors(model.graph)
    common.TopologicalSortPass()(model)
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update(opsets)
    model.ir_version = ir_version


def _describe_vectors(graph: ir.Graph) -> None:
    """Norm weights and biases are stored plainly, in the dtype of the activations."""
    for name, value in list(graph.initializers.items()):
        if value.const_value is None and stored_of(value) is None and value.dtype is not None:
            content = Stored(parts_of(value), dense_format(value.dtype.numpy()), "values")
            store(graph, name, sizes_of(value), value.dtype, content)
