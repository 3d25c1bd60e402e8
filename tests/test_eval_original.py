"""`eval` beside PyTorch: perplexity and KL are what transformers gives, and only for the right model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.build_options import BuildOptions
from llama_export.export import evaluate as original_side
from llama_export.export.config import transformers_config
from llama_export.export.source import Source, open_source
from llama_export.pipeline import build
from llama_export.runtime import load
from llama_export.runtime.evaluate import likelihood
from support.adapters import merged_by_peft, write_adapter
from support.command import call
from support.hf_models import random_weights, write_llama_folder, write_weights
from transformers import AutoModelForCausalLM, LlamaForCausalLM

TEXT = "Once upon a time there was a little girl named Lily. Größe, 東京: In 1998 there were 365 days? " * 9


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def found(*arguments: object) -> dict[str, Any]:
    result = call("eval", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def by_transformers(model: torch.nn.Module, windows: list[list[int]]) -> list[torch.Tensor]:
    """The log-probabilities [length - 1, vocab] of each window's next tokens, float64."""
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1) for ids in windows]


def by_bundle(bundle: Path, windows: list[list[int]]) -> list[torch.Tensor]:
    """The same of the bundle, each window in one call."""
    backend = load(bundle).lend_backend()
    logits = []
    for ids in windows:
        backend.rewind(0)
        logits.append(torch.log_softmax(torch.from_numpy(backend.extend(ids[:-1], keep=len(ids) - 1)).double(), -1))
    return logits


def nll(log_p: list[torch.Tensor], windows: list[list[int]]) -> float:
    sums = [-one.gather(1, torch.tensor(ids[1:])[:, None]).sum() for one, ids in zip(log_p, windows, strict=True)]
    return float(sum(sums)) / sum(len(ids) - 1 for ids in windows)


def cut(bundle: Path, size: int) -> list[list[int]]:
    ids = load(bundle).tokenizer.encode(TEXT)
    return [ids[start : start + size] for start in range(0, len(ids) - 1, size)]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("head_bytes", "rows"), [(original_side.HEAD_BYTES, 1000), (0, 7)])
def test_all_figures_are_those_of_transformers(
    built: Callable[[str], Path],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    head_bytes: int,
    rows: int,
) -> None:
    monkeypatch.setattr(original_side, "HEAD_BYTES", head_bytes)
    monkeypatch.setattr(likelihood, "SLICE_BYTES", rows * 4 * 320)
    bundle = built(precision)
    checkpoint = bundle.parent / "llama"
    windows = cut(bundle, 50)
    assert len(windows) > 5  # more than a group
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    theirs, ours = by_transformers(model, windows), by_bundle(bundle, windows)
    got = found(bundle, "--text", text, "--window", 50, "-m", checkpoint)
    assert got["original_nll"]["value"] == pytest.approx(nll(theirs, windows), abs=1e-5)
    assert got["original_perplexity"]["value"] == pytest.approx(math.exp(nll(theirs, windows)), rel=1e-4)
    assert got["nll"]["value"] == pytest.approx(nll(ours, windows), abs=1e-5)
    assert got["nll_difference"]["value"] == pytest.approx(nll(ours, windows) - nll(theirs, windows), abs=1e-6)
    kl = np.concatenate([(p.exp() * (p - q)).sum(1).numpy() for p, q in zip(theirs, ours, strict=True)])
    assert got["kl_mean"]["value"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-9)
    assert got["kl_median"]["value"] == pytest.approx(np.quantile(kl, 0.5), rel=0.02, abs=1e-9)
    assert got["kl_p99"]["value"] == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=0.02, abs=1e-9)
    same = torch.cat([(p.argmax(1) == q.argmax(1)).double() for p, q in zip(theirs, ours, strict=True)]).mean()
    assert got["top1_agreement"]["value"] == pytest.approx(float(same), abs=0.003)
    assert (kl.mean() > 1e-6) == (precision == "int8")
    for key in ("original_perplexity", "nll_difference", "kl_mean", "kl_median", "kl_p99"):
        low, high = got[key]["interval"]
        assert low <= got[key]["value"] <= high


def test_fp32_has_the_perplexity_of_transformers(built: Callable[[str], Path], text: Path) -> None:
    bundle = built("fp32")
    windows = cut(bundle, 256)
    model = AutoModelForCausalLM.from_pretrained(bundle.parent / "llama", dtype=torch.float32).eval()
    expected = math.exp(nll(by_transformers(model, windows), windows))
    assert found(bundle, "--text", text)["perplexity"]["value"] == pytest.approx(expected, rel=1e-4)


def test_a_choice_is_as_likely_as_transformers_say(
    built: Callable[[str], Path], tmp_path: Path, an_empty_cache: Path
) -> None:
    bundle = built("fp32")
    line = {"goal": "Play outside", "sol1": "with a ball in the park.", "sol2": "Größe", "label": 0}
    (tmp_path / "tasks").write_text(json.dumps(line))
    found(bundle, "--tasks", tmp_path / "tasks")
    (ledger,) = an_empty_cache.glob("llama-export/eval/*")
    item = json.loads(ledger.read_text().splitlines()[1])
    tokenizer = load(bundle).tokenizer
    model = AutoModelForCausalLM.from_pretrained(bundle.parent / "llama", dtype=torch.float32).eval()
    context = "Question: Play outside\nAnswer:"
    for log_p, choice in zip(item["log_p"], (line["sol1"], line["sol2"]), strict=True):
        ids, before = tokenizer.encode(f"{context} {choice}"), len(tokenizer.encode(context))
        (expected,) = by_transformers(model, [ids])
        rows = expected[before - 1 :].gather(1, torch.tensor(ids[before:])[:, None])
        assert log_p == pytest.approx(float(rows.sum()), rel=1e-5)


def test_gguf_files_are_their_own_originals(built: Callable[[str], Path], text: Path) -> None:
    bundle = built("Q4_1")
    got = found(bundle, "--text", text, "--window", 64, "-m", bundle.parent / "llama.gguf", "--limit", 2)
    assert got["kl_mean"]["value"] < 0.01
    assert got["original"]["sha256"]


def test_another_model_is_refused(built: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    bundle = built("fp32")
    other = write_llama_folder(tmp_path / "other", attention_bias=True, seed=3)
    refused = call("eval", bundle, "--text", text, "-m", other)
    assert refused.exit_code == 1
    assert "not what the bundle was made of" in refused.stderr
    assert "--any-model" in refused.stderr
    got = found(bundle, "--text", text, "--limit", 2, "-m", other, "--any-model")
    assert got["kl_mean"]["value"] > 0.01
    wide = write_llama_folder(tmp_path / "wide", hidden=80)
    assert "its hidden is 80, the bundle's 64" in call("eval", bundle, "--text", text, "-m", wide).stderr
    assert call("eval", bundle, "--text", text, "-m", wide, "--any-model", "--limit", 1).exit_code == 0
    words = write_llama_folder(tmp_path / "words", vocab=300)
    assert "its vocab is 300" in call("eval", bundle, "--text", text, "-m", words, "--any-model").stderr


def test_an_original_that_is_not_finite_is_an_error(built: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    broken = write_llama_folder(tmp_path / "broken")
    weights = random_weights(json.loads((broken / "config.json").read_text()))
    weights["model.norm.weight"][5] = np.nan
    write_weights(broken, weights)
    result = call("eval", built("fp32"), "--text", text, "-m", broken, "--any-model")
    assert result.exit_code == 1
    assert "not finite: the original's, in window 1" in result.stderr


def test_adapters_in_the_bundle_are_needed_in_the_original(text: Path, tmp_path: Path) -> None:
    checkpoint = write_llama_folder(tmp_path / "llama")
    polite, terse = (
        write_adapter(checkpoint, tmp_path / name, seed=seed) for seed, name in enumerate(("polite", "terse"))
    )
    options = {"model": str(checkpoint), "target": "cpu", "precision": "fp32", "any_base": True, "reference": False}
    build(BuildOptions(output=tmp_path / "merged", adapters=(f"{polite}", f"{terse}"), **options))
    common = ("--text", text, "--limit", 3, "-m", checkpoint)
    for given in ((), (polite,), (polite, f"{terse}:0.5"), (polite, polite)):
        flags = [part for one in given for part in ("--original-adapter", one)]
        refused = call("eval", tmp_path / "merged", *common, *flags)
        assert refused.exit_code == 2
        assert "computes with the adapters polite:1, terse:1" in refused.stderr
    flags = ("--original-adapter", terse, "--original-adapter", polite)
    got = found(tmp_path / "merged", *common, *flags)
    assert got["kl_mean"]["value"] < 1e-8
    windows = cut(tmp_path / "merged", 256)[:3]
    expected = nll(by_transformers(merged_by_peft(checkpoint, polite, terse), windows), windows)
    assert got["original_nll"]["value"] == pytest.approx(expected, abs=1e-5)


def test_an_adapter_beside_the_weights_is_evaluated_with_its_original(text: Path, tmp_path: Path) -> None:
    checkpoint = write_llama_folder(tmp_path / "llama")
    polite = write_adapter(checkpoint, tmp_path / "polite")
    options = {"model": str(checkpoint), "target": "cpu", "precision": "fp32", "any_base": True, "reference": False}
    build(BuildOptions(output=tmp_path / "b", adapters=(str(polite),), adapter_mode="runtime", **options))
    common = (tmp_path / "b", "--text", text, "--limit", 2)
    plain = found(*common, "-m", checkpoint)
    assert plain["kl_mean"]["value"] < 1e-8
    chosen = found(*common, "-m", checkpoint, "--adapter", "polite", "--original-adapter", polite)
    assert chosen["kl_mean"]["value"] < 1e-8
    assert abs(chosen["nll"]["value"] - plain["nll"]["value"]) > 1e-4
    assert chosen["adapter"] == "polite"
    assert "computes without adapters" in call("eval", *common, "-m", checkpoint, "--original-adapter", polite).stderr


def dequantised(source: Source) -> torch.nn.Module:
    model = LlamaForCausalLM(transformers_config(source.config))
    values = {name: torch.from_numpy(tensor.read(0, tensor.shape[0])) for name, tensor in source.tensors.items()}
    assert model.load_state_dict(values, strict=False).missing_keys == ["lm_head.weight"]  # tied
    return model.eval()


@pytest.mark.smollm2
def test_a_real_model_has_the_perplexity_of_transformers(smollm2_bundle: Path, smollm2_gguf: Path, text: Path) -> None:
    got = found(smollm2_bundle, "--text", text, "--window", 100, "-m", smollm2_gguf)
    windows = cut(smollm2_bundle, 100)
    expected = nll(by_transformers(dequantised(open_source(str(smollm2_gguf))), windows), windows)
    assert got["original_nll"]["value"] == pytest.approx(expected, abs=1e-4)
    assert got["kl_mean"]["value"] < 0.02
    assert got["top1_agreement"]["value"] > 0.9
