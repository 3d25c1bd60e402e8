"""SmoothQuant's choice: rounded as the bundle rounds, compared on tokens that the scales do not know."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from llama_export.export import smooth as module
from llama_export.export.smooth import (
    LEAST_SCALE,
    MARGINS,
    REACH,
    Seen,
    in_parts,
    input_scale,
    rounded_rows,
    smooth,
)
from llama_export.optimize.equivalence import Seam
from llama_export.optimize.formats import FP8, INT8_ROW, Format
from llama_export.optimize.quantise import dequantise, quantise

COLUMNS = 48
PLAIN = Seam(("norm",), ("a", "b"), COLUMNS, COLUMNS)
SHARED = Seam(("v",), ("o",), COLUMNS // 2, 8, 2)


def seen_of(*sequences: torch.Tensor, every: int = 3) -> Seen:
    seen = Seen.nothing(sequences[0].shape[1])
    for sequence in sequences:
        seen.add(sequence, every)
    return seen


def random_values(rows: int, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * random_values(rows, seed=100 + seed)


def rows_of(*matrices: torch.Tensor) -> list[module.Rows]:
    def rows(one: torch.Tensor) -> module.Rows:
        def parts() -> Iterable[torch.Tensor]:
            return in_parts(one, 200)

        return parts

    return [rows(one) for one in matrices]


@pytest.mark.parametrize("format", [INT8_ROW, FP8], ids=lambda format: format.name)
def test_rows_are_rounded_as_the_writer_rounds_them(format: Format) -> None:
    rows = torch.cat([matrix(40), torch.zeros(1, COLUMNS), -matrix(3).abs(), matrix(3).abs()])
    expected = dequantise(quantise(rows.numpy(), format), COLUMNS)
    np.testing.assert_allclose(rounded_rows(rows, format).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_what_is_kept_is_of_two_halves_and_their_largest_of_all_tokens() -> None:
    first, second, third = random_values(10), random_values(7, seed=1), random_values(5, seed=2)
    seen = seen_of(first, second, third, every=4)
    assert torch.equal(seen.largest[0], torch.cat([first, third]).abs().amax(0))
    assert torch.equal(seen.largest[1], second.abs().amax(0))
    assert torch.equal(seen.whole, torch.cat([first, second, third]).abs().amax(0))
    assert torch.equal(seen.other, second[::4])
    assert torch.equal(seen_of(first).other, first[::3])


@pytest.mark.parametrize("format", [INT8_ROW, FP8], ids=lambda format: format.name)
@pytest.mark.parametrize("seam", [PLAIN, SHARED], ids=["each channel its own", "shared by heads"])
def test_outlier_channels_move_into_the_weights(seam: Seam, format: Format) -> None:
    outlying = torch.ones(COLUMNS)
    outlying[[3, 3 + seam.width * (seam.times - 1)]] = 60
    values = [random_values(90, seed=seed) * outlying for seed in range(4)]
    weights = rows_of(matrix(30) / outlying, matrix(21, 1) / outlying)
    found, plain = (smooth(one, seen_of(*values), weights, format) for one in (seam, None))
    assert plain.factors is None
    if format == FP8:  # whose numbers have digits of their own at every size
        assert found.noise <= plain.noise < 0.04
        return
    assert found.factors is not None
    assert found.factors.shape == (seam.channels,)
    assert found.factors.argmax() == 3
    assert found.factors[3] > 8 * np.median(found.factors)
    assert found.noise < 0.03
    assert plain.noise > 0.1
    inputs = torch.cat(values).abs().amax(0) / torch.from_numpy(seam.columns(found.factors))
    assert min(abs(found.amax / float(inputs.max()) - margin) for margin in MARGINS) < 1e-4


def test_what_needs_no_smoothing_is_hardly_touched() -> None:
    values = [random_values(200, seed=seed) for seed in range(4)]
    found = smooth(PLAIN, seen_of(*values), rows_of(matrix(30)), INT8_ROW)
    plain = smooth(None, seen_of(*values), rows_of(matrix(30)), INT8_ROW)
    assert plain.noise < 0.03
    assert found.noise == pytest.approx(plain.noise, rel=0.3)
    assert found.factors is None or found.factors.max() < 2 * found.factors.min()


def test_channels_that_another_text_reaches_further_with_get_a_margin() -> None:
    even = [torch.sign(random_values(60, seed=seed)) for seed in range(4)]  # so the known half reaches 1 everywhere
    even[1], even[3] = 2.2 * even[1], 2.2 * even[3]
    found = smooth(PLAIN, seen_of(*even, every=1), rows_of(matrix(30)), INT8_ROW)
    known = smooth(PLAIN, seen_of(*even[::2], every=1), rows_of(matrix(30)), INT8_ROW)
    assert found.amax / 2.2 == pytest.approx(2.5 * known.amax / MARGINS[0], rel=0.3)
    assert known.noise < found.noise < 0.05


def test_factors_stay_where_float16_holds_what_they_make() -> None:
    outlying = torch.logspace(-2.5, 2.5, COLUMNS)
    values = [random_values(50, seed=seed) * outlying for seed in range(2)]
    found = smooth(PLAIN, seen_of(*values), rows_of(matrix(30) / outlying), INT8_ROW)
    assert found.factors is not None
    assert found.factors.max() == REACH
    assert found.factors.min() == np.float32(1 / REACH)


def test_inputs_and_weights_that_are_zero_do_no_harm() -> None:
    values = [random_values(50, seed=seed) for seed in range(2)]
    for value in values:
        value[:, 7] = 0
    weights = matrix(30)
    weights[:, 9] = 0
    weights[4] = 0
    found = smooth(PLAIN, seen_of(*values), rows_of(weights), INT8_ROW)
    assert found.factors is None or np.isfinite(found.factors).all()
    assert found.noise < 0.05
    nothing = smooth(PLAIN, seen_of(torch.zeros(9, COLUMNS)), rows_of(weights), INT8_ROW)
    assert nothing.noise == 0
    assert input_scale(nothing.amax, INT8_ROW) == LEAST_SCALE


def test_how_rows_are_cut_changes_nothing() -> None:
    seen, weights = seen_of(*(random_values(90, seed=seed) for seed in range(2))), matrix(33)
    whole = smooth(PLAIN, seen, [lambda: [weights]], INT8_ROW)
    parts = smooth(PLAIN, seen, [lambda: in_parts(weights, 5 * COLUMNS)], INT8_ROW)
    assert parts.noise == pytest.approx(whole.noise, rel=1e-4)
    assert parts.amax == whole.amax
