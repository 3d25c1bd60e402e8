"""Calibration: what enters each projection is what enters it in transformers' own model, whatever the text's length."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export import calibrate as calibration
from llama_export.export import calibration_text as texts
from llama_export.export import layerwise
from llama_export.export.calibrate import Calibration, calibrate, input_scales, settled_formats
from llama_export.export.calibration_text import CalibrationText, calibration_text
from llama_export.export.smooth import LEAST_SCALE
from llama_export.export.source import Source, open_source
from llama_export.names import BUILT_IN
from llama_export.optimize.equivalence import scaled
from llama_export.optimize.formats import EMBEDDING, FP8, FP16, INT8, INT8_ROW, Format
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.policy import TENSORRT
from llama_export.optimize.trt.linear import InputScale
from llama_export.progress import Progress, Silent
from support.command import environment
from support.graphs import VARIANTS, llama, logits_of, source_tensors, traced_once, with_stored_weights
from support.hf_models import random_weights, write_json, write_llama_folder, write_weights
from support.replay import Replay, lower_to, write

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not mind in the least. "


def source_of(model: Any) -> Source:
    config, tensors = json.loads(model.config.to_json_string()), source_tensors(model)
    return Source("tests/model", None, "folder", config, tensors, {}, None, None)


def text_of(*lengths: int, vocab: int = 259) -> CalibrationText:
    generator = np.random.default_rng(1)
    sequences = tuple(tuple(generator.integers(0, vocab, length).tolist()) for length in lengths)
    return CalibrationText(Path("text.txt"), sequences, "", 0)


def watched(
    source: Source, text: CalibrationText, formats: dict[str, Format] | None = None, progress: Progress | None = None
) -> Calibration:
    """What calibration finds; without formats nothing is rounded."""
    formats = dict.fromkeys(source.tensors, FP16) if formats is None else formats
    return calibrate(source, text, 64, formats, progress or Silent())


# What is found


def watched_by_hooks(model: Any, text: CalibrationText) -> dict[str, float]:
    """The largest magnitudes of what enters the projections of a whole transformers model."""
    tied, amax = model.config.tie_word_embeddings, {}

    def hook(name: str) -> Callable[..., None]:
        def seen(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), float(inputs[0].abs().max()))

        return seen

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = EMBEDDING if name == "lm_head" and tied else f"{name}.weight"
            module.register_forward_pre_hook(hook(weight))
    with torch.no_grad():
        for sequence in text.sequences:
            model(torch.tensor([sequence]))
    return amax


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_largest_inputs_are_those_of_transformers_model(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_STEP", 10_000)  # so that these small matrices come in several parts too
    model, text = llama(**VARIANTS[variant]), text_of(33, 1, 17, vocab=VARIANTS[variant].get("vocab_size", 259))
    found = watched(source_of(model), text).amax
    expected = watched_by_hooks(model, text)
    assert found.keys() == expected.keys()
    assert len(found) == 7 * model.config.num_hidden_layers + 1
    for name, largest in expected.items():
        assert found[name] == pytest.approx(largest, rel=1e-5), name
    assert len(set(found.values())) >= 4 * model.config.num_hidden_layers  # inputs differ; q, k, v and gate, up share


def test_it_is_the_same_each_time() -> None:
    source, text = source_of(llama()), text_of(40, 9)
    formats = plan_formats(source.tensors, "int8", policy=TENSORRT)
    one, other = watched(source, text, formats), watched(source, text, formats)
    assert (one.amax, one.noise) == (other.amax, other.noise)
    assert one.factors.keys() == other.factors.keys() != set()
    assert all(np.array_equal(factors, other.factors[seam]) for seam, factors in one.factors.items())


def test_weights_are_those_of_the_source_whatever_was_merged_into_it() -> None:
    model, text = llama(), text_of(21)
    plain = watched(source_of(model), text).amax
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    changed = watched(source_of(model), text).amax
    name = "model.layers.1.mlp.{}_proj.weight"
    assert changed[name.format("down")] == pytest.approx(2 * plain[name.format("down")])
    assert changed[name.format("up")] == plain[name.format("up")]


def test_progress_grows_to_the_whole() -> None:
    told: list[tuple[int, int]] = []

    class Heard(Silent):
        def advance(self, done_bytes: int, total_bytes: int) -> None:
            told.append((done_bytes, total_bytes))

    source = source_of(llama(tie_word_embeddings=False))
    watched(source, text_of(5), progress=Heard())
    assert told == sorted(told)
    assert told[0][0] > 0
    assert told[-1] == (layerwise.float32_bytes(source.tensors),) * 2


def test_what_is_not_finite_is_named() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 5] = float("nan")
    with pytest.raises(LlamaExportError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is not finite"):
        watched(source_of(model), text_of(5))


# Scales


def test_scales_reach_the_largest_magnitude_where_weights_have_one_scale_a_row() -> None:
    formats = {"int8": INT8_ROW, "fp8": FP8, "blocked": INT8, "dense": FP16, "dead": INT8_ROW, EMBEDDING: INT8_ROW}
    amax = {"int8": 12.7, "fp8": 44.8, "blocked": 1.0, "dense": 1.0, "dead": 0.0}
    scales = input_scales(Calibration(text_of(3), amax, {}, {}), formats)
    assert {name: (scale.scale, scale.dtype.name) for name, scale in scales.items()} == {
        "int8": (np.float16(12.7 / 127), "INT8"),
        "fp8": (np.float16(44.8 / 448), "FLOAT8E4M3FN"),
        "dead": (LEAST_SCALE, "INT8"),
    }
    assert np.float16(LEAST_SCALE) == LEAST_SCALE
    assert np.isfinite(1 / np.float16(LEAST_SCALE))


def test_inputs_that_smoothing_does_not_make_even_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_NOISE", 0.05)  # random models' inputs have no direction to spare
    model, text = llama(), text_of(30, 25)
    formats = plan_formats(source_tensors(model), "int8", policy=TENSORRT)
    before = watched(source_of(model), text, formats)
    token, name, other = text.sequences[0][0], *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("down", "up"))
    assert before.noise[name] < 0.05
    assert settled_formats(before, formats) == formats
    with torch.no_grad():  # a token whose numbers are all large, so that no channel takes them
        model.model.layers[1].post_attention_layernorm.weight[5] = 3000
        model.model.layers[1].mlp.up_proj.weight[:, 5] = 3
        model.model.layers[0].mlp.down_proj.weight[5] = model.model.layers[0].self_attn.o_proj.weight[5] = 0
        model.model.embed_tokens.weight[:, 5] = 0
        model.model.embed_tokens.weight[[token, text.sequences[1][0]], 5] = 1
    after = watched(source_of(model), text, formats)
    assert after.noise[name] > 0.05
    settled = settled_formats(after, formats)
    assert settled[name] == FP16
    assert name not in input_scales(after, settled)
    assert not any(name in seam.consumers for seam in after.factors), "nothing moves for what is not rounded"
    assert any(other in seam.consumers for seam in before.factors)
    assert settled_formats(after, formats, INT8)[name] == INT8
    for others in (FP8, INT8, FP16):  # of which only int8 inputs have a step that is the same for all
        assert settled_formats(after, dict.fromkeys(formats, others)) == dict.fromkeys(formats, others)


def test_only_inputs_that_are_rounded_alike_are_smoothed() -> None:
    source, text = source_of(llama()), text_of(30, 25)
    formats = plan_formats(source.tensors, "int8", policy=TENSORRT)
    layer = "model.layers.1."
    formats |= {f"{layer}self_attn.k_proj.weight": FP16, f"{layer}mlp.down_proj.weight": FP16}
    found = watched(source, text, formats)
    plain = watched(source, text)
    moved = {name for seam in found.factors for name in seam.consumers}
    assert not moved & {f"{layer}{part}.weight" for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}
    assert {f"{layer}{part}.weight" for part in ("mlp.up_proj", "mlp.gate_proj")} <= moved
    for name, format in formats.items():
        if format == FP16 and name in plain.amax:
            assert found.amax[name] == plain.amax[name]
            assert name not in found.noise
    assert not plain.noise
    assert not plain.factors


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_smoothed_model_with_outlier_channels_loses_less(precision: str) -> None:
    """Some channels of the norms are 30 times larger than others, as in trained models."""
    model, text = llama(tie_word_embeddings=False), text_of(60, 50, 40)
    generator = np.random.default_rng(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name:
                weight[generator.integers(0, 128, 6)] *= 30
    source, ids = source_of(model), generator.integers(0, 259, (2, 40))
    formats = plan_formats(source.tensors, precision, policy=TENSORRT)
    found, plain = watched(source, text, formats), watched(source, text)
    exact = logits_of(model, ids)

    def price(tensors: Any, scales: dict[str, InputScale]) -> float:
        twin = with_stored_weights(model, tensors, formats)
        round_inputs(twin, scales)
        return float(np.square(logits_of(twin, ids) - exact).mean())

    smoothed = price(scaled(source.tensors, found.factors), input_scales(found, formats))
    before = price(source.tensors, input_scales(plain, formats))
    assert smoothed < {"int8": 0.4, "fp8": 0.9}[precision] * before
    assert len(found.factors) >= 2 * model.config.num_hidden_layers


def round_inputs(model: Any, scales: dict[str, InputScale]) -> None:
    """Let `model` round what its projections read."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in scales:
            scale = scales[f"{name}.weight"]
            module.register_forward_pre_hook(lambda _module, x, scale=scale: rounded(x[0], scale))


def rounded(values: torch.Tensor, scale: InputScale) -> torch.Tensor:
    """ONNX's QuantizeLinear, which saturates, and DequantizeLinear."""
    steps = values / scale.scale
    if scale.dtype == ir.DataType.INT8:
        return steps.round().clamp(-128, 127) * scale.scale
    return steps.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale.scale


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("dialect", ["trt", "primitive-21"])
def test_a_graph_rounds_the_inputs_that_have_scales_and_no_others(precision: str, dialect: str, tmp_path: Path) -> None:
    model = llama(**VARIANTS["untied"])
    source = source_of(model)
    formats = plan_formats(source.tensors, precision, policy=TENSORRT)
    found = watched(source, text_of(40, 30), formats)
    tensors = scaled(source.tensors, found.factors)
    scales = input_scales(found, formats)
    for name in ("up", "gate"):  # they read the same
        del scales[f"model.layers.1.mlp.{name}_proj.weight"]
    graph = traced_once(model.config)
    lower_to(dialect, graph, model.config, tensors, precision, formats=formats, inputs=scales)
    ids = np.random.default_rng(6).integers(0, model.config.vocab_size, (1, 12))
    logits = Replay(write(graph, tensors, tmp_path), 1).read(ids, (9, 12))
    twin = with_stored_weights(model, tensors, formats)
    plain = logits_of(twin, ids)
    round_inputs(twin, scales)
    expected = logits_of(twin, ids)
    price = np.abs(plain - expected).mean()
    assert price > 1e-4
    assert np.abs(logits - expected).mean() < 0.02 * price, "values halfway may round either way, a few of them"


# The text


@pytest.fixture
def opened(tmp_path: Path) -> Source:
    return open_source(str(write_llama_folder(tmp_path / "llama")))


def written(folder: Path, content: str | bytes) -> Path:
    file = folder / "text.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_each_sequence_begins_as_the_tokenizer_begins_a_text(opened: Source, tmp_path: Path) -> None:
    file = written(tmp_path, SENTENCE * 20)
    found = calibration_text(opened, file, 64)
    assert [len(sequence) for sequence in found.sequences[:-1]] == [64] * (len(found.sequences) - 1)
    assert 1 < len(found.sequences[-1]) <= 64
    assert {sequence[0] for sequence in found.sequences} == {opened.tokens.bos}
    assert found.tokens == sum(map(len, found.sequences))
    assert (found.sha256, found.read_bytes) == (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size)
    assert found.note == f"Inputs of projections were calibrated on {found.tokens:,} tokens of text.txt."


def test_without_bos_sequences_are_the_text_itself(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = write_llama_folder(tmp_path / "llama", add_bos=False)
    found = calibration_text(open_source(str(folder)), written(tmp_path, SENTENCE * 20), 2048)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SENTENCE * 20).ids
    assert list(found.sequences[0]) == ids[: texts.LENGTH]
    assert sum(found.sequences, ()) == tuple(ids)


@pytest.mark.parametrize("context", [1, 2, 100, 511, 512, 4096])
def test_there_are_never_more_tokens_than_meant(opened: Source, tmp_path: Path, context: int) -> None:
    found = calibration_text(opened, written(tmp_path, SENTENCE * 500), context)
    longest = max(map(len, found.sequences))
    assert longest <= max(2, min(context, texts.LENGTH))  # a token and what begins each text
    assert texts.TOKENS - longest < found.tokens <= texts.TOKENS


def test_settings_that_cut_or_pad_texts_do_not_count(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    plain = calibration_text(open_source(str(folder)), written(tmp_path, SENTENCE * 9), 2048)
    tokenizer["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    write_json(folder / "tokenizer.json", tokenizer)
    assert calibration_text(open_source(str(folder)), plain.file, 2048) == plain


def test_of_a_large_file_only_the_beginning_is_read(
    opened: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_TOKEN_BYTES", 3)
    file = written(tmp_path, b"!" + ("я" * 800).encode() + b"\xff" * 5000)
    found = calibration_text(opened, file, 64, 500)
    assert found.read_bytes == 1500  # within one of the Cyrillic letters, each of two bytes
    assert found.sha256 == hashlib.sha256(file.read_bytes()[:1500]).hexdigest()


@pytest.mark.parametrize("tokens", [128, 1000, 16_384])
def test_more_or_fewer_tokens_may_be_asked_for(opened: Source, tmp_path: Path, tokens: int) -> None:
    file = written(tmp_path, SENTENCE * 1500)
    found = calibration_text(opened, file, 64, tokens)
    assert tokens - 64 <= found.tokens <= tokens
    with pytest.raises(LlamaExportError, match=f"takes at least {tokens // 32}; .*--calibrate built-in"):
        calibration_text(opened, written(tmp_path, "no"), 64, tokens)


def test_our_own_text_stands_for_one_and_keeps_a_part_back(opened: Source) -> None:
    found = calibration_text(opened, BUILT_IN, 512, texts.SOLVED_TOKENS)
    calibrates, held_out = texts.built_in_text()
    assert 15_000 < found.tokens <= 16_384
    assert found.read_bytes == len(calibrates.encode())
    assert "tokens of the built-in text." in found.note
    assert len(held_out) > 5000
    assert not set(calibrates.split("\n\n")) & set(held_out.split("\n\n"))


def test_the_first_tokens_are_whole_sequences() -> None:
    text = text_of(30, 20, 10)
    assert [text.first(most).tokens for most in (60, 59, 50, 49, 30, 1)] == [60, 50, 50, 30, 30, 30]
    assert text.first(30).sequences == text.sequences[:1]


def test_a_byte_order_mark_is_no_text(opened: Source, tmp_path: Path) -> None:
    plain = calibration_text(opened, written(tmp_path, SENTENCE * 9), 64)
    marked = calibration_text(opened, written(tmp_path, b"\xef\xbb\xbf" + (SENTENCE * 9).encode()), 64)
    assert marked.sequences == plain.sequences


BAD: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "There is no .*text.txt; --calibrate takes a text file in UTF-8"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\t\n", "is empty"),
    "utf-16": (SENTENCE.encode("utf-16") * 9, "no UTF-8 text .byte 0"),
    "latin-1": (("Größe " * 99).encode("latin-1"), "no UTF-8 text .byte 2"),
    "cut short": (SENTENCE.encode() * 9 + b"\xd1", "no UTF-8 text"),
    "zeros": (b"\0" * 5000, "zero bytes"),
    "short": (b"Hello.", "holds [1-9] tokens, but calibrating takes at least 128"),
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_text_that_is_none_is_refused_in_a_sentence(opened: Source, tmp_path: Path, kind: str) -> None:
    content, message = BAD[kind]
    file = tmp_path / "text.txt" if content is None else written(tmp_path, content)
    with pytest.raises(LlamaExportError, match=message) as caught:
        calibration_text(opened, file, 64)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_plain_file_is_refused(opened: Source, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        calibration_text(opened, tmp_path, 64)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with pytest.raises(UsageError, match="no plain file"):
        calibration_text(opened, tmp_path / "pipe", 64)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_others_is_refused(opened: Source, tmp_path: Path) -> None:
    file = written(tmp_path, SENTENCE * 9)
    file.chmod(0)
    with pytest.raises(LlamaExportError, match="Permission denied"):
        calibration_text(opened, file, 64)


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama", vocab=300)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 262}
    write_json(folder / "config.json", config)
    write_weights(folder, random_weights(config))
    with pytest.raises(LlamaExportError, match="beyond the model's 262"):
        calibration_text(open_source(str(folder)), written(tmp_path, SENTENCE * 9), 64)


# Memory

CHILD = """
import sys
from pathlib import Path
from llama_export.export.calibrate import calibrate
from llama_export.export.calibration_text import calibration_text
from llama_export.export.source import open_source
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.policy import TENSORRT
from llama_export.progress import Silent

source = open_source(sys.argv[1])
formats = plan_formats(source.tensors, "int8", policy=TENSORRT)
calibrate(source, calibration_text(source, Path(sys.argv[2]), 128), 128, formats, Silent())
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


def peak_mb(folder: Path, text: Path) -> float:
    """Peak resident memory of calibrating in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(text)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_one_layer_is_in_memory_however_many_there_are(tmp_path: Path) -> None:
    text = written(tmp_path, SENTENCE * 6)
    sizes = {"hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 2048, "dtype": "bfloat16"}
    few, many = 2, 32
    shallow = peak_mb(write_llama_folder(tmp_path / "shallow", layers=few, **sizes), text)
    deep = write_llama_folder(tmp_path / "deep", layers=many, **sizes)
    layer = 4 * (3 * 512 * 2048 + 3 * 512 * 512) / 1e6  # MB
    peak = peak_mb(deep, text)
    print(f"{few} layers {shallow:.0f} MB, {many} layers {peak:.0f} MB; one layer is {layer:.0f} MB")
    assert (many - few) * layer > 400
    assert peak < shallow + 5 * layer  # room for the allocator
