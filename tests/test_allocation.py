"""Choosing sizes: feasible, near the best that there is, and exact at the edges."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from llama_export.optimize.allocation import (
    Option,
    Options,
    cheapest_within,
    hull,
    smallest_within,
    total_bytes,
    total_cost,
)


def random_parts(seed: int, count: int = 4) -> list[list[Option]]:
    draw = random.Random(seed)
    return [
        [
            Option(draw.randint(1, 60), draw.choice((0.0, draw.random(), draw.random() * 5)))
            for _ in range(draw.randint(1, 5))
        ]
        for _ in range(count)
    ]


def all_choices(parts: list[list[Option]]) -> list[tuple[int, float]]:
    chosen = itertools.product(*(range(len(options)) for options in parts))
    return [(total_bytes(parts, one), total_cost(parts, one)) for one in chosen]


def relaxed_cost(parts: list[list[Option]], budget: int) -> float:
    """The least cost where a step may be taken in part: no choice costs less."""
    hulls = [[options[index] for index in hull(options)] for options in parts]
    cost, left = sum(one[0].cost for one in hulls), budget - sum(one[0].bytes for one in hulls)
    steps = [(a.cost - b.cost, b.bytes - a.bytes) for one in hulls for a, b in itertools.pairwise(one)]
    for gain, more in sorted(steps, key=lambda step: -step[0] / step[1]):
        part = min(1.0, left / more)
        cost, left = cost - gain * part, left - more * part
        if part < 1:
            break
    return cost


@pytest.mark.parametrize("seed", range(40))
def test_a_budget_is_met_at_nearly_the_least_cost(seed: int) -> None:
    parts = random_parts(seed)
    every = all_choices(parts)
    largest_step = max(max(o.cost for o in options) - min(o.cost for o in options) for options in parts)
    for budget in sorted({size for size, _ in every})[:: max(1, len(every) // 40)]:
        chosen = cheapest_within(parts, budget)
        assert chosen is not None
        best = min(cost for size, cost in every if size <= budget)
        assert total_bytes(parts, chosen) <= budget
        assert best - 1e-9 <= total_cost(parts, chosen) <= relaxed_cost(parts, budget) + largest_step + 1e-9


def test_budgets_are_met_at_the_least_cost_most_of_the_time() -> None:
    met = []
    for seed in range(60):
        parts = random_parts(seed)
        every = all_choices(parts)
        for budget in sorted({size for size, _ in every}):
            chosen = cheapest_within(parts, budget)
            assert chosen is not None
            best = min(cost for size, cost in every if size <= budget)
            met.append(total_cost(parts, chosen) <= best + 1e-9)
    assert sum(met) / len(met) > 0.6


@pytest.mark.parametrize("seed", range(20))
def test_where_a_step_ends_at_the_budget_the_choice_is_the_best(seed: int) -> None:
    parts = random_parts(seed)
    every = all_choices(parts)
    hulls = [hull(options) for options in parts]
    chosen, places = [one[0] for one in hulls], [0] * len(parts)
    while True:
        budget = total_bytes(parts, chosen)
        best = min(cost for size, cost in every if size <= budget)
        assert total_cost(parts, cheapest_within(parts, budget) or []) == pytest.approx(best)
        steps = [
            ((parts[p][one[places[p]]].cost - parts[p][one[places[p] + 1]].cost)
             / (parts[p][one[places[p] + 1]].bytes - parts[p][one[places[p]]].bytes), p)
            for p, one in enumerate(hulls) if places[p] + 1 < len(one)
        ]  # fmt: skip
        if not steps:
            return
        part = max(steps)[1]
        places[part] += 1
        chosen[part] = hulls[part][places[part]]


@pytest.mark.parametrize("seed", range(40))
def test_a_cost_is_met_in_nearly_the_fewest_bytes(seed: int) -> None:
    parts = random_parts(seed)
    every = all_choices(parts)
    largest_step = max(max(o.bytes for o in options) - min(o.bytes for o in options) for options in parts)
    for most in sorted({cost for _, cost in every})[:: max(1, len(every) // 40)]:
        chosen = smallest_within(parts, most + 1e-9)
        assert chosen is not None
        assert total_cost(parts, chosen) <= most + 1e-8
        best = min(size for size, cost in every if cost <= most + 1e-9)
        assert best <= total_bytes(parts, chosen) <= best + largest_step


def test_below_the_smallest_there_is_no_choice() -> None:
    parts = random_parts(3)
    smallest = sum(min(option.bytes for option in options) for options in parts)
    least = math.fsum(min(option.cost for option in options) for options in parts)
    assert cheapest_within(parts, smallest - 1) is None
    assert total_bytes(parts, cheapest_within(parts, smallest) or []) == smallest
    assert smallest_within(parts, least - 1e-6) is None
    assert total_cost(parts, smallest_within(parts, least) or []) == pytest.approx(least)


def test_more_than_the_largest_is_not_spent() -> None:
    parts = [[Option(1, 5.0), Option(2, 1.0), Option(9, 1.0), Option(4, 2.0)], [Option(3, 0.0), Option(8, 0.0)]]
    assert cheapest_within(parts, 1000) == [1, 0]
    assert smallest_within(parts, math.inf) == [0, 0]


def test_equal_sizes_take_what_costs_less() -> None:
    parts: list[Options] = [[Option(2, 3.0), Option(2, 1.0)]]
    assert cheapest_within(parts, 2) == [1]
    assert smallest_within(parts, 3.0) == [1]


def test_the_hull_is_convex() -> None:
    options = [Option(1, 10.0), Option(2, 9.0), Option(3, 2.0), Option(3, 1.9), Option(4, 1.8), Option(8, 1.9)]
    assert hull(options) == [0, 3, 4]


def test_what_a_large_step_leaves_is_filled_by_smaller_ones() -> None:
    parts = [[Option(1, 10.0), Option(100, 0.0)], [Option(1, 1.0), Option(2, 0.95)]]
    assert cheapest_within(parts, 100) == [0, 1]
