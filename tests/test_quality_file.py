"""`quality.json` is read strictly, and shown by `inspect` and `verify`; a bundle without it is as good as any."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.runtime.bundle import QUALITY_FILE, open_bundle, seal
from llama_export.runtime.evaluate.intervals import bootstrap_mean
from llama_export.runtime.proof.reports.costs import costs
from llama_export.runtime.proof.reports.html import html_page
from llama_export.runtime.proof.reports.plots import BOTTOM, HEIGHT, TOP, Series, linear_plot
from llama_export.runtime.quality import (
    End,
    EndFigures,
    Interval,
    Matrix,
    MeasuredText,
    Prediction,
    Quality,
    load_quality,
)
from support.command import call
from support.tiny_tensorrt import write_tensorrt_bundle
from support.verdicts import verdict

WEIGHTS = EndFigures("PyTorch 2.13.0", Interval(0.384, 0.342, 0.42), 1.74, 6.26, 0.64, 34.9)
SHIPPED = EndFigures("onnxruntime 1.32.0 cpu", Interval(0.386, 0.344, 0.421), 1.76, 5.97, 0.6475, 35.06)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quality(layers: int = 3, **changes: Any) -> Quality:
    matrices = [Matrix("model.embed_tokens.weight", None, "int8", 1000, 9.0, 0.004, 0.005)]
    for layer in range(layers):
        for number, name in enumerate(PROJECTIONS):
            bits = 8.5 if layer == 0 else 4.5
            error = 0.01 * (number + 1)
            matrices.append(Matrix(f"model.layers.{layer}.{name}.weight", layer, "int4", 500, bits, error, error / 2))
    whole = Quality(
        "search",
        MeasuredText("built-in", "0" * 64, 8, 2048),
        {"int4": 84_049_920, "fp32": 140_544},
        {"model.onnx": 198_898, "model.onnx.data": 86_536_192},
        End(27.87, WEIGHTS, SHIPPED),
        tuple(matrices),
        Prediction(0.4, 84_000_000),
    )
    return dataclasses.replace(whole, **changes)


def value() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(quality().to_json())
    return found


def changed(path: str, to: object) -> str:
    """The file with one value replaced, by its dotted place; `...` removes it."""
    whole = value()
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = whole
    for key in keys:
        place = place[key]
    if to is ...:
        del place[last]
    else:
        place[last] = to
    return json.dumps(whole)


def test_what_is_written_is_read_again() -> None:
    one = quality()
    assert Quality.from_json(one.to_json()) == one
    without = quality(prediction=None, end=End(27.87, WEIGHTS, None, "nothing here runs it"))
    assert Quality.from_json(without.to_json()) == without
    assert next(iter(value())) == "schema_version"
    assert len(one.to_json().splitlines()) < 60 + len(one.matrices), "a line for each matrix"
    assert one.bits == pytest.approx((9000 + 7 * 500 * (8.5 + 2 * 4.5)) / (1000 + 21 * 500))


@pytest.mark.parametrize(
    ("path", "to", "told"),
    [
        ("method", 3, "quality.json.method must be a string, not 3"),
        ("method", ..., "lacks the key 'method'"),
        ("metod", "search", "unknown key 'metod'. Did you mean 'method'?"),
        ("text.sha256", "0" * 63, "text.sha256 must be 64 hexadecimal digits"),
        ("text.tokens", -1, "text.tokens must be from 0"),
        ("text.tokens", 1.5, "must be an integer"),
        ("bytes.int4", -1, r"bytes\['int4'\] must be from 0"),
        ("files.model.onnx", "1", "files"),
        ("end.original_perplexity", 0.5, "end.original_perplexity must be from 1"),
        ("end.original_perplexity", 27, "end.original_perplexity must be a number, not 27"),
        ("end.weights.kl.value", -0.1, "end.weights.kl.value must be from 0"),
        ("end.weights.kl.low", 0.9, "end.weights.kl has no interval"),
        ("end.weights.kl.low", None, "end.weights.kl has no interval"),
        ("end.shipped.top1_agreement", 1.01, "end.shipped.top1_agreement must be from 0 to 1"),
        ("end.shipped", None, "end must have one of shipped and not_shipped"),
        ("end.not_shipped", "why", "end must have one of shipped and not_shipped"),
        ("matrices", [], "matrices must name one at least"),
        ("matrices.1.layer", -1, "layer must be from 0"),
        ("matrices.1.bits", 0.0, "bits must be from 1 to 256"),
        ("matrices.1.size", 0, "size must be from 1"),
        ("matrices.1.weight_error", -1.0, "weight_error must be from 0"),
        ("matrices.1.output_error", True, "output_error must be a number"),
        ("prediction.kl", -1.0, "prediction.kl must be from 0"),
        ("schema_version", 0, "schema_version must be 1"),
        ("schema_version", True, "schema_version must be an integer"),
        ("schema_version", 2, "upgrade it"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(path: str, to: object, told: str) -> None:
    if path == "files.model.onnx":
        whole = value()
        whole["files"]["model.onnx"] = to
        text = json.dumps(whole)
    else:
        text = changed(path, to)
    with pytest.raises(LlamaExportError, match=told) as error:
        Quality.from_json(text)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["kl_max", "perplexity", "output_error"])
def test_no_figure_is_anything_but_a_number(number: str, key: str) -> None:
    text = re.sub(rf'("{key}": )[0-9.e-]+', rf"\g<1>{number}", quality().to_json(), count=1)
    with pytest.raises(LlamaExportError, match=QUALITY_FILE):
        Quality.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{" * 100_000, '{"schema_version": 1}', "\x00"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(LlamaExportError, match=QUALITY_FILE):
        Quality.from_json(text)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tensorrt_bundle(tmp_path / "bundle", "trt-primitive", reference=True)
    return tmp_path / "bundle"


def with_quality(bundle: Path, text: str) -> Path:
    manifest = open_bundle(bundle).manifest
    (bundle / QUALITY_FILE).write_text(text, encoding="utf-8")
    seal(bundle, manifest)
    return bundle


def test_a_bundle_may_have_none(bundle: Path) -> None:
    assert load_quality(open_bundle(bundle)) is None
    assert "quality" not in call("inspect", bundle).output
    assert json.loads(call("inspect", bundle, "--json").stdout)["quality"] is None
    assert json.loads(call("verify", bundle, "--json", "-", "-q").stdout)["quality"] is None


def test_inspect_and_verify_show_it(bundle: Path, tmp_path: Path) -> None:
    with_quality(bundle, quality().to_json())
    assert load_quality(open_bundle(bundle)) == quality()
    text = call("inspect", bundle).output
    assert (
        "search, 6.11 bits a weight. What quantisation cost, on 2,048 tokens of built-in: KL 0.386 (0.344 to 0.421) as "
        "it runs, 0.384 of the weights; same likeliest token 64.8 %; perplexity 27.87 -> 35.06."
    ) in text
    assert json.loads(call("inspect", bundle, "--json").stdout)["quality"] == value()
    result = call("verify", bundle, "--json", "-", "--html", tmp_path / "page.html", "-q")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quality"] == value()
    assert "What quantisation cost" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_one_that_is_damaged_fails_its_hash(bundle: Path) -> None:
    with_quality(bundle, quality().to_json())
    (bundle / QUALITY_FILE).write_text(changed("end.weights.kl.value", 0.35))
    result = call("verify", bundle, "-q")
    assert result.exit_code == 1 and QUALITY_FILE in result.output


@pytest.mark.parametrize("text", ["{", " " * (9 << 20)])
def test_one_that_says_nothing_harms_nothing(bundle: Path, text: str) -> None:
    with_quality(bundle, text)
    with pytest.raises(LlamaExportError, match=QUALITY_FILE):
        load_quality(open_bundle(bundle))
    assert f"{QUALITY_FILE} is" in call("inspect", bundle).output
    assert json.loads(call("inspect", bundle, "--json").stdout)["quality"] is None
    result = call("verify", bundle, "--json", "-")
    assert result.exit_code == 0 and json.loads(result.stdout)["quality"] is None
    assert QUALITY_FILE in result.stderr


def test_one_that_the_manifest_does_not_know_is_refused(bundle: Path) -> None:
    (bundle / QUALITY_FILE).write_text(quality().to_json())
    with pytest.raises(LlamaExportError, match="nothing vouches for it"):
        open_bundle(bundle)


# On the page


def test_the_page_has_the_ends_the_layers_and_every_matrix() -> None:
    page = html_page((verdict(),), None, quality())
    for text in ("6.11 bits a weight", "0.342 to 0.42", "64.8 %", "A KL of 0.4 was predicted.", "84.0 MB in int4"):
        assert text in page, text
    assert page.count("model.layers.2.") == 7
    assert page.count('aria-label="Output error by layer"') == page.count('aria-label="Bits of a weight by layer"') == 1
    assert "Not measured as it runs" not in page
    missing = html_page((verdict(),), None, quality(end=End(27.87, WEIGHTS, None, "<b>no</b> kernel")))
    assert "Not measured as it runs: &lt;b&gt;no&lt;/b&gt; kernel" in missing
    assert "What quantisation cost" not in html_page((verdict(),))


def test_names_on_the_page_are_escaped_and_cut() -> None:
    evil = "<script>alert(1)</script>" + "x" * 5000
    matrix = Matrix(evil, 0, evil, 1, 4.5, 0.1, 0.1)
    page = html_page((verdict(),), None, quality(method=evil, matrices=(matrix,), bytes={evil: 3}))
    assert "<script" not in page and "x" * 700 not in page


def test_pictures_show_the_worst_of_a_group() -> None:
    found = costs(quality())
    errors, bits = found.pictures
    assert [curve.name for curve in errors.curves] == ["q, k, v", "o", "gate, up", "down"]
    heights = [curve.dots[0][1] for curve in errors.curves]
    assert heights == sorted(heights, reverse=True), "larger errors stand higher"
    assert [y for _, y in bits.curves[0].dots][1:] == [bits.curves[0].dots[2][1]] * 2
    assert bits.curves[0].dots[0][1] < bits.curves[0].dots[1][1]
    assert costs(quality(layers=0)).pictures == ()


def test_a_linear_scale_begins_at_0() -> None:
    picture = linear_plot("t", "x", "y", [Series("a", [0, 1, 2], [0.0, 4.0, 8.0])])
    ticks = {tick.text: tick.at for tick in picture.y_ticks}
    assert ticks["0"] == HEIGHT - BOTTOM and min(ticks.values()) >= TOP
    (curve,) = picture.curves
    assert [y for _, y in curve.dots] == [round(ticks["0"]), round(ticks["4"]), round(ticks["8"])]
    assert linear_plot("t", "x", "y", [Series("a", [5], [0.0])]).curves[0].dots[0][1] == HEIGHT - BOTTOM


# Intervals


def test_the_bootstrap_takes_whole_groups() -> None:
    random = np.random.default_rng(0)
    groups = [random.exponential(scale, 50) for scale in random.uniform(0.5, 2, 40)]
    found = bootstrap_mean(groups)
    assert found.value == pytest.approx(np.concatenate(groups).mean())
    assert found.low is not None and found.high is not None
    spread = np.std([group.mean() for group in groups], ddof=1) / np.sqrt(len(groups))
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.2)
    assert bootstrap_mean([groups[0]]).low is None
    uneven = bootstrap_mean([np.zeros(99), np.ones(1)])
    assert uneven.value == pytest.approx(0.01)
