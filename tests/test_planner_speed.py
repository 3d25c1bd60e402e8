"""Predicted speeds: every published row lies within its range or says why not, and the arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from llama_export.export.published import published_configs
from llama_export.targets.devices import load_target
from llama_export.targets.planner_published import Row, predicted, published
from llama_export.targets.planner_speed import (
    BANDWIDTH_EFFICIENCY,
    LAYER_OVERHEAD_SECONDS,
    QUANTISED_EFFICIENCY,
    Step,
    bandwidth,
    dense_tflops,
    step_rate,
)

ROWS = [
    pytest.param(row, id=f"{row.device} {row.stack} {row.model} {row.kind} {row.tokens_per_second}")
    for row in published().rows
]


@pytest.mark.parametrize("row", ROWS)
def test_a_published_speed_is_predicted_or_its_exception_is_explained(row: Row) -> None:
    assert predicted(row).holds(row.tokens_per_second) != bool(row.exception)


@pytest.mark.parametrize("row", ROWS)
def test_a_published_speed_has_its_source_and_a_known_model(row: Row) -> None:
    assert row.source.endswith("read 2026-11")
    assert row.model in published().models
    assert row.kind in ("decode", "prefill")


def test_exceptions_are_few() -> None:
    assert len([row for row in published().rows if row.exception]) <= 2


def test_the_shapes_of_published_llamas_are_theirs() -> None:
    configs = published_configs()
    for name, shape in published().models.items():
        if name.startswith("llama"):
            config = configs[name]
            assert (shape.layers, shape.hidden, shape.heads, shape.ffn, shape.vocab) == tuple(
                config[key]
                for key in (
                    *("num_hidden_layers", "hidden_size", "num_attention_heads"),
                    *("intermediate_size", "vocab_size"),
                )
            )
            assert shape.kv_heads == config.get("num_key_value_heads", shape.heads)


def test_the_range_of_bandwidth_is_what_the_best_and_most_rows_reach() -> None:
    """Neither end may be moved without a row that asks for it."""
    decode = [row for row in published().rows if row.kind == "decode" and not row.exception]
    assert all(row.tokens_per_second >= 0.75 * predicted(row).high * 0.6 / 0.9 for row in decode)
    assert max(row.tokens_per_second / predicted(row).high for row in decode) > 0.95
    assert min(row.tokens_per_second / predicted(row).low for row in decode) < 1.1


STEP = Step(weight_bytes=600_000_000, cache_bytes=40_000_000, products=1000, layers=10, quantised=True, tokens=3)


def test_a_step_takes_its_bytes_and_its_pauses() -> None:
    found = step_rate(STEP, 100, None)
    assert found is not None
    for end, value in enumerate((found.low, found.high)):
        seconds = 0.0064 / BANDWIDTH_EFFICIENCY[end] + 10 * LAYER_OVERHEAD_SECONDS[end]
        assert value == pytest.approx(3 / seconds)


def test_a_step_takes_the_longer_of_bytes_and_products() -> None:
    assert step_rate(STEP, 100, 1) == step_rate(STEP, 100, None)
    many = replace(STEP, products=10**12)
    found = step_rate(many, 100, 10)
    assert found is not None
    assert found.low == pytest.approx(3 / (0.2 / QUANTISED_EFFICIENCY[0] + 10 * LAYER_OVERHEAD_SECONDS[0]))
    dense = step_rate(replace(many, quantised=False), 100, 10)
    assert dense is not None
    assert dense.low > found.low


def test_nothing_is_predicted_without_a_bandwidth() -> None:
    assert step_rate(STEP, bandwidth(load_target("cpu")), None) is None


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("l4", "fp16", 121),  # dense as it stands
        ("jetson-orin-nano-8gb", "fp16", 10),  # 40 sparse INT8: 20 dense, 10 in FP16
        ("jetson-agx-orin-64gb", "int8", 82.5),  # 275 sparse with the DLAs' 40 %
        ("jetson-thor-t5000", "nvfp4", 1035),
        ("jetson-thor-t5000", "fp16", 258.75),
    ],
)
def test_peaks_are_dense_and_without_the_dlas(name: str, format: str, expected: float) -> None:
    assert dense_tflops(load_target(name), format) == pytest.approx(expected)


def test_a_super_mode_has_its_own_figures() -> None:
    nano = load_target("jetson-orin-nano-8gb")
    assert (bandwidth(nano), bandwidth(nano, boosted=True)) == (68, 102)
    assert dense_tflops(nano, boosted=True) == pytest.approx(67 / 4)
    assert bandwidth(load_target("l4"), boosted=True) == 300, "a card has one mode"


def test_an_unknown_peak_stays_unknown() -> None:
    assert dense_tflops(load_target("cpu")) is None
