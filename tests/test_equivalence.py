"""Channel scales that move between tensors: whatever they are, the model computes the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.export.config import ModelShape
from llama_export.optimize.equivalence import (
    Factors,
    Seam,
    all_seams,
    factors_of,
    last_seams,
    scaled,
    seams_of,
)
from llama_export.optimize.formats import EMBEDDING, FP32, HEAD, INT8, int_format
from llama_export.optimize.quantise import blocks_of
from llama_export.optimize.tensors import Float32, SourceTensor
from support.graphs import VARIANTS, llama, logits_of, source_tensors

NAMES = ("into attention", "values to o", "into the MLP", "up to down")


def shape_of(model: Any) -> ModelShape:
    return ModelShape.from_config(json.loads(model.config.to_json_string()))


def random_scales(seams: Any, seed: int = 0) -> dict[Seam, Float32]:
    generator = np.random.default_rng(seed)
    return {seam: np.exp(generator.standard_normal(seam.channels)).astype(np.float32) for seam in seams}


def twin_of(model: Any, tensors: Mapping[str, SourceTensor]) -> Any:
    """The same model on these tensors, read in pieces of three rows."""
    twin = type(model)(model.config).eval()
    pieces = {
        name: [tensor.read(start, min(start + 3, tensor.shape[0])) for start in range(0, tensor.shape[0], 3)]
        for name, tensor in tensors.items()
    }
    twin.load_state_dict(
        {name: torch.from_numpy(np.concatenate(parts)) for name, parts in pieces.items()}, strict=False
    )
    twin.tie_weights()
    return twin


def off_by(model: Any, tensors: Mapping[str, SourceTensor]) -> float:
    """The largest difference of logits, over the largest logit."""
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, (2, 19))
    expected, found = logits_of(model, ids), logits_of(twin_of(model, tensors), ids)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_model_stays_the_same_whatever_moves(variant: str) -> None:
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    seams = list(all_seams(tensors, shape_of(model)))
    assert len(seams) == 4 * model.config.num_hidden_layers + (HEAD in tensors)
    moved = scaled(tensors, random_scales(seams))
    assert off_by(model, moved) < 1e-5
    kept = {name for name in tensors if np.array_equal(moved[name].read(0, 1), tensors[name].read(0, 1))}
    attended = {"q_proj.bias", "k_proj.bias", "gate_proj.bias", "o_proj.bias", "down_proj.bias"}
    last = set() if HEAD in tensors else {"model.norm.weight"}
    assert kept == {EMBEDDING, *last, *(name for name in tensors if name.split(".", 4)[-1] in attended)}


@pytest.mark.parametrize("number", range(4), ids=NAMES)
@pytest.mark.parametrize("variant", ["biased", "grouped", "one-kv-head", "qwen2", "head-dim-20"])
def test_each_seam_alone_leaves_the_model(variant: str, number: int) -> None:
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    seam = seams_of(tensors, shape_of(model), 1)[number]
    assert off_by(model, scaled(tensors, random_scales([seam]))) < 1e-5


@pytest.mark.parametrize("number", range(4), ids=NAMES)
def test_a_seam_without_one_of_its_tensors_changes_the_model(number: int) -> None:
    model = llama(**VARIANTS["biased"])
    tensors = source_tensors(model)
    seam = seams_of(tensors, shape_of(model), 1)[number]
    moved = scaled(tensors, random_scales([seam]))
    for name in (*seam.producers, *seam.consumers):
        assert off_by(model, {**moved, name: tensors[name]}) > 1e-3, name


def test_biases_belong_to_the_rows_that_are_divided() -> None:
    model = llama(**VARIANTS["qwen2"])
    seams = seams_of(source_tensors(model), shape_of(model), 2)
    prefix = "model.layers.2.self_attn.v_proj."
    assert seams[1].producers == (f"{prefix}weight", f"{prefix}bias")
    assert not any("bias" in name for seam in seams for name in seam.consumers)


def test_heads_that_share_values_share_their_factors() -> None:
    seam = Seam(("v",), ("o",), 6, 3, 2)
    factors = np.arange(1, 7, dtype=np.float32)
    assert seam.columns(factors).tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert seam.channels_of(np.arange(12, dtype=np.float32)).tolist() == [3, 4, 5, 9, 10, 11]
    assert seam.channels_of(seam.columns(factors)[None]).tolist() == [factors.tolist()]


def test_a_tied_head_has_no_seam() -> None:
    model = llama()
    assert not last_seams(source_tensors(model), shape_of(model))
    untied = llama(tie_word_embeddings=False)
    (seam,) = last_seams(source_tensors(untied), shape_of(untied))
    assert seam.consumers == (HEAD,)


def values(rows: int, columns: int) -> SourceTensor:
    array = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    return SourceTensor("w", array.shape, "F32", FP32, lambda start, stop: array[start:stop])


def test_what_a_checkpoint_reads_is_never_written_to() -> None:
    tensor = values(5, 7)
    before = tensor.read(0, 5).copy()
    for factors in (
        Factors(np.full(5, 2, np.float32)),
        Factors(None, np.full(7, 2, np.float32)),
        Factors(np.full(5, 0.5, np.float32), np.full(7, 4, np.float32)),
    ):
        np.testing.assert_array_equal(factors.of_rows(tensor.read(1, 4), 1), 2 * before[1:4])
    np.testing.assert_array_equal(tensor.read(0, 5), before)


def test_factors_of_several_seams_at_a_tensor_are_multiplied() -> None:
    first, second = Seam(("a",), ("w",), 7, 7), Seam(("w",), ("b",), 5, 5)
    factors = factors_of({first: np.full(7, 4, np.float32), second: np.full(5, 2, np.float32)})
    assert factors.keys() == {"a", "w", "b"}
    assert factors["w"].rows is not None
    assert factors["w"].columns is not None
    np.testing.assert_array_equal(factors["w"].of_rows(np.ones((5, 7), np.float32)), np.full((5, 7), 2))
    assert (factors["a"].columns, factors["b"].rows) == (None, None)


def test_codes_of_a_checkpoint_go_where_values_change() -> None:
    plain = values(5, 64)
    for format in (INT8, int_format(8, 16, offsets=True)):
        own = SourceTensor("w", plain.shape, "Q8_0", format, plain.read, blocks_of(plain, INT8), np.arange(64))
        seam = Seam(("w",), ("b",), 5, 5)
        found = scaled({"w": own, "x": own}, {seam: np.full(5, 0.5, np.float32)})
        assert found["x"] is own
        assert (found["w"].blocks, found["w"].order) == (None, None)
        assert found["w"].format == int_format(8, format.block)
        np.testing.assert_array_equal(found["w"].read(2, 5), 2 * plain.read(2, 5))
        assert found["w"].largest == 2 * plain.largest


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, 1e-45])
def test_scales_that_are_no_positive_numbers_are_refused(bad: float) -> None:
    scale = np.ones(5, np.float32)
    scale[3] = bad
    with pytest.raises(ValueError, match="no positive number"):
        scaled({"w": values(5, 7)}, {Seam(("w",), ("b",), 5, 5): scale})


def test_scales_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="has 5 channels to scale, not"):
        factors_of({Seam(("w",), ("b",), 5, 5): np.ones(7, np.float32)})
