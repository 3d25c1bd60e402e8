"""Choosing tokens: each filter by its definition, the whole against transformers, seeds, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime.sampling import (
    Sampler,
    SamplingOptions,
    distribution,
    greedy,
    min_p,
    penalise,
    top_k,
    top_p,
)


def logits_of(probabilities: list[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.log(np.array(probabilities)).astype(np.float32)


def everything(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(len(logits))


def test_greedy_takes_the_first_of_equals() -> None:
    assert greedy(np.array([1, 3, 2, 3], np.float32)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_not_a_number_is_never_sampled(bad: float, temperature: float) -> None:
    logits = np.zeros(7, np.float32)
    logits[4] = bad
    with pytest.raises(LlamaExportError, match="verify"):
        Sampler(SamplingOptions(temperature=temperature)).pick(logits)


def test_tokens_of_probability_zero_are_no_fault() -> None:
    logits = np.full(7, -math.inf, np.float32)
    logits[3] = 2
    assert Sampler(SamplingOptions(temperature=1.0, top_k=3, top_p=0.9, min_p=0.1, seed=1)).pick(logits) == 3


def test_top_k_keeps_equals_of_the_last() -> None:
    logits = np.array([0, 5, 3, 3, 1], np.float32)
    assert top_k(logits, everything(logits), 2).tolist() == [1, 2, 3]
    assert top_k(logits, everything(logits), 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("p", "kept"), [(0.01, [2]), (0.49, [2]), (0.51, [1, 2]), (0.81, [1, 2]), (0.82, [1, 2, 3]), (0.999, [0, 1, 2, 3])]
)
def test_top_p_keeps_until_p_is_reached(p: float, kept: list[int]) -> None:
    logits = logits_of([0.0625, 0.3125, 0.5, 0.125])
    assert top_p(logits, everything(logits), p).tolist() == kept


@pytest.mark.parametrize("p", [0.3, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary_equals_a_full_sort(p: float) -> None:
    logits = np.random.default_rng(3).standard_normal(5003).astype(np.float32)
    weights = np.exp(logits.astype(np.float64))
    order = np.argsort(-weights)
    before = (np.cumsum(weights[order]) - weights[order]) / weights.sum()
    assert top_p(logits, everything(logits), p).tolist() == sorted(order[before < p].tolist())


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = logits_of([0.4, 0.1, 0.041, 0.039])
    assert min_p(logits, everything(logits), 0.1).tolist() == [0, 1, 2]
    assert min_p(logits, everything(logits), 0.0).tolist() == [0, 1, 2, 3]


def test_penalty_lowers_both_signs_and_leaves_the_input() -> None:
    logits = np.array([2, -2, 1], np.float32)
    assert penalise(logits, np.array([0, 1]), 2.0).tolist() == [1, -4, 1]
    assert logits.tolist() == [2, -2, 1]


def test_penalty_remembers_prompt_and_picks() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=10.0), prompt=[3, 3])
    logits = np.array([1, 2, 3, 9], np.float32)
    assert [sampler.pick(logits) for _ in range(3)] == [2, 1, 0]


def test_top_p_sees_what_top_k_left() -> None:
    # of four equals, top_k 2 keeps all four ties; of distinct ones it renormalises: 0.5 / 0.8 = 0.625 reaches 0.6 alone
    kept, probabilities = distribution(
        logits_of([0.5, 0.3, 0.15, 0.05]), SamplingOptions(temperature=1.0, top_k=2, top_p=0.6)
    )
    assert kept.tolist() == [0]
    assert probabilities.tolist() == [1.0]


def test_temperature_comes_before_top_p() -> None:
    logits = logits_of([0.5, 0.3, 0.2])
    assert len(distribution(logits, SamplingOptions(temperature=1.0, top_p=0.5))[0]) == 1
    assert len(distribution(logits, SamplingOptions(temperature=3.0, top_p=0.5))[0]) == 2


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=11))
    logits = logits_of([0.1, 0.2, 0.7])
    counts = np.bincount([sampler.pick(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.2, 0.7], atol=0.03)


def test_a_seed_repeats_and_its_tokens_never_change() -> None:
    logits = np.linspace(-2, 2, 301).astype(np.float32)
    options = SamplingOptions(temperature=0.9, top_k=200, top_p=0.95, seed=5)
    first, second = Sampler(options), Sampler(options)
    tokens = [first.pick(logits) for _ in range(8)]
    assert tokens == [second.pick(logits) for _ in range(8)]
    assert tokens == [287, 288, 262, 231, 171, 246, 249, 167]
    other = Sampler(SamplingOptions(temperature=0.9, top_k=200, top_p=0.95, seed=6))
    assert tokens != [other.pick(logits) for _ in range(8)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-5),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("seed", -3),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*, not {value}"):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0.7, top_k=20),
        SamplingOptions(temperature=1.3, top_p=0.8),
        SamplingOptions(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ],
)
def test_the_order_is_that_of_transformers(options: SamplingOptions) -> None:
    torch = pytest.importorskip("torch", reason="the comparison needs PyTorch")
    generation = pytest.importorskip(
        "transformers.generation.logits_process", reason="the comparison needs transformers"
    )
    logits = (np.random.default_rng(2).standard_normal(997) * 3).astype(np.float32)
    prompt = [1, 5, 700, 5]
    scores = torch.from_numpy(logits[None].copy())
    ids = torch.tensor([prompt])
    steps = [generation.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)]
    steps.append(generation.TemperatureLogitsWarper(options.temperature))
    steps += [generation.TopKLogitsWarper(options.top_k)] if options.top_k else []
    steps += [generation.TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
    steps += [generation.MinPLogitsWarper(options.min_p)] if options.min_p else []
    for step in steps:
        scores = step(ids, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    seen = np.unique(prompt)
    kept, probabilities = distribution(penalise(logits, seen, options.repetition_penalty), options)
    assert kept.tolist() == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(probabilities, expected[kept], rtol=1e-4)
