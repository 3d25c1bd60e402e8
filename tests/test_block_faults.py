"""One wrong bit in any part of blocks that come quantised: zero points, orders of columns, offsets, blocks of 16."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_export.runtime.bundle import Bundle, open_bundle
from llama_export.runtime.proof.reference import EXACT, WeightRecord
from llama_export.runtime.proof.reference_file import load_index_of_bundle
from llama_export.runtime.proof.weights import compare_weights
from llama_export.runtime.session import read_graph, weight_places
from support import faults
from test_gguf_build import MIXES
from test_gguf_build import build as build_gguf
from test_gguf_build import write as write_gguf
from test_prequantised_build import made as build_quantised

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bundle of a GPTQ checkpoint whose columns are sorted, and one of a GGUF file of K-quants; each built once."""
    place = tmp_path_factory.mktemp("blocks")

    def bundle(kind: str) -> Path:
        folder = place / kind.replace(" ", "-")
        if not folder.exists():
            folder.mkdir()
            if kind in MIXES:
                write_gguf(folder / "m.gguf", MIXES[kind])
                build_gguf(folder, "-t", "cpu")
            else:
                build_quantised(kind, folder)
        return folder / "bundle"

    return bundle


def differing(bundle: Bundle) -> set[str]:
    index = load_index_of_bundle(bundle.path, EXACT)
    found = compare_weights(bundle, (*index.weights, *index.tables), lambda done, total: None, threads=2)
    return {difference.name for difference in found}


def first_number(bundle: Bundle, record: WeightRecord, role: str) -> int:
    """Where the record begins in the initializer of this role, counted in its numbers."""
    places = weight_places(bundle, read_graph(bundle))
    return record.row * math.prod(places[record.initializers[role]].shape[1:]) if role != "order" else 0


@pytest.mark.parametrize(
    ("kind", "tensor", "format", "role", "bit"),
    [
        ("gptq sorted", f"{LAYER}self_attn.v_proj.weight", "int4-zeros", "zeros", 0),
        ("gptq sorted", f"{LAYER}mlp.down_proj.weight", "int4-zeros", "zeros", 4),
        ("gptq sorted", f"{LAYER}mlp.down_proj.weight", "int4-zeros", "codes", 7),
        ("gptq sorted", f"{LAYER}self_attn.o_proj.weight", "int4-zeros", "order", 0),
        ("gptq sorted", f"{LAYER}self_attn.o_proj.weight", "int4-zeros", "order", 62),
        ("K", "model.embed_tokens.weight", "int4-b16-offset", "offsets", 0),
        ("K", f"{LAYER}self_attn.k_proj.weight", "int4-offset", "offsets", 31),
        ("K", f"{LAYER}mlp.up_proj.weight", "int8-offset", "offsets", 0),
        ("K", f"{LAYER}self_attn.q_proj.weight", "int4-b16", "scales", 0),
        ("K", f"{LAYER}self_attn.o_proj.weight", "int8-b16", "codes", 0),
    ],
)
def test_a_wrong_bit_is_found(
    kind: str, tensor: str, format: str, role: str, bit: int, bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = open_bundle(faults.copy_of(bundles(kind), tmp_path / "copy", changed=faults.DATA))
    index = load_index_of_bundle(copy.path, EXACT)
    record = next(one for one in index.weights if one.name == tensor)
    assert record.format == format
    assert differing(copy) == set()
    faults.flip(record.initializers[role], bit, at=first_number(copy, record, role))(copy.path)
    order = record.initializers.get("order") if role == "order" else None
    sharing = {one.name for one in index.weights if order is not None and one.initializers.get("order") == order}
    assert differing(copy) == ({order, *sharing} if order is not None else {tensor})
