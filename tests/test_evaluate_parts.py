"""The pieces of an evaluation, each against what it should be by the book: windows, intervals, divergence, ledger."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from llama_export.errors import UsageError
from llama_export.progress import Silent
from llama_export.runtime.evaluate import likelihood
from llama_export.runtime.evaluate.divergence import divergences
from llama_export.runtime.evaluate.inputs import MAX_BYTES, read_text
from llama_export.runtime.evaluate.intervals import Estimate, mean, quantile, student, wilson
from llama_export.runtime.evaluate.ledger import Ledger
from llama_export.runtime.evaluate.likelihood import log_probabilities, logits_after
from llama_export.runtime.evaluate.windows import Window, tokens_of, windows_of
from llama_export.runtime.text import Tokenizer
from support.fake_backend import FakeBackend
from support.tiny_bundle import byte_tokenizer


class Warned(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def test_windows_without_overlap_score_all_but_each_first_token() -> None:
    assert windows_of(11, 4, 4) == [Window(0, 4, 1), Window(4, 8, 5), Window(8, 11, 9)]
    assert windows_of(9, 4, 4) == [Window(0, 4, 1), Window(4, 8, 5)]  # the ninth token has none before it


@pytest.mark.parametrize(("count", "window", "stride"), [(23, 7, 3), (23, 7, 1), (8, 8, 5), (2, 9, 9), (30, 10, 9)])
def test_windows_that_overlap_score_every_token_but_the_first_once(count: int, window: int, stride: int) -> None:
    found = windows_of(count, window, stride)
    scored = [token for one in found for token in range(one.first, one.stop)]
    if stride < window:
        assert scored == list(range(1, count))
    assert all(one.start < one.first < one.stop <= one.start + window for one in found)
    assert [one.start for one in found] == [stride * number for number in range(len(found))]


def test_windows_are_those_of_transformers_guide() -> None:
    count, window, stride = 50, 16, 6
    expected, before = [], 0  # the loop of the guide "Perplexity of fixed-length models"
    for begin in range(0, count, stride):
        end = min(begin + window, count)
        expected.append(Window(begin, end, max(end - (end - before), begin + 1)))
        before = end
        if end == count:
            break
    assert windows_of(count, window, stride) == expected


@pytest.mark.parametrize("bos", [True, False])
def test_bytes_of_scored_tokens_add_up(bos: bool) -> None:
    text = "Größe, 東京 🙂 and so on"
    tokens = tokens_of(text, Tokenizer(byte_tokenizer(bos=bos)))
    assert len(tokens.ids) == len(text.encode()) + bos
    windows = windows_of(len(tokens.ids), 7, 3)
    first = 0 if bos else 1
    assert sum(map(tokens.bytes_scored, windows)) == len(text.encode()) - first
    assert sorted(tokens.starts) == list(tokens.starts)


@pytest.mark.parametrize("text", ["", "a"])
def test_one_token_alone_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="fewer than two tokens"):
        tokens_of(text, Tokenizer(byte_tokenizer(bos=False)))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"abc\xff", r"not UTF-8 \(byte 3\)"), ("é".encode("utf-16"), "not UTF-8")],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_text(tmp_path / "text")


def test_absent_and_huge_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="There is no file"):
            read_text(path)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UsageError, match="more than"):
        read_text(tmp_path / "huge")


def test_students_quantiles() -> None:
    told = {1: 12.706, 4: 2.776, 9: 2.262, 10: 2.228, 12: 2.179, 20: 2.086, 60: 2.000, 1000: 1.962}
    assert {freedom: round(student(freedom), 3) for freedom in told} == told


def test_the_mean_of_equal_groups_has_students_interval() -> None:
    groups = [3.0, 5.0, 4.0, 8.0]
    found = mean([10 * value for value in groups], [10] * 4)
    reach = 3.182446 * np.std(groups, ddof=1) / 2
    assert found.value == 5
    assert found.low == pytest.approx(5 - reach, rel=1e-4)
    assert found.high == pytest.approx(5 + reach, rel=1e-4)


def test_a_small_last_group_counts_by_its_members() -> None:
    found = mean([20.0, 22.0, 9.0], [10, 10, 1])
    assert found.value == pytest.approx(51 / 21)
    assert found.high - found.value < mean([2.0, 2.2, 9.0], [1, 1, 1]).high


def test_the_means_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        groups = generator.normal(1.0, 0.3, 8)
        found = mean(list(groups * 5), [5] * 8)
        hits += found.low <= 1.0 <= found.high
    assert 0.935 < hits / 2000 < 0.965


def test_quantiles_and_their_intervals() -> None:
    generator = np.random.default_rng(1)
    groups = [generator.exponential(size=50).tolist() for _ in range(40)]
    found = quantile(groups, 0.5)
    assert found.value == pytest.approx(np.quantile(np.concatenate(groups), 0.5), rel=0.01)
    assert found.low < math.log(2) < found.high
    assert found == quantile(groups, 0.5)  # the seed is fixed
    assert quantile(groups[:1], 0.99).low is None


def test_wilsons_interval() -> None:
    found = wilson(81, 263)  # the example of Newcombe, Statistics in Medicine 17, 1998
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 5).low == 0
    assert wilson(5, 5).high == 1


def test_an_estimate_of_one_has_no_interval() -> None:
    assert mean([3.0], [2]).to_json() == {"value": 1.5, "interval": None}
    assert Estimate(1.0, 0.0, 2.0).mapped(math.exp).to_json() == {"value": math.e, "interval": [1.0, math.exp(2)]}


def test_log_probabilities_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_BLOCK_BYTES", 8 * 31 * 2)
    logits = np.random.default_rng(2).normal(scale=30, size=(7, 31)).astype(np.float32)
    targets = [0, 30, 5, 5, 7, 9, 11]
    exact = logits.astype(np.float64)
    expected = [row[t] - math.log(math.fsum(map(math.exp, row))) for row, t in zip(exact, targets, strict=True)]
    assert log_probabilities(logits, targets) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_logit_is_never_missed(bad: float) -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[1, 4] = bad
    found = log_probabilities(logits, [0, 0, 0])
    assert np.isfinite(found).tolist() == [True, False, True]
    assert np.isfinite(divergences(logits, logits)[0]).tolist() == [True, False, True]


def test_divergence_by_the_book() -> None:
    generator = np.random.default_rng(3)
    one, other = (generator.normal(scale=3, size=(5, 37)).astype(np.float32) for _ in range(2))
    other[4] = one[4]
    p, q = (np.exp(side.astype(np.float64)) for side in (one, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kl, same = divergences(one, other)
    assert kl == pytest.approx((p * np.log(p / q)).sum(1), rel=1e-9)
    assert same.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert kl[4] == 0
    assert same[4]


def test_what_the_original_excludes_costs_nothing() -> None:
    one = np.array([[0.0, -np.inf, 0.0]], np.float32)
    kl, _ = divergences(one, np.array([[0.0, 0.0, 0.0]], np.float32))
    assert kl[0] == pytest.approx(math.log(3 / 2))
    assert divergences(np.zeros((1, 3), np.float32), one)[0][0] == math.inf


def test_logits_come_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "SLICE_BYTES", 4 * 261 * 3)
    backend = FakeBackend(0, [])
    places = [(start, len(logits)) for start, logits in logits_after(backend, list(range(10)), 2)]
    assert places == [(2, 3), (5, 3), (8, 2)]
    assert backend.computed == [2, 3, 3, 2]


def test_a_ledger_remembers_its_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Ledger({"what": "x"}, Silent()) as ledger:
        assert ledger.found == 0
        ledger.append({"a": 0.1})
        ledger.append({"a": (1.0, 2.0)})
    with Ledger({"what": "x"}, Silent()) as again:
        assert again.items == ledger.items == [{"item": 0, "a": 0.1}, {"item": 1, "a": [1.0, 2.0]}]
        assert again.found == 2
    with Ledger({"what": "y"}, Silent()) as other:
        assert other.found == 0
    with Ledger({"what": "x"}, Silent(), restart=True) as anew:
        assert anew.found == 0
    assert Ledger({"what": "x"}, Silent()).found == 0


def test_a_ledger_believes_no_number_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Ledger({"what": "x"}, Silent()) as ledger:
        ledger.append({"a": float("nan")})
    assert Ledger({"what": "x"}, Silent()).found == 0


@pytest.mark.parametrize(
    "tail",
    [b'{"item":2,"a', b'{"item":2}', b"\0" * 40, b'{"item":1}\n', b"[]\n", b'{"item":3}\n', b"[" * 100_000 + b"\n"],
)
def test_what_a_kill_or_a_fault_leaves_behind_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: bytes
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Ledger({}, Silent()) as ledger:
        ledger.append({"a": 1})
        ledger.append({"a": 2})
    assert ledger.path is not None
    with ledger.path.open("ab") as file:
        file.write(tail)
    with Ledger({}, Silent()) as again:
        assert [item["a"] for item in again.items] == [1, 2]
        again.append({"a": 3})
    lines = [json.loads(line) for line in ledger.path.read_bytes().splitlines()]
    assert [line.get("item") for line in lines] == [None, 0, 1, 2]


def test_a_file_with_another_head_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Ledger({}, Silent()) as ledger:
        ledger.append({"a": 1})
    assert ledger.path is not None
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b"schema_version", b"schema_virsion"))
    assert Ledger({}, Silent()).found == 0


def test_without_a_folder_that_can_be_written_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    progress = Warned()
    with Ledger({}, progress) as ledger:
        ledger.append({"a": 1})
    assert ledger.items == [{"item": 0, "a": 1}]
    assert len(progress.texts) == 1
    assert "cannot be kept" in progress.texts[0]


def test_a_disk_that_is_full_ends_the_keeping_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    progress = Warned()
    with Ledger({}, progress) as ledger:
        full = Path("/dev/full")
        if not full.exists():
            pytest.skip("this system has no /dev/full")
        ledger._file = full.open("ab")
        for number in range(3):
            ledger.append({"a": number})
    assert [item["a"] for item in ledger.items] == [0, 1, 2]
    assert len(progress.texts) == 1
