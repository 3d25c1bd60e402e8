"""The page: whole by itself, escaped whatever a bundle says, and pictures whose points are where the figures are."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from llama_export.runtime.proof.reports import plots
from llama_export.runtime.proof.reports.html import html_page, shown
from llama_export.runtime.proof.reports.plots import Series, log_plot
from llama_export.runtime.proof.verdict import Case, Check, Choice, Gate, LayerFigure, Moment, Verdict
from support.verdicts import PROMPTS, WAYS, case, full, gates, moment, verdict

EVIL = "</code><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\x1b\n{{ 7 * 7 }}"
_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its text; tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def of(*checks: Check) -> Verdict:
    return Verdict("bundle", "cpu", 4, checks, 0.5, 9, ())


def drawings(page: str) -> list[ET.Element]:
    """The pictures, as XML, which is stricter than HTML."""
    return [ET.fromstring(svg) for svg in re.findall(r'<svg viewBox="0 0 640.*?</svg>', page, re.DOTALL)]


def points(path: str) -> list[tuple[int, int]]:
    """The places that a path goes through."""
    found: list[tuple[int, int]] = []
    for part in filter(None, path.split("M")):
        start, _, steps = part.partition("l")
        numbers = [int(number) for number in steps.split()]
        x, y = map(int, start.split())
        for right, down in zip(numbers[::2], numbers[1::2], strict=True):
            x, y = x + right, y + down
            found.append((x, y))
    return found


# What is on it


def test_a_page_of_two_runs() -> None:
    page = Page(html_page((verdict(), verdict(broken=("chunks", PROMPTS[2]), backend="tensorrt 10.3"))))
    assert "FAILED: tensorrt 10.3: Full-precision kernels against PyTorch" in page.text
    for text in ("onnxruntime 1.32.0 cpu", "260 positions", "one piece", *WAYS[1:], *PROMPTS, "another order of sums"):
        assert text in page.text
    assert "at most 0.00137" in page.text
    assert [attributes for tag, attributes in page.found if tag == "td" and attributes.get("class") == "n bad"]
    assert page.text.count("An `ort` bundle.") == 1


def test_it_is_whole_by_itself() -> None:
    text = html_page((verdict(broken=("chunks", PROMPTS[2])),))
    page = Page(text)
    assert not {tag for tag, _ in page.found} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not {name for _, attributes in page.found for name in attributes} & {"src", "href", "srcset", "onload"}
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    policies = [one["content"] for tag, one in page.found if tag == "meta" and "http-equiv" in one]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_worst_tokens_have_both_lists_and_the_way_where_they_are_worst() -> None:
    first = dataclasses.replace(case("chunks", "code"), worst=(moment(7, kl=0.5), moment(3, kl=0.1)))
    second = dataclasses.replace(case("decode", "code"), worst=(moment(7, kl=0.9, token=" cat"), moment(2, kl=0.2)))
    text = html_page((of(Check("full", "t", (first, second))),))
    rows = re.findall(r"<tr><td class=\"n\">(\d+)</td><td><code>([^<]*)</code></td><td>([^<]*)</td>", text)
    assert rows == [("7", " cat", "decode"), ("2", " the", "decode"), ("3", " the", "chunks")]
    assert text.count("<code> word0</code> 20.00") == 6
    assert "choice bad" in text


def test_a_bisection_is_shown() -> None:
    rows = [
        {"layer": layer, "group": "attention", "op": f"/l{layer}/MatMul", "measured": 0.5 if layer == 3 else 1e-6}
        | {"limit": 1e-4, "passed": layer != 3, "kind": "local"}
        for layer in range(60)
    ]
    rows.append({"layer": None, "group": "head", "op": EVIL, "measured": None, "limit": 1e-4, "passed": False})
    text = html_page((verdict(),), {"title": EVIL, "rows": rows, "first": rows[3]})
    page = Page(text)
    assert "First place: layer 3, attention: /l3/MatMul" in page.text
    assert "2 of 61 comparisons failed:" in page.text
    assert "/l4/MatMul" not in page.text
    assert not any(tag == "script" for tag, _ in page.found)
    places = points(drawings(text)[0].find("g/path").get("d"))
    assert min(places, key=lambda place: place[1]) == places[3]
    none = Page(html_page((), {"title": "t", "rows": rows[:3], "first": None}))
    assert "No place was found. " in none.text
    assert "0 of 3 comparisons failed; nearest to their limits:" in none.text


@pytest.mark.parametrize("verdicts", [(), (of(),), (of(Check("full", "t")),), (of(Check("t", "t", error="why")),)])
def test_little_or_nothing_is_a_page_too(verdicts: tuple[Verdict, ...]) -> None:
    page = Page(html_page(verdicts))
    passed = bool(verdicts) and all(one.passed for one in verdicts)
    assert ("passed" if passed else "FAILED") in page.text
    assert verdicts == () or not verdicts[0].checks or verdicts[0].checks[0].error is None or "why" in page.text


def test_the_same_verdict_gives_the_same_bytes() -> None:
    assert html_page((verdict(),)) == html_page((verdict(),))


# What a bundle may say


def test_whatever_a_bundle_says_is_shown_and_not_obeyed() -> None:
    choice = Choice(3, EVIL, 1.0)
    moments = (Moment(1, EVIL, 0.1, 0.1, (choice,), (dataclasses.replace(choice, token=4),)),)
    gate = Gate(EVIL, EVIL, 2, 1, reason=EVIL)
    cases = (Case((gate,), EVIL, EVIL, (0.1, 0.2), moments), Case((gate,)))
    evil = Verdict(EVIL, EVIL, 1, (Check(EVIL, EVIL, cases, (EVIL,), error=EVIL),), 0.0, 1, (EVIL,))
    harmless = Case((Gate("b", "b", 2, 1, reason="b"),), "b", "b", (0.1, 0.2))
    plain = Verdict("b", "b", 1, (Check("b", "b", (harmless,)),), 0.0, 1, ())
    page = Page(html_page((evil,)))
    assert {tag for tag, _ in page.found} <= {tag for tag, _ in Page(html_page((plain,))).found} | {"code", "li", "ul"}
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "49" not in page.text


def test_names_and_tokens_of_any_length_are_cut() -> None:
    long = "x" * 10_000
    moments = (moment(1, token=long),)
    text = html_page((of(Check("full", long, (Case(gates(), long, long, (0.1, 0.2), moments),))),))
    assert len(text) < 40_000
    assert f"<code>{'x' * 40}…</code>" in text
    assert "x" * 121 not in text


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (" the", " the"),
        ("\n\t", "⏎⇥"),
        ("\x00\x1b[31m\u202e", "\ufffd\ufffd[31m\ufffd"),
        ("東京🙂", "東京🙂"),
        ("x" * 41, "x" * 40 + "…"),
        ("\ud800", "\ufffd"),
        ("", ""),
    ],
)
def test_tokens_are_seen_whole(text: str, seen: str) -> None:
    assert shown(text) == seen


# Pictures


def test_every_point_is_where_its_figure_is() -> None:
    picture = log_plot("t", "x", "y", [Series("a", [0, 10, 20], [1e-4, 1e-2, 1e-3])], limit=1e-3, boundary=10)
    left, right = plots.LEFT, plots.WIDTH - plots.RIGHT
    top, foot = plots.TOP, plots.HEIGHT - plots.BOTTOM
    assert points(picture.curves[0].path) == [
        (left, foot),
        (round((left + right) / 2), top),
        (right, round((top + foot) / 2)),
    ]
    assert picture.limit == pytest.approx((top + foot) / 2)
    assert picture.boundary == pytest.approx(left + (right - left) * 9.5 / 20)
    assert [(tick.text, tick.at) for tick in picture.y_ticks] == [
        ("1e-4", foot),
        ("1e-3", pytest.approx((top + foot) / 2)),
        ("1e-2", top),
    ]
    assert [tick.text for tick in picture.x_ticks] == ["0", "5", "10", "15", "20"]


def test_what_cannot_be_drawn_is_marked_and_interrupts_the_line() -> None:
    values = [1e-3, None, 1e-2, math.inf, 0.0, math.nan, 1e-30, 1e9]
    curve = log_plot("t", "x", "y", [Series("a", range(8), values)]).curves[0]
    assert curve.path.count("M") == 4
    assert len(points(curve.path)) == len(curve.dots) == 5
    assert len(curve.beyond) == 2
    heights = [y for _, y in curve.dots]
    assert heights[2] == heights[3] == plots.HEIGHT - plots.BOTTOM  # 0 and 1e-30 lie at the foot
    assert heights[4] == plots.TOP


@pytest.mark.parametrize("values", [[], [0.0], [math.nan], [math.inf, math.inf], [None], [5.0], [1e-12] * 3])
def test_pictures_of_little(values: list[float | None]) -> None:
    picture = log_plot("t", "x", "y", [Series("a", range(len(values)), values)])
    assert len(picture.y_ticks) >= 2
    assert all(math.isfinite(tick.at) for tick in (*picture.x_ticks, *picture.y_ticks))


def test_a_way_that_begins_later_is_drawn_where_it_is() -> None:
    whole = case("chunks", "code", positions=21)
    half = Case(gates(), "rewind", "code", whole.kl[15:], prompt_tokens=0, first=15)
    (svg,) = drawings(html_page((of(Check("full", "t", (whole, half))),)))
    first, second = (points(path.get("d")) for path in svg.findall("g/path"))
    assert second == first[15:]
    words = [text.text for text in svg.iter("text")]
    assert words[-3:] == ["prompt", "continuation", "limit"]
    assert "position" in words and "nats" in words


@pytest.mark.parametrize(("own", "words"), [(2, {"continuation"}), (50, {"prompt", "continuation"}), (98, {"prompt"})])
def test_words_at_the_prompts_end_are_left_out_where_they_do_not_fit(own: int, words: set[str]) -> None:
    one = Case((), "decode", "code", tuple(1e-3 for _ in range(100)), prompt_tokens=own)
    (svg,) = drawings(html_page((of(Check("full", "t", (one,))),)))
    assert {text.text for text in svg.iter("text")} & {"prompt", "continuation"} == words


def test_pictures_stay_in_their_frame() -> None:
    layers = tuple(LayerFigure(layer, 10.0**-layer, math.nan, None) for layer in range(3))
    for svg in drawings(html_page((of(full(), Check("layers", "t", layers=layers)),))):
        assert svg.get("viewBox") == f"0 0 {plots.WIDTH} {plots.HEIGHT}"
        for path in svg.findall("g/path"):
            if path.get("class") is None:
                found = points(path.get("d"))
                assert all(0 <= x <= plots.WIDTH and 0 <= y <= plots.HEIGHT for x, y in found)
        for text in svg.iter("text"):
            assert text.get("transform") or 0 <= float(text.get("x")) <= plots.WIDTH


def test_the_picture_of_layers() -> None:
    layers = tuple(LayerFigure(layer, 1e-6, 1e-5, None) for layer in range(4))
    text = html_page((of(Check("layers", "Inside", layers=layers)),))
    (svg,) = drawings(text)
    assert [len(group.findall("circle")) for group in svg.findall("g")] == [4, 4]
    caption = re.search(r"<figcaption>.*?</figcaption>", text, re.DOTALL)[0]
    assert "hidden" in caption and "keys" in caption and "values" not in caption


def test_a_page_as_large_as_smollm2s_stays_below_500_kb() -> None:
    """810 positions, six ways, three questions."""
    rng = random.Random(0)

    def one(way: str, prompt: str) -> Case:
        worst = tuple(moment(position) for position in rng.sample(range(81), 5))
        return Case(gates(), way, prompt, tuple(math.exp(rng.gauss(-9, 3)) for _ in range(81)), worst, 50)

    checks = [
        Check(id, id, tuple(one(way, f"prompt {number}") for way in (*WAYS, "greedy") for number in range(10)))
        for id in ("full", "shipped", "cost")
    ]
    assert 100_000 < len(html_page((of(*checks),)).encode()) < 500_000
