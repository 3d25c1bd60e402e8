"""What quantisation costs, measured in one streamed pass, is what whole models and whole distributions give."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.build_options import BuildOptions
from llama_export.build_report import BuildReport
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export import layerwise, quality_layers
from llama_export.export import quality_text as text_module
from llama_export.export.calibration_text import built_in_text
from llama_export.export.layerwise import projections
from llama_export.export.quality import Comparison
from llama_export.export.quality_layers import MatrixErrors
from llama_export.export.quality_logits import Divergences, KeptLogits, scored_logits
from llama_export.export.quality_text import quality_text
from llama_export.export.reference import Exact, Original, StreamedModel
from llama_export.export.source import open_source
from llama_export.optimize.equivalence import all_seams, scaled
from llama_export.optimize.formats import EMBEDDING, FP32
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.quantise import blocks_of, dequantise
from llama_export.optimize.tensors import SourceTensor
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime import load
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.quality import End, Quality, load_quality
from support.command import call
from support.gguf_models import write_llama_gguf
from support.graphs import VARIANTS, llama, source_tensors, with_stored_weights
from support.hf_models import write_llama_folder
from transformers import AutoModelForCausalLM, PreTrainedModel

TEXT = "Once upon a time there was a little girl named Lily. Größe, 東京: In 1998 there were 365 days? " * 9
SHORT = 24


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(text_module, "_MOST_TOKENS", 8 * SHORT)
    monkeypatch.setattr(text_module, "WINDOW", SHORT)
    monkeypatch.setattr(layerwise, "_STEP", 10_000)  # so that these small matrices come in several parts too


def windows(vocab: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab, length).tolist() for length in (17, 2, 33, 9)]


def log_softmax(model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """float64 [scored tokens, vocab]."""
    with torch.no_grad():
        rows = [model(torch.tensor([ids])).logits[0, :-1].double() for ids in texts]
    return torch.log_softmax(torch.cat(rows), -1)


def check_end(
    end: End, texts: Sequence[Sequence[int]], original: torch.Tensor, other: torch.Tensor, which: str
) -> None:
    """Of log-probabilities [scored tokens, vocab]."""
    found = getattr(end, which)
    kl = (original.exp() * (original - other)).sum(-1).numpy()
    targets = torch.tensor([token for ids in texts for token in ids[1:]])
    assert found.kl.value == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-3, abs=1e-6)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3, abs=1e-6)
    same = original.argmax(-1) == other.argmax(-1)
    assert found.top1_agreement == pytest.approx(same.double().mean().item(), abs=1e-5)
    rows = torch.arange(len(targets))
    assert found.perplexity == pytest.approx(math.exp(-other[rows, targets].mean()), rel=1e-4)
    assert end.original_perplexity == pytest.approx(math.exp(-original[rows, targets].mean()), rel=1e-4)


def compared(
    model: PreTrainedModel, stored: Mapping[str, SourceTensor], formats: Any, texts: Sequence[Sequence[int]]
) -> tuple[End, dict[str, Any]]:
    own = source_tensors(model)
    stored = {name: stored.get(name, tensor) for name, tensor in own.items()}
    exact = Exact(stored, formats, np.float32)
    matrices = MatrixErrors(model.config, 64, own, stored, texts)
    watch = Comparison(texts, matrices, None)
    StreamedModel(model.config, own, 64, (Original(own), exact)).show(texts, Silent(), watch)
    matrices.embedding(exact)
    return watch.end("nothing ran"), matrices.errors


def read_in(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """What each matrix but the embedding reads [tokens, columns], by the name of its weight."""
    found: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _module, inputs: found.setdefault(name, []).append(inputs[0][0].double())

    modules = {name: one for index, layer in enumerate(model.model.layers) for name, one in projections(index, layer)}
    modules["head"] = model.lm_head
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    log_softmax(model, texts)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def relative(error: torch.Tensor, whole: torch.Tensor) -> float:
    return (error.norm() / whole.norm()).item()


def check_errors(
    errors: Mapping[str, Any], before: PreTrainedModel, after: PreTrainedModel, texts: Sequence[Sequence[int]]
) -> None:
    """before, after: of which the errors are; their inputs are the first one's."""
    inputs, old, new = read_in(before, texts), before.state_dict(), after.state_dict()
    tied = before.config.tie_word_embeddings
    for name, found in errors.items():
        one, other = old[name].double(), new[name].double()
        assert found.weight == pytest.approx(relative(other - one, one), rel=1e-4), name
        if name == EMBEDDING and not tied:
            ids = torch.tensor([token for text in texts for token in text])
            expected = relative((other - one)[ids], one[ids])
        else:
            x = inputs["head" if name in (EMBEDDING, "lm_head.weight") else name]
            expected = relative(x @ (other - one).T, x @ one.T)
        assert found.output == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("variant", ["grouped", "untied", "biased", "one-kv-head", "odd-rows", "qwen2"])
def test_figures_are_those_of_whole_models(variant: str) -> None:
    model = llama(**VARIANTS[variant])
    tensors, texts = source_tensors(model), windows(model.config.vocab_size)
    formats = plan_formats(tensors, "int4", "int8")
    twin = with_stored_weights(model, tensors, formats)
    end, errors = compared(model, {}, formats, texts)
    check_end(end, texts, log_softmax(model, texts), log_softmax(twin, texts), "weights")
    assert end.shipped is None and end.not_shipped == "nothing ran"
    assert end.weights.kl.value > 1e-3
    assert end.weights.kl.low is not None and end.weights.kl.low < end.weights.kl.value < end.weights.kl.high
    assert errors.keys() == {name for name, tensor in tensors.items() if len(tensor.shape) > 1}
    check_errors(errors, model, twin, texts)


def test_weights_that_are_stored_as_they_are_cost_nothing() -> None:
    model = llama(**VARIANTS["untied"])
    tensors, texts = source_tensors(model), windows(model.config.vocab_size)
    end, errors = compared(model, {}, dict.fromkeys(tensors, FP32), texts)
    assert (end.weights.kl.value, end.weights.kl_max, end.weights.top1_agreement) == (0, 0, 1)
    assert end.weights.perplexity == end.original_perplexity
    assert {(found.weight, found.output) for found in errors.values()} == {(0.0, 0.0)}


def test_some_windows_tell_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_layers, "_WATCHED_TOKENS", 30)
    model = llama(**VARIANTS["untied"])
    tensors, texts = source_tensors(model), windows(model.config.vocab_size)
    formats = plan_formats(tensors, "int4")
    _, errors = compared(model, {}, formats, texts)
    watched = [texts[0], texts[3]]
    check_errors(errors, model, with_stored_weights(model, tensors, formats), watched)


@pytest.mark.parametrize("variant", ["biased", "untied"])
def test_moved_scales_are_no_error(variant: str) -> None:
    """A tensor is compared with what it was made of, in the model with these scales; the original is the checkpoint."""
    model = llama(**VARIANTS[variant])
    config, texts = model.config, windows(model.config.vocab_size)
    tensors = source_tensors(model)
    sizes = open_sizes(model)
    random = np.random.default_rng(3)
    scales = {seam: np.exp(random.normal(0, 1, seam.channels)).astype(np.float32) for seam in all_seams(tensors, sizes)}
    moved = scaled(tensors, scales)
    assert any(len(moved[name].shape) == 1 and moved[name] is not tensors[name] for name in tensors)
    formats = plan_formats(tensors, "int4")

    def coded(name: str) -> SourceTensor:
        tensor, format = moved[name], formats[name]
        if not format.quantised or tensor is tensors[name]:
            return tensor
        blocks = blocks_of(tensor, format)
        return replace(
            tensor,
            format=format,
            blocks=blocks,
            read=lambda start, stop: dequantise(blocks(start, stop), tensor.shape[1]),
            scaled=tensor,
        )

    stored = {name: coded(name) for name in tensors}
    end, errors = compared(model, stored, formats, texts)
    before = with_stored_weights(model, moved, dict.fromkeys(tensors, FP32))
    after = with_stored_weights(model, moved, formats)
    assert torch.allclose(log_softmax(before, texts), log_softmax(model, texts), atol=1e-3)
    check_end(end, texts, log_softmax(model, texts), log_softmax(after, texts), "weights")
    check_errors(errors, before, after, texts)
    exact_end, exact = compared(model, moved, dict.fromkeys(tensors, FP32), texts)
    assert exact_end.weights.kl.value < 1e-6
    assert max(found.weight for found in exact.values()) == 0
    assert config is model.config


def open_sizes(model: PreTrainedModel) -> Any:
    from llama_export.runtime.bundle import Shape

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, head_dim)
    return Shape(
        config.num_hidden_layers, config.hidden_size, *heads, config.intermediate_size, config.vocab_size, "float32"
    )


def test_divergences_of_pieces_are_those_of_whole_distributions() -> None:
    random = np.random.default_rng(0)
    logits = [torch.from_numpy(random.normal(0, size, (40, 37)).astype(np.float32)) for size in (4, 4, 60)]
    logits[0][3] += 9000  # what is added to all of a row changes nothing
    targets = random.integers(0, 37, 40).tolist()
    passing = Divergences(targets, 3)
    for start, stop in ((0, 5), (5, 6), (6, 30), (30, 37)):
        pieces = [one[:, start:stop] for one in logits]
        passing.add(start, pieces[0], [*pieces[1:], pieces[0]])
    log_p = [torch.log_softmax(one.double(), -1) for one in logits]
    for number, log_q in enumerate([*log_p[1:], log_p[0]]):
        found = passing.apart(number, "The other's")
        np.testing.assert_allclose(found.kl, (log_p[0].exp() * (log_p[0] - log_q)).sum(-1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.nll, -log_q[range(40), targets], rtol=1e-4, atol=1e-3)
        assert found.same.tolist() == (log_p[0].argmax(-1) == log_q.argmax(-1)).tolist()
    assert passing.apart(2, "Its own").kl.max() == 0
    np.testing.assert_allclose(passing.original_nll(), -log_p[0][range(40), targets], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told(wrong: float) -> None:
    passing = Divergences([0, 1], 1)
    passing.add(0, torch.zeros(2, 3), [torch.tensor([[0.0, 1.0, 2.0], [0.0, wrong, 0.0]])])
    with pytest.raises(LlamaExportError, match="The other's logits are not finite"):
        passing.apart(0, "The other's")
    passing.original_nll()


class Counting:
    """Logits [n, 3 * vocab] that tell the token and its place."""

    vocab, chunk, most_rows, name, context = 7, 5, 1, "counting", 64

    def begin(self, rows: int) -> None:
        self.place = 0

    def run(self, ids: np.ndarray, firsts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        assert firsts[0] == self.place
        self.place += counts[0]
        places = np.arange(firsts[0], firsts[0] + counts[0])
        return (ids[0] + 100 * places + np.arange(self.vocab)[:, None] / 10).T[None].astype(np.float32)


def test_logits_come_back_in_pieces_of_the_vocabulary(tmp_path: Path) -> None:
    texts = [list(range(13)), [5, 6], [3, 1, 4]]
    assert next(scored_logits(Counting(), texts)).shape == (5, 7), "as many at a time as the replayer takes"
    whole = np.concatenate(list(scored_logits(Counting(), texts)))
    assert whole.shape == (12 + 1 + 2, 7)
    assert whole[:, 0].tolist() == [n + 100 * n for n in range(12)] + [5] + [3, 101]
    with KeptLogits(tmp_path, len(whole), [0, 3, 4, 7]) as kept:
        for logits in scored_logits(Counting(), texts):
            kept.add(logits)
        for start, stop in ((3, 4), (0, 3), (4, 7)):
            np.testing.assert_array_equal(kept.piece(start, stop), whole[:, start:stop])
        with pytest.raises(LlamaExportError, match="not finite"):
            kept.add(np.full((1, 7), np.nan, np.float32))
    assert not list(tmp_path.glob("*"))


def made(tmp_path: Path, model: Path, target: str = "cpu", **options: Any) -> BuildReport:
    return build(BuildOptions(str(model), target, tmp_path / "bundle", reference=False, **options))


def quality_of(path: Path) -> Quality:
    quality = load_quality(open_bundle(path))
    assert quality is not None
    return quality


def texts_of(model: Path, context: int = 256) -> list[list[int]]:
    return [list(window) for window in quality_text(open_source(str(model)), None, context).windows]


def test_a_bundle_tells_what_its_weights_and_its_kernels_cost(tmp_path: Path) -> None:
    model = write_llama_folder(tmp_path / "llama", attention_bias=True)
    report = made(tmp_path, model, precision="int4")
    quality = quality_of(tmp_path / "bundle")
    assert quality == report.quality
    texts, transformer = texts_of(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert [ids[0] for ids in texts] == [0] * 8, "BOS"
    assert (quality.text.windows, quality.text.tokens, quality.text.name) == (8, 8 * SHORT, "built-in")
    original = log_softmax(transformer, texts)
    backend, shipped = load(tmp_path / "bundle").lend_backend(), []
    for ids in texts:
        backend.rewind(0)
        shipped.append(torch.from_numpy(backend.extend(ids[:-1], keep=len(ids) - 1)).double())
    check_end(quality.end, texts, original, torch.log_softmax(torch.cat(shipped), -1), "shipped")
    assert quality.end.shipped is not None and "onnxruntime" in quality.end.shipped.by
    assert quality.end.weights.by.startswith("PyTorch") and quality.end.weights.kl.value > 1e-4
    sizes = {name: (tmp_path / "bundle" / name).stat().st_size for name in quality.files}
    assert quality.files == sizes
    assert 0.5 * sizes["model.onnx.data"] < sum(quality.bytes.values()) <= sizes["model.onnx.data"]
    assert {matrix.layer for matrix in quality.matrices} == {None, 0, 1}
    assert len(quality.matrices) == 2 + 2 * 7
    assert all(0.01 < matrix.weight_error < 0.2 for matrix in quality.matrices if matrix.format.startswith("int4"))
    assert any(line.startswith("What quantisation cost, on 192 tokens of built-in: KL ") for line in report.lines())
    assert report.to_json()["quality"] == json.loads((tmp_path / "bundle/quality.json").read_text())


def test_the_same_build_measures_the_same(tmp_path: Path) -> None:
    model = write_llama_folder(tmp_path / "llama", tied=True)
    first = made(tmp_path, model, precision="int4").manifest.files["quality.json"]
    assert made(tmp_path, model, precision="int4", force=True).manifest.files["quality.json"] == first


def test_own_codes_cost_nothing_but_what_kernels_round(tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "llama.gguf", types="Q4_0")
    made(tmp_path, model)
    quality = quality_of(tmp_path / "bundle")
    assert quality.method == "own codes"
    assert {(one.weight_error, one.output_error) for one in quality.matrices} == {(0.0, 0.0)}
    assert (quality.end.weights.kl.value, quality.end.weights.top1_agreement) == (0, 1)
    assert quality.end.shipped is not None and 0 < quality.end.shipped.kl.value < 0.1


@pytest.mark.parametrize(
    ("target", "precision", "backend"), [("jetson-orin", "int4", "TensorRT"), ("rtx-5090", "nvfp4", "TensorRT-RTX")]
)
def test_a_graph_for_tensorrt_is_measured_on_the_cpu(
    target: str, precision: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_export.pipeline.need_builder", lambda plan: None)
    monkeypatch.setattr(
        "llama_export.pipeline.write_engines", lambda plan, folder, manifest, progress: (manifest, None)
    )
    monkeypatch.setattr("llama_export.pipeline.seal", lambda folder, manifest: manifest)
    model = write_llama_folder(tmp_path / "llama", hidden=128, ffn=160, max_positions=64)
    quality = made(tmp_path, model, target, precision=precision).quality
    assert quality is not None and quality.end.shipped is not None
    assert quality.end.shipped.by.endswith(f"cpu, the graph that {backend} gets")
    assert quality.end.shipped.kl.value == pytest.approx(quality.end.weights.kl.value, rel=0.2)
    assert quality.end.weights.kl.value > 1e-3


def test_what_cannot_run_here_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bundle: Any, *_: Any, **__: Any) -> None:
        raise LlamaExportError(f"onnxruntime 1.0 cannot load the model of {bundle.path}: no kernel")

    monkeypatch.setattr("llama_export.export.quality.GraphReplayer", refuse)
    report = made(tmp_path, write_llama_folder(tmp_path / "llama"), precision="int8")
    assert report.quality is not None and report.quality.end.shipped is None
    assert report.quality.end.not_shipped == (
        "ONNX Runtime cannot run it here: onnxruntime 1.0 cannot load the model of the bundle: no kernel"
    )
    assert "of the weights alone" in report.quality.told


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "int4", "quality": False}])
def test_there_is_none_where_nothing_is_quantised_or_measured(options: dict[str, Any], tmp_path: Path) -> None:
    report = made(tmp_path, write_llama_folder(tmp_path / "llama"), **options)
    assert report.quality is None and report.to_json()["quality"] is None
    assert "quality.json" not in report.manifest.files
    assert "quality" not in report.stages
    assert load_quality(open_bundle(tmp_path / "bundle")) is None


def test_a_text_of_ones_own_is_measured_on(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(TEXT, encoding="utf-8")
    model = write_llama_folder(tmp_path / "llama", add_bos=False)
    quality = made(tmp_path, model, precision="int4", quality_text=text).quality
    assert quality is not None and (quality.text.name, quality.text.tokens) == ("mine.txt", 8 * SHORT)
    text.write_text("Once upon a time")
    found = quality_text(open_source(str(model)), text, 256)
    assert len(found.windows) == 1 and 2 <= found.tokens < SHORT, "a short text is one window"


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (None, UsageError, "There is no file"),
        (b"", UsageError, "is empty"),
        (b"\xff\xfe\x00", UsageError, "is not UTF-8"),
    ],
)
def test_a_text_that_is_none_is_refused_before_anything_is_made(
    content: bytes | None, error: type[Exception], told: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    model = write_llama_folder(tmp_path / "llama")
    with pytest.raises(error, match=told):
        made(tmp_path, model, precision="int4", quality_text=text)
    assert not (tmp_path / "bundle").exists()


def test_a_text_of_one_token_is_refused_where_nothing_stands_before_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A")
    begun = open_source(str(write_llama_folder(tmp_path / "begun")))
    assert [len(one) for one in quality_text(begun, tmp_path / "text.txt", SHORT).windows] == [2]
    alone = open_source(str(write_llama_folder(tmp_path / "alone", add_bos=False)))
    with pytest.raises(LlamaExportError, match="holds 1 tokens, but measuring quality takes 2"):
        quality_text(alone, tmp_path / "text.txt", SHORT)


def test_a_text_for_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    model = write_llama_folder(tmp_path / "llama")
    for options in ({"precision": "fp32"}, {"precision": "int4", "quality": False}):
        with pytest.raises(UsageError, match="--quality-text is for measuring"):
            made(tmp_path, model, quality_text=tmp_path / "text.txt", **options)


def test_a_context_of_one_token_is_no_failure(tmp_path: Path) -> None:
    report = made(tmp_path, write_llama_folder(tmp_path / "llama"), precision="int4", context=1)
    assert report.quality is None
    assert any(note.startswith("What quantisation cost was not measured: ") for note in report.notes)


def test_windows_are_as_long_as_the_context_allows(tmp_path: Path) -> None:
    source = open_source(str(write_llama_folder(tmp_path / "llama")))
    for context in (2, 5, 19):
        found = quality_text(source, None, context)
        assert {len(window) for window in found.windows} == {context}
        assert all(window[0] == source.tokens.bos for window in found.windows)
    assert len(found.windows) >= 4


def test_larger_models_get_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_llama_folder(tmp_path / "llama")))
    monkeypatch.setattr(text_module, "_MOST_TOKENS", 1 << 20)
    monkeypatch.setattr(text_module, "WINDOW", 256)
    for weights, tokens, length in ((400_000_000, 800, 200), (4_000_000_000, 256, 64)):
        shape = (weights // 64, 64)
        large = source.with_other(tensors={"w": SourceTensor("w", shape, "F32", FP32, lambda start, stop: None)})
        found = quality_text(large, None, 4096)
        assert (found.tokens, {len(window) for window in found.windows}) == (tokens, {length})


def test_calibration_and_quality_have_no_text_in_common() -> None:
    calibrates, held_out = built_in_text()
    assert calibrates.endswith("\n\n") and len(held_out) > 8000
    lines = {line for line in held_out.split("\n") if len(line) > 40}
    assert lines and not lines & set(calibrates.split("\n"))


def test_the_command_takes_a_text_or_no_quality(tmp_path: Path) -> None:
    model = write_llama_folder(tmp_path / "llama")
    common = ("build", "-m", model, "-t", "cpu", "--precision", "int8", "--no-reference")
    assert call(*common, "-o", tmp_path / "without", "--no-quality").exit_code == 0
    assert not (tmp_path / "without/quality.json").exists()
    (tmp_path / "text.txt").write_text(TEXT)
    result = call(*common, "-o", tmp_path / "with", "--quality-text", tmp_path / "text.txt")
    assert result.exit_code == 0 and "tokens of text.txt: KL " in result.output
    shown = call("inspect", tmp_path / "with", "--json")
    assert json.loads(shown.stdout)["quality"]["text"]["name"] == "text.txt"
    assert "bits a weight. What quantisation cost, on" in call("inspect", tmp_path / "with").output
