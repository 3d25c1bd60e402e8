"""How large an adapter is where it stays beside the weights, before there is a graph to ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from ...optimize.formats import EMBEDDING
from ...optimize.tensors import SourceTensor
from .peft_folder import Adapter

_SAME_INPUT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q_k_v"),
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp"),
}
"""Projections that become one product, with the ranks of all its parts (see `optimize.shared.pack_linears`)."""


def numbers_beside(adapter: Adapter, tensors: Mapping[str, SourceTensor]) -> int:
    """How many numbers its matrices hold in the bundle; fewer where formats keep projections of one input apart."""
    products: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and name != EMBEDDING:
            module, _, projection = name.removesuffix(".weight").rpartition(".")
            products[module, _SAME_INPUT.get(projection, projection)].append(name)
    total = 0
    for names in products.values():
        rank = sum(adapter.parts[name].rank for name in names if name in adapter.parts)
        total += rank * (tensors[names[0]].shape[1] + sum(tensors[name].shape[0] for name in names))
    return total
