"""genai_config.json: what it says of a model, and which defaults it falls back on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from llama_export.export.config import ModelShape
from llama_export.export.families import FAMILIES
from llama_export.export.genai_config import genai_config

SHAPE = ModelShape(
    layers=3,
    hidden=96,
    heads=6,
    kv_heads=2,
    head_dim=32,
    ffn=200,
    vocab=517,
    max_positions=8192,
    tied=True,
    rms_norm_eps=1e-5,
    longest=8192,
)


def make(shape: ModelShape = SHAPE, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "context": 640,
        "bos_token_id": 5,
        "eos_token_ids": [7, 9],
        "pad_token_id": 11,
        "generation": {},
    }
    return genai_config(shape, **settings | changes)


def test_shape_and_tokens() -> None:
    model = make()["model"]
    assert {name: model[name] for name in model if name != "decoder"} == {
        "type": "llama",
        "vocab_size": 517,
        "context_length": 640,
        "bos_token_id": 5,
        "eos_token_id": [7, 9],
        "pad_token_id": 11,
    }
    decoder = model["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (3, 6, 2)
    assert (decoder["head_size"], decoder["hidden_size"], decoder["filename"]) == (32, 96, "model.onnx")
    assert decoder["inputs"]["past_key_names"] % 2 == "past_key_values.2.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert "position_ids" not in decoder["inputs"]


def test_the_cache_is_bounded_by_the_bundle_not_by_the_model() -> None:
    search = make()["search"]
    assert search["max_length"] == 640
    assert search["past_present_share_buffer"] is True


@pytest.mark.parametrize(("pad", "ends", "expected"), [(None, [7, 9], 7), (-1, [9], 9), (0, [9], 0), (None, [], 0)])
def test_pad_token(pad: int | None, ends: list[int], expected: int) -> None:
    assert make(pad_token_id=pad, eos_token_ids=ends)["model"]["pad_token_id"] == expected


def test_absent_tokens_are_left_out() -> None:
    model = make(bos_token_id=None, eos_token_ids=[])["model"]
    assert "bos_token_id" not in model
    assert "eos_token_id" not in model


def test_sampling_follows_generation_config() -> None:
    search = make(generation={"do_sample": True, "temperature": 0.6, "top_p": None, "max_length": 20})["search"]
    assert (search["do_sample"], search["temperature"], search["top_p"], search["max_length"]) == (True, 0.6, 1.0, 640)


def test_providers() -> None:
    sessions = [make(provider=name)["model"]["decoder"]["session_options"] for name in ("cpu", "cuda")]
    assert [session["provider_options"] for session in sessions] == [[], [{"cuda": {}}]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_type_is_the_familys(family: str) -> None:
    assert make(replace(SHAPE, family=family))["model"]["type"] == family
