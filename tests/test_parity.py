"""How far logits are apart: the figures that verify gates, against direct computation."""

from __future__ import annotations

import numpy as np
import pytest
from llama_export.runtime.proof.parity import Comparison, compare
from llama_export.runtime.proof.reference import TOP, Logits, compress

Float32 = np.ndarray


def random_logits(rows: int, vocab: int, *, seed: int = 0, spread: float = 4.0) -> Float32:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def direct_kl(reference: Float32, logits: Float32) -> np.ndarray:
    """KL divergence over the whole vocabulary in float64, by its definition."""

    def log_probabilities(values: Float32) -> np.ndarray:
        wide = values.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))

    p, q = log_probabilities(reference), log_probabilities(logits)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


@pytest.mark.parametrize("vocab", [2, 63, 64, 65, 257, 4000])
def test_equal_logits_differ_by_nothing(vocab: int) -> None:
    logits = random_logits(7, vocab)
    found = compare(compress(logits), logits)
    assert found.difference.shape == found.kl.shape == found.shortfall.shape == (7,)
    assert (found.difference == 0).all()
    assert (found.shortfall == 0).all()
    assert found.kl.max() < 1e-12


@pytest.mark.parametrize("vocab", [2, 33, TOP])
@pytest.mark.parametrize("change", [0.01, 0.3, 3.0])
def test_kl_of_a_vocabulary_that_is_kept_whole(vocab: int, change: float) -> None:
    reference = random_logits(9, vocab)
    logits = reference + random_logits(9, vocab, seed=1, spread=change)
    assert compare(compress(reference), logits).kl == pytest.approx(direct_kl(reference, logits), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("change", [0.05, 0.5])
def test_kl_of_a_large_vocabulary_is_a_lower_bound_and_close(change: float) -> None:
    """Putting the tail into one bucket can only lose divergence; with peaked logits it loses little."""
    reference = random_logits(20, 5000, spread=3)
    logits = reference + random_logits(20, 5000, seed=1, spread=change)
    kept, whole = compare(compress(reference), logits).kl, direct_kl(reference, logits)
    assert (kept <= whole + 1e-12).all()
    assert kept.mean() > 0.4 * whole.mean()


def test_certainty_is_no_divergence() -> None:
    """Large logits, all probability in the top: what is left for the rest is rounding, and rounding must not count."""
    reference = random_logits(200, 500, spread=2)
    reference[:, :20] += np.float32(60)
    logits = reference + random_logits(200, 500, seed=1, spread=1e-6)
    assert compare(compress(reference), logits).kl.max() < 1e-8


def test_kl_ignores_a_shift_of_all_logits() -> None:
    reference = random_logits(4, 300)
    assert compare(compress(reference), reference + np.float32(5)).kl.max() < 1e-5


def test_kl_sees_a_tail_that_grows() -> None:
    """The top stays exactly as it is, all else becomes likely."""
    reference = random_logits(5, 3000)
    logits = reference.copy()
    tail = np.argsort(logits, axis=1)[:, :-TOP]
    np.put_along_axis(logits, tail, np.take_along_axis(logits, tail, axis=1) + np.float32(8), axis=1)
    assert compare(compress(reference), logits).kl.min() > 0.1


def test_difference_is_the_largest_of_what_is_kept() -> None:
    reference = random_logits(3, 1000)
    kept = compress(reference)
    top, sampled = int(kept.top_ids[1, 5]), int(kept.sample_ids[17])
    unseen = next(i for i in range(1000) if i not in set(kept.sample_ids) | set(kept.top_ids.reshape(-1)))
    logits = reference.copy()
    logits[0, sampled] += np.float32(0.5)
    logits[1, top] -= np.float32(0.25)
    logits[2, unseen] -= np.float32(4)
    assert compare(kept, logits).difference == pytest.approx([0.5, 0.25, 0], abs=1e-6)


def test_shortfall_is_what_the_reference_thinks_of_the_choice() -> None:
    reference = np.zeros((4, 500), np.float32)
    reference[:, :100] = 100 - np.arange(100, dtype=np.float32)
    logits = reference.copy()
    logits[1, 1] = 1000  # second best: one below
    logits[2, 40] = 1000
    logits[3, 300] = 1000  # not among the kept: at least as far below as the last of them
    assert compare(compress(reference), logits).shortfall.tolist() == [0, 1, 40, TOP - 1]


def test_ties_are_no_shortfall() -> None:
    reference = np.array([[5, 5, 1], [1, 5, 5]], np.float32)
    logits = np.array([[5, 6, 1], [1, 6, 5]], np.float32)
    assert compare(compress(reference), logits).shortfall.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_infinitely_far(bad: float) -> None:
    reference = random_logits(3, 400)
    logits = reference.copy()
    unseen = next(i for i in range(400) if i not in set(compress(reference).sample_ids))
    logits[1, unseen] = bad
    with np.errstate(all="raise"):
        found = compare(compress(reference), logits)
    for values in (found.difference, found.kl, found.shortfall):
        assert values[1] == np.inf
        assert np.isfinite(values[[0, 2]]).all()


def test_huge_differences_stay_numbers() -> None:
    reference = random_logits(2, 100)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = compare(compress(reference), np.where(reference > 0, np.float32(3e38), np.float32(-3e38)))
    assert found.difference.min() > 1e38
    assert not np.isnan(found.kl).any()


def test_joined_keeps_the_order() -> None:
    reference = random_logits(5, 90)
    kept, logits = compress(reference), reference + random_logits(5, 90, seed=3)
    whole = compare(kept, logits)
    parts = [compare(kept.rows(start, stop), logits[start:stop]) for start, stop in ((0, 2), (2, 5))]
    joined = Comparison.joined(parts)
    for name in ("difference", "kl", "shortfall"):
        assert (getattr(joined, name) == getattr(whole, name)).all()


def test_a_reference_of_float16_logits_compares_too() -> None:
    """The shipped kernels' logits are compared with what was kept of another run, in whatever precision that was."""
    half = random_logits(3, 200).astype(np.float16).astype(np.float32)
    assert isinstance(compress(half), Logits)
    assert (compare(compress(half), half).difference == 0).all()
