"""Repeat the one traced decoder layer: a graph of any depth for the price of tracing one layer."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .formats import EMBEDDING
from .graph import nodes_of, past_name, present_name

_FIRST = "model.layers.0."
_PARTS = ("key", "value")


def stamp(model: ir.Model, layers: int) -> None:
    """Turn a graph of one decoder layer into one of `layers`.

    Needs RMSNormalization fused (the last one marks where the layer ends). What does not depend on the layer's input,
    its weights or its cache (mask, rotary tables) stays shared. Weights, nodes, values and the cache's inputs and
    outputs of layer N carry `model.layers.N.` and `.N.` in their names.
    """
    graph = model.graph
    gather = next(node for node in nodes_of(model, "Gather") if node.inputs[0] is graph.initializers[EMBEDDING])
    entry = gather.outputs[0]
    final_norm = next(
        node
        for node in nodes_of(model, "RMSNormalization")
        if node.inputs[1] is graph.initializers["model.norm.weight"]
    )
    exit_value = final_norm.inputs[0]
    assert exit_value is not None
    body = _layer_nodes(model, entry, exit_value)
    _name_after_scope(model, set(body))

    hidden, after = exit_value, list(exit_value.uses())
    anchor = body[-1]
    for layer in range(1, layers):
        copied = {entry: hidden}
        for part in _PARTS:
            first = _named(graph.inputs, past_name(0, part))
            copied[first] = ir.Value(name=past_name(layer, part), shape=first.shape, type=first.type)
            graph.inputs.append(copied[first])
        nodes = [_copy(node, layer, copied, graph) for node in body]
        graph.insert_after(anchor, nodes)
        anchor = nodes[-1]
        graph.outputs.extend(copied[_named(graph.outputs, present_name(0, part))] for part in _PARTS)
        hidden = copied[exit_value]
    for user, index in after:
        if user not in body:
            user.replace_input_with(index, hidden)


def _layer_nodes(model: ir.Model, entry: ir.Value, exit_value: ir.Value) -> list[ir.Node]:
    """The layer's nodes in order: they depend on its input, weights or cache, and the exit or the cache depends on
    them.
    """
    graph = model.graph
    roots = {entry, *(value for name, value in graph.initializers.items() if name.startswith(_FIRST))}
    roots |= {_named(graph.inputs, past_name(0, part)) for part in _PARTS}
    below: set[ir.Value] = set(roots)
    for node in graph:
        if any(value in below for value in node.inputs):
            below.update(node.outputs)
    wanted = {exit_value, *(_named(graph.outputs, present_name(0, part)) for part in _PARTS)}
    body: list[ir.Node] = []
    for node in reversed(list(graph)):
        if any(output in wanted for output in node.outputs) and any(output in below for output in node.outputs):
            if node is entry.producer():
                continue
            body.append(node)
            wanted.update(value for value in node.inputs if value is not None)
    return body[::-1]


def _name_after_scope(model: ir.Model, body: set[ir.Node]) -> None:
    """Name nodes and values after the module that made them: `model.layers.0.self_attn.q_proj/MatMul`."""
    taken: dict[str, int] = {}
    fixed = set(model.graph.outputs)
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "").strip("[]").replace("'", "").split(", ")
        scope = scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""
        if node not in body and scope.startswith(_FIRST.rstrip(".")):
            scope = "model.rotary_emb"  # made while a layer was fused, shared by all
        name = f"{scope or 'model'}/{node.op_type}"
        taken[name] = count = taken.get(name, 0) + 1
        node.name = name if count == 1 else f"{name}_{count}"
        node.metadata_props.clear()
        for index, output in enumerate(node.outputs):
            if output not in fixed:
                output.name = f"{node.name}:{index}" if len(node.outputs) > 1 else node.name


def _copy(node: ir.Node, layer: int, copied: dict[ir.Value, ir.Value], graph: ir.Graph) -> ir.Node:
    """`node` for another layer; `copied` maps layer 0's values to that layer's, and grows by the node's outputs."""
    inputs = [None if value is None else _input(value, layer, copied, graph) for value in node.inputs]
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=_renamed(str(node.name), layer),
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        new.name = _renamed(str(old.name), layer).replace("present.0.", f"present.{layer}.")
        copied[old] = new
    return copy


def _input(value: ir.Value, layer: int, copied: dict[ir.Value, ir.Value], graph: ir.Graph) -> ir.Value:
    if value in copied:
        return copied[value]
    name = str(value.name)
    if not (value.is_initializer() and name.startswith(_FIRST)):
        return value  # shared by all layers
    weight = ir.Value(name=_renamed(name, layer), shape=value.shape, type=value.type)
    graph.initializers[str(weight.name)] = weight
    copied[value] = weight
    return weight


def _renamed(name: str, layer: int) -> str:
    return name.replace(_FIRST, f"model.layers.{layer}.").replace("model.layers.0/", f"model.layers.{layer}/")


def _named(values: Sequence[ir.Value], name: str) -> ir.Value:
    return next(value for value in values if value.name == name)
