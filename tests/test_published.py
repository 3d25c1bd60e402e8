"""Every published Llama: what its config says, and that it traces and lowers to the bytes that are planned for it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from llama_export.export.canonical import canonical
from llama_export.export.config import check_config, expected_tensors, transformers_config
from llama_export.export.published import Published, published, published_configs
from llama_export.export.rotary import rotary_tables
from llama_export.export.write import lay_out, placements
from llama_export.optimize.formats import BF16, stored_bytes
from llama_export.optimize.ort import OrtOptions, lower
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.tensors import Float32, SourceTensor

CONTEXT = 256

SIZES = {
    "llama-1": {"7b": 6.7, "13b": 13.0, "30b": 32.5, "65b": 65.3},
    "llama-2": {"7b": 6.7, "13b": 13.0, "70b": 69.0},
    "codellama": {"7b": 6.7, "13b": 13.0, "34b": 33.7, "70b": 69.0},
    "llama-3": {"8b": 8.0, "70b": 70.6},
    "llama-3.1": {"8b": 8.0, "70b": 70.6, "405b": 405.9},
    "llama-3.2": {"1b": 1.2, "3b": 3.2},
    "llama-3.3": {"70b": 70.6},
}
"""Billions of parameters, as papers and model cards round them."""


def distinct() -> dict[str, Published]:
    """One model of each network: those that differ in constants and tables only need not be traced twice."""
    found: dict[tuple[object, ...], str] = {}
    for name, model in published().items():
        shape = check_config(model.config)
        sizes = (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn, shape.vocab)
        found.setdefault((*sizes, shape.tied), name)
    return {name: published()[name] for name in found.values()}


def test_every_size_is_there_and_as_large_as_published() -> None:
    expected = {f"{family}-{size}": billions for family, sizes in SIZES.items() for size, billions in sizes.items()}
    assert {name: round(model.parameters / 1e9, 1) for name, model in published().items()} == expected


@pytest.mark.parametrize("model", published().values(), ids=published())
def test_a_config_makes_the_published_number_of_parameters(model: Published) -> None:
    assert check_config(model.config).parameters() == model.parameters


@pytest.mark.parametrize("model", published().values(), ids=published())
def test_transformers_reads_a_config_as_it_is_meant(model: Published) -> None:
    config = transformers_config(model.config)
    assert config.rms_norm_eps == model.config["rms_norm_eps"]
    assert config.rope_parameters["rope_theta"] == model.config.get("rope_theta", 10_000.0)
    assert config.rope_parameters["rope_type"] == model.config.get("rope_scaling", {}).get("rope_type", "default")
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    assert config.max_position_embeddings == model.config["max_position_embeddings"]


def test_families_differ_in_what_they_are_known_for() -> None:
    configs = published_configs()
    assert {name for name, config in configs.items() if config["tie_word_embeddings"]} == {
        "llama-3.2-1b",
        "llama-3.2-3b",
    }
    assert {name for name, config in configs.items() if config["rms_norm_eps"] == 1e-6} == {
        "llama-1-7b",
        "llama-1-13b",
        "llama-1-30b",
    }
    assert {name: config["vocab_size"] for name, config in configs.items() if name.startswith("codellama")} == {
        "codellama-7b": 32016,
        "codellama-13b": 32016,
        "codellama-34b": 32000,
        "codellama-70b": 32016,
    }
    assert configs["llama-3.1-8b"]["rope_scaling"]["factor"] == 8.0
    assert configs["llama-3.2-1b"]["rope_scaling"]["factor"] == 32.0
    assert "rope_scaling" not in configs["llama-3-8b"]


def test_a_config_that_is_handed_out_may_be_changed() -> None:
    published_configs()["llama-3.1-8b"]["rope_scaling"]["factor"] = 1.0
    assert published_configs()["llama-3.1-8b"]["rope_scaling"]["factor"] == 8.0
    with pytest.raises(TypeError):
        published()["llama-3.1-8b"].config["vocab_size"] = 1  # type: ignore[index]


def weightless(config: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint of this config, of which none may be read."""

    def read(start: int, stop: int) -> Float32:
        raise AssertionError("nothing of a weight may be read before it is written")

    return {name: SourceTensor(name, shape, "BF16", BF16, read) for name, shape in expected_tensors(config).items()}


@pytest.mark.parametrize("model", distinct().values(), ids=distinct())
def test_it_traces_and_lowers_to_the_bytes_that_are_planned(model: Published) -> None:
    config, tensors = transformers_config(model.config), weightless(model.config)
    shape, formats = check_config(model.config), plan_formats(tensors, "int4")
    graph = canonical(config, context=CONTEXT)
    assert Counter(node.op_type for node in graph.graph)["Attention"] == shape.layers
    lower(graph, OrtOptions(formats, rotary_tables(config, CONTEXT), 4))
    assert has_the_inputs_of(graph, shape.layers)
    assert set(placements(graph, tensors)) == set(tensors)
    layout = lay_out(graph)
    planned = sum(stored_bytes(tensor.shape, formats[name]) for name, tensor in tensors.items())
    assert sum(region.size for region in layout.regions.values()) == planned
    tables = 2 * CONTEXT * shape.head_dim // 2 * np.dtype(np.float32).itemsize
    assert sum(region.size for region in layout.tables.values()) == tables
    ends = sorted((region.offset, region.size) for region in (*layout.regions.values(), *layout.tables.values()))
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(ends))
    assert ends[-1][0] + ends[-1][1] == layout.size
    padding = 4096 * len(ends)
    assert planned + tables <= layout.size < planned + tables + padding


def has_the_inputs_of(graph: ir.Model, layers: int) -> bool:
    past = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return [value.name for value in graph.graph.inputs] == ["input_ids", "attention_mask", *past, "logits_to_keep"]
