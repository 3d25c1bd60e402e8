"""The frontier of quality against bytes: its arithmetic, its bookkeeping, its picture. No peers are needed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from llama_export.benchmarks import frontier, frontier_report, frontier_tools, scatter
from llama_export.benchmarks.frontier_report import Figures, bootstrap, difference, summaries, summary, verdict
from llama_export.benchmarks.scatter import Point
from llama_export.benchmarks.workers import quality
from support.hf_models import write_llama_folder

LENGTH, VOCAB = 37, 11


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (3, LENGTH))


def logits_of(seed: int, scale: float = 4) -> quality.Logits:
    """A model whose logits depend on the window and the position alone."""
    return lambda window: (
        np.random.default_rng([seed, *window]).standard_normal((len(window), VOCAB)).astype(np.float32) * scale + 70
    )


def test_figures_are_those_of_the_definition(tmp_path: Path, ids: np.ndarray) -> None:
    original, other = logits_of(1), logits_of(2)
    quality.write_reference(original, ids, tmp_path / "reference")
    found = quality.measure(other, tmp_path / "reference")
    for index, window in enumerate(ids):
        p, q = softmax(original(window)), softmax(other(window))
        assert found["kl"][index] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-3)
        assert found["top1"][index] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
        assert found["nll"][index] == pytest.approx(-np.log(q[np.arange(LENGTH - 1), window[1:]]).mean(), rel=1e-5)


def test_the_original_against_itself_differs_by_float16_alone(tmp_path: Path, ids: np.ndarray) -> None:
    quality.write_reference(logits_of(1), ids, tmp_path / "reference")
    found = quality.measure(logits_of(1), tmp_path / "reference")
    assert max(found["kl"]) < 1e-5
    assert found["top1"] == [1, 1, 1]
    assert found["nll"] == pytest.approx(np.load(tmp_path / "reference/original.npz")["losses"].mean(1), rel=1e-5)


def test_padding_of_the_vocabulary_is_left_out_and_nan_is_refused(tmp_path: Path, ids: np.ndarray) -> None:
    quality.write_reference(logits_of(1), ids, tmp_path / "reference")
    padded = quality.measure(
        lambda window: np.pad(logits_of(1)(window), ((0, 0), (0, 5)), constant_values=200), tmp_path / "reference"
    )
    assert max(padded["kl"]) < 1e-5
    with pytest.raises(ValueError, match="not finite in window 0"):
        quality.measure(lambda window: np.full((LENGTH, VOCAB), np.nan, np.float32), tmp_path / "reference")


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_error() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    found = bootstrap([values])
    error = values.std() / 20
    assert found.value == values.mean()
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    twice = bootstrap([values, np.full(7, 1.0)])  # texts weigh the same, however many windows they have
    assert twice.value == pytest.approx((values.mean() + 1) / 2)
    assert twice.high - twice.low == pytest.approx(1.96 * error, rel=0.1)


def made(tool: str, group: str, size: int, kl: np.ndarray, model: str = "seed 0", text: str = "a") -> Figures:
    count = len(kl)
    return Figures(tool, group, model, text, size, kl.tolist(), [0.5] * count, [2.0] * count, [1.5] * count)


def test_tools_are_compared_window_by_window_with_the_best_of_ours_that_is_no_larger() -> None:
    hard = np.random.default_rng(0).uniform(0.1, 2, 30)  # windows differ by far more than tools do
    noise = np.random.default_rng(1).normal(0, 0.02, 30)
    results = [
        *(made("peer", "peer", 100, hard, model) for model in ("seed 0", "seed 1")),
        made("ours small", "ours", 90, hard * 0.95),
        made("ours equal", "ours", 100, hard * 0.96),
        made("ours large", "ours", 101, hard * 0.2),
        made("tie", "peer", 95, hard * 0.95 + noise - noise.mean()),
        made("far smaller", "peer", 80, hard * 3),
    ]
    found = {one.tool: one for one in summaries(results)}
    assert list(found) == ["far smaller", "ours small", "tie", "peer", "ours equal", "ours large"]
    ours = [one for one in found.values() if one.group == "ours"]
    best = frontier_report.rival(found["peer"], ours)
    assert best is not None
    assert best.tool == "ours small"
    gap = difference(best, found["peer"])
    assert gap is not None
    assert verdict(gap) == "ours is better"
    assert verdict(bootstrap([hard - 1.03 * hard.mean()])) == "tie"
    assert frontier_report.rival(found["far smaller"], ours) is None
    told = frontier_report.markdown(list(found.values()), "ours")
    assert "| peer | ours small, 0.0 MB | 0.95 |" in told
    assert "| tie | ours small, 0.0 MB | 1.00 |" in told
    assert told.count("tie |\n") + told.endswith("tie |") == 1
    assert "far smaller | ours" not in told


def test_a_summary_takes_the_mean_over_seeds_before_windows_are_drawn() -> None:
    windows = np.linspace(0.1, 1, 25)
    one = summary([made("t", "g", 10, windows)])
    twice = summary([made("t", "g", 10, windows), made("t", "g", 12, windows, model="seed 1")])
    assert twice.kl == one.kl  # another seed with the same figures tells nothing new of windows
    assert twice.bytes == 11
    assert twice.perplexity == {"a": pytest.approx(np.exp(2))}
    assert twice.original_perplexity == {"a": pytest.approx(np.exp(1.5))}
    assert difference(one, replace(twice, cells={})) is None


def test_the_picture_has_every_point_where_it_belongs_and_joins_the_frontier() -> None:
    points = [
        Point("ours <4 bits>", "ours", 80, 0.5, 0.4, 0.6),
        Point("ours worse", "ours", 90, 0.7, 0.6, 0.8),
        Point("ours 8 bits", "ours", 140, 0.01, 0.005, 0.02),
        Point("peer", "peer", 100, 0.1, 0.05, 0.2),
    ]
    root = ET.fromstring(scatter.scatter(points, "KL & bytes", "MB", "nats", joined="ours"))
    space = "{http://www.w3.org/2000/svg}"
    dots = {dot[0].text.split(":")[0]: dot for dot in root.iter(f"{space}circle") if len(dot)}
    assert dots.keys() == {point.label for point in points}
    x = {name: float(dot.get("cx")) for name, dot in dots.items()}
    y = {name: float(dot.get("cy")) for name, dot in dots.items()}
    assert x["ours <4 bits>"] < x["ours worse"] < x["peer"] < x["ours 8 bits"]
    assert y["peer"] - y["ours worse"] == pytest.approx(  # down a logarithmic scale
        (y["ours 8 bits"] - y["peer"]) * np.log(7) / np.log(10), abs=0.2
    )
    (line,) = root.iter(f"{space}polyline")
    assert len(line.get("points").split()) == 2  # the one that is larger and worse is no part of it
    words = [text.text for text in root.iter(f"{space}text")]
    assert {point.label for point in points} <= set(words)


def test_labels_keep_out_of_each_others_way() -> None:
    points = [Point(f"a rather long name {n}", "g", 100 + n, 0.1 * (1 + n / 50), 0.1, 0.12) for n in range(4)]
    points.append(Point("far", "g", 200, 0.01, 0.009, 0.02))
    scale = scatter.scale_of(points)
    places = scatter.place_labels(points, scale)
    boxes = [
        scatter.Box(left, base - 9, left + 6.3 * len(point.label), base + 2)
        for (left, base), point in zip(places, points, strict=True)
    ]
    assert not any(one.meets(other) for index, one in enumerate(boxes) for other in boxes[:index])


def test_needed_bytes_leave_out_what_running_needs_not(tmp_path: Path) -> None:
    for name, size in {
        "model.onnx": 10,
        "reference/a.npz": 100,
        "quality.json": 50,
        "LICENSE": 7,
        "engine/p": 5,
    }.items():
        file = tmp_path / "bundle" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
    assert frontier_tools.needed_bytes(tmp_path / "bundle") == 15
    assert frontier_tools.needed_bytes(tmp_path / "bundle/model.onnx") == 10
    (tmp_path / "bundle" / frontier_tools.COUNTED).write_text('{"bytes": 3}')
    assert frontier_tools.needed_bytes(tmp_path / "bundle") == 3


def test_specs_and_texts_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NAME: OPTIONS"):
        frontier_tools.ours("--precision int4", exact=False)
    (tmp_path / "text.txt").write_text("word " * 9)
    assert frontier.parse_text(f"{tmp_path / 'text.txt'}:5") == frontier.Text(tmp_path / "text.txt", 5)
    assert frontier.parse_text(str(tmp_path / "text.txt")).skip == 0
    with pytest.raises(ValueError, match="there is no text"):
        frontier.parse_text(f"{tmp_path / 'text.txt'}:five")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_folder(tmp_path_factory.mktemp("frontier") / "model", tied=True)


def test_windows_are_spread_over_the_text_after_what_is_skipped(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file = tmp_path / "text.txt"
    file.write_text("SKIPPED" * 3 + "".join(f"line {number} of it. " for number in range(200)))
    found = frontier.windows_of(frontier.Text(file, 21), tokenizer, 5, 32)
    assert found.shape == (5, 32)
    whole = tokenizer.encode(file.read_text()[21:], add_special_tokens=False).ids
    assert found[0].tolist() == whole[:32]
    assert found[-1].tolist() == whole[-32:]
    assert found[2].tolist() == whole[(start := (len(whole) - 32) // 2) : start + 32]
    with pytest.raises(ValueError, match="needs 640000"):
        frontier.windows_of(frontier.Text(file, 0), tokenizer, 20000, 32)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["frontier.py", *map(str, arguments)])
    return frontier.main()


def test_a_bundle_is_measured_once_and_drawn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a quick brown fox. " * 60)
    places = ("--work", tmp_path / "work", "--json", tmp_path / "found.json", "--picture", tmp_path / "found.svg")
    common = (folder, *places, "--text", text, "--windows", 2, "--length", 48, "--seed", 4, "--threads", 1)
    assert run(monkeypatch, *common, "--exact", "--ours", "four: --precision int4") == 0
    told = capsys.readouterr().out
    content = json.loads((tmp_path / "found.json").read_text())
    assert [(one["tool"], one["model"], one["text"]) for one in content["results"]] == [
        ("four", "seed 4", "text.txt"),
        ("four, full-precision kernels", "seed 4", "text.txt"),
    ]
    for one in content["results"]:
        assert len(one["kl"]) == 2
        assert all(0 < value < 1 for value in one["kl"])
        assert one["nll"] == pytest.approx(one["original_nll"], rel=0.1)
    assert "four" in told
    ET.parse(tmp_path / "found.svg")
    assert not list((tmp_path / "work").glob("*/made"))

    monkeypatch.setattr(frontier.Bench, "original", lambda *_: pytest.fail("it was measured already"))
    assert run(monkeypatch, *common, "--exact", "--ours", "four: --precision int4") == 0
    assert run(monkeypatch, *common, "--sigma", "0.7") == 1
    assert "another sigma" in capsys.readouterr().err


def test_a_tool_that_fails_leaves_the_others_measured_and_nothing_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(original: frontier_tools.Original, place: Path) -> None:
        place.write_bytes(bytes(9))

    def fail(original: frontier_tools.Original, place: Path) -> None:
        make(original, place)
        raise RuntimeError("no such type")

    python, package = sys.executable, "numpy"
    chosen = [frontier_tools.Tool(one.__name__, "peer", python, package, "worker.py", one) for one in (fail, make)]
    (tmp_path / "reference").mkdir()
    np.savez(tmp_path / "reference/original.npz", losses=np.ones((2, 5)))
    monkeypatch.setattr(frontier.Bench, "reference", lambda *_: tmp_path / "reference")
    figures = {"kl": [0.1, 0.2], "top1": [1.0, 0.9], "nll": [1.1, 1.2]}
    monkeypatch.setattr(frontier_tools, "measure", lambda *_, exact: [figures])
    bench = frontier.Bench(str(folder), 0.5, tmp_path / "work", 1, {"a": np.ones((2, 6), np.int64)}, "org/model")
    store = frontier.Store(tmp_path / "found.json", {"sigma": 0.5})
    assert frontier.measure_all(bench, chosen, [frontier.AS_IS], store) == ["fail on as is"]
    assert "no such type" in capsys.readouterr().err
    assert store.figures() == [Figures("make", "peer", "as is", "a", 9, original_nll=[1.0, 1.0], **figures)]
    assert frontier.Store(tmp_path / "found.json", {"sigma": 0.5}).figures() == store.figures()
    assert [path.name for path in (tmp_path / "work/model-as-is").iterdir()] == ["original"]


def test_peers_are_asked_for_by_their_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(*arguments: str) -> list[str]:
        base = ["frontier.py", "model", "--work", "w", "--json", "j", "--text", "t"]
        monkeypatch.setattr(sys, "argv", [*base, *arguments])
        return [tool.name for tool in frontier.chosen_tools(frontier.parse())]

    assert asked("--genai", "py", "--ours", "a: --precision int4") == [
        "a",
        *(f"genai {method}" for method in frontier_tools.GENAI_METHODS),
    ]
    names = asked("--llamacpp", "py", "--llamacpp-types", "Q4_0,Q8_0", "--imatrix", "text")
    assert names == ["llama.cpp Q4_0", "llama.cpp Q8_0", "llama.cpp Q4_0 imatrix", "llama.cpp Q8_0 imatrix"]
    assert asked("--modelopt", "py", "--modelopt-text", "t") == ["modelopt INT4_AWQ"]
    with pytest.raises(ValueError, match="--modelopt-text"):
        asked("--modelopt", "py")
