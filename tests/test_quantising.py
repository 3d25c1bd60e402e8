"""Calibrated quantisation, layer by layer: what a method is told is what the finished model computes, and what it
answers is what the bundle gets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.errors import LlamaExportError
from llama_export.export.calibration_text import CalibrationText
from llama_export.export.quantising import Calibrated, Method, Run, calibrated, opened_work
from llama_export.export.quantising import layer as layer_module
from llama_export.export.quantising import statistics as statistics_module
from llama_export.export.quantising.statistics import Channels, Statistics, Sums
from llama_export.export.source import Source, open_source
from llama_export.optimize.equivalence import Seam
from llama_export.optimize.formats import EMBEDDING, FP16, FP32, INT4, INT8_ROW, Format, int_format
from llama_export.optimize.overlay import searched
from llama_export.optimize.plan import head_of, plan_formats
from llama_export.optimize.quantise import blocks_of, dequantise, quantise, stored_values
from llama_export.optimize.quantisers.search import search
from llama_export.optimize.tensors import Blocks, Float32, SourceTensor
from llama_export.progress import Silent
from support.graphs import VARIANTS, llama, logits_of, source_tensors, with_stored_weights
from support.hf_models import write_llama_folder
from support.prequantised import gptq_parts
from test_prequantised import gptq_settings, write

LENGTHS = (17, 1, 33)


class Asked:
    """A method that rounds to nearest and remembers what it was told."""

    def __init__(self) -> None:
        self.statistics: list[Statistics] = []
        self.weights: list[torch.Tensor] = []
        self.formats: list[Format] = []
        self.channels: list[Mapping[str, Channels]] = []
        self.seams: list[tuple[Seam, ...]] = []

    def solve(self, weight: torch.Tensor, statistics: Statistics, format: Format) -> Blocks:
        self.statistics.append(statistics)
        self.weights.append(weight.clone())
        self.formats.append(format)
        return quantise(weight.numpy(), format)

    def scales(
        self,
        seams: tuple[Seam, ...],
        weights: Mapping[str, torch.Tensor],
        inputs: Mapping[str, Channels],
        formats: Mapping[str, Format],
    ) -> dict[Seam, Float32]:
        assert (
            {name for seam in seams for name in (*seam.producers, *seam.consumers)} <= weights.keys() <= formats.keys()
        )
        self.channels.append(inputs)
        self.seams.append(seams)
        random = np.random.default_rng(int(seams[0].producers[0].split(".")[2]))
        return {seam: np.exp(0.5 * random.standard_normal(seam.channels, np.float32)) for seam in seams}

    def method(self, *, scaling: bool = False, cross: bool = False) -> Method:
        return Method("nearest", 1, "Nearest", self.solve, cross, self.scales if scaling else None)


def source_of(model: Any, tensors: Mapping[str, SourceTensor] | None = None) -> Source:
    config = json.loads(model.config.to_json_string())
    return Source("tests/model", None, "folder", config, tensors or source_tensors(model), {}, None, None)


def text_of(vocab: int, *lengths: int) -> CalibrationText:
    generator = np.random.default_rng(1)
    sequences = tuple(tuple(generator.integers(0, vocab, length).tolist()) for length in lengths or LENGTHS)
    return CalibrationText(Path("text.txt"), sequences, "", 0)


def run_of(model: Any, method: Method, formats: Mapping[str, Format] | None = None, **changes: Any) -> Run:
    source = changes.pop("source", None) or source_of(model)
    text = changes.pop("text", None) or text_of(model.config.vocab_size)
    chosen = plan_formats(source.tensors, "int4") if formats is None else formats
    return Run(source, "0" * 64, chosen, changes.pop("scale_dtype", "float32"), text, 64, method, **changes)


def quantised(run: Run, folder: Path, progress: Silent | None = None) -> Calibrated:
    """The result, its tensors in memory."""
    with opened_work(folder / "work", run.key) as work:
        found = calibrated(run, work, progress or Silent())
        return Calibrated({name: in_memory(one) for name, one in found.tensors.items()}, found.errors, found.taken_over)


def in_memory(tensor: SourceTensor) -> SourceTensor:
    values = tensor.read(0, tensor.shape[0])
    blocks = None if tensor.blocks is None else tensor.blocks(0, tensor.shape[0])

    def cut(start: int, stop: int) -> Blocks:
        assert blocks is not None
        zeros = None if blocks.zeros is None else blocks.zeros[start:stop]
        return Blocks(blocks.format, blocks.codes[start:stop], blocks.scales[start:stop], zeros)

    return SourceTensor(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        tensor.format,
        lambda start, stop: values[start:stop],
        None if blocks is None else cut,
    )


def inputs_of(model: Any, text: CalibrationText) -> dict[str, torch.Tensor]:
    """What each projection of a whole transformers model reads, [tokens, columns], by the name of its weight."""
    found: dict[str, list[torch.Tensor]] = {}
    head = EMBEDDING if model.config.tie_word_embeddings else "lm_head.weight"

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, inputs: found.setdefault(name, []).append(inputs[0][0].detach().clone())

    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    hooks = [
        module.register_forward_pre_hook(hook(head if name == "lm_head" else f"{name}.weight"))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        for sequence in text.sequences:
            model(torch.tensor([sequence]))
    for one in hooks:
        one.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def weights_of(model: Any, text: CalibrationText) -> dict[str, torch.Tensor]:
    """What tokens count for the matrices that add to the hidden states, [tokens, 1], by the name of their weight."""
    found: dict[int, list[torch.Tensor]] = {}

    def hook(index: int) -> Callable[..., None]:
        return lambda _module, _inputs, left: found.setdefault(index, []).append(1 / left[0].square().mean(-1))

    hooks = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for sequence in text.sequences:
            model(torch.tensor([sequence]))
    for one in hooks:
        one.remove()
    names = ("self_attn.o_proj", "mlp.down_proj")
    return {
        f"model.layers.{index}.{name}.weight": torch.cat([part / part.mean() for part in parts])[:, None]
        for index, parts in found.items()
        for name in names
    }


def order_of(model: Any) -> list[str]:
    """The matrices as a method meets them."""
    parts = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
    names = [f"model.layers.{index}.{part}.weight" for index in range(model.config.num_hidden_layers) for part in parts]
    return [*names, EMBEDDING if model.config.tie_word_embeddings else "lm_head.weight"]


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 2e-4 * float(wanted.abs().max())


# What a method is told


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_is_told_what_its_matrix_reads_in_the_finished_model(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics_module, "_PANEL", 50)  # so that these sums come in several parts too
    model, asked = llama(**VARIANTS[variant]), Asked()
    run = run_of(model, asked.method(cross=True))
    found = quantised(run, tmp_path)
    twin = with_stored_weights(model, found.tensors, run.formats)
    after, before, counts = inputs_of(twin, run.text), inputs_of(model, run.text), weights_of(model, run.text)
    assert [run.formats[name] for name in order_of(model)] == asked.formats
    for name, statistics, weight in zip(order_of(model), asked.statistics, asked.weights, strict=True):
        read, original = after[name], before[name]
        assert statistics.tokens == len(read) == sum(LENGTHS)
        counted = read * counts.get(name, 1)
        assert close(statistics.hessian, counted.T @ read / len(read)), name
        assert torch.equal(statistics.hessian, statistics.hessian.T)
        assert statistics.cross is not None
        assert close(statistics.cross, counted.T @ original / len(read)), name
        assert torch.equal(weight, torch.from_numpy(run.source.tensors[name].read(0, len(weight))))
    assert not close(statistics.hessian, original.T @ original / len(read))  # or the streams are one


def test_matrices_that_read_the_same_share_what_is_made_of_it(tmp_path: Path) -> None:
    made: list[int] = []
    answers = []

    def solve(weight: torch.Tensor, statistics: Statistics, format: Format) -> Blocks:
        answers.append(statistics.once("factor", lambda: made.append(1) or len(made)))
        return quantise(weight.numpy(), format)

    quantised(run_of(llama(), Method("shared", 1, "Shared", solve)), tmp_path)
    assert answers[:7] == [1, 1, 1, 2, 3, 3, 4]
    assert len(made) == 3 * 4 + 1


def test_means_do_not_depend_on_how_tokens_come() -> None:
    read = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    whole, parts = (Sums("x", 30, torch.device("cpu"), cross=False) for _ in range(2))
    whole.add(read)
    for part in (read[:1], read[1:33], read[33:]):
        parts.add(part[None])
    assert close(whole.statistics().hessian, read.T @ read / 40)
    assert close(parts.statistics().hessian, read.T @ read / 40)


# What becomes of the answers


@pytest.mark.parametrize("variant", ["grouped", "untied", "biased", "odd-rows", "qwen2"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_rounding_to_nearest_gives_what_it_gives_without_a_text(variant: str, precision: str, tmp_path: Path) -> None:
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    formats = plan_formats(tensors, precision)
    found = quantised(run_of(model, Asked().method(), formats), tmp_path).tensors
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        rows = tensor.shape[0]
        assert np.array_equal(
            stored_values(found[name], formats[name], 0, rows, "float32"),
            stored_values(tensor, formats[name], 0, rows, "float32"),
        )
        assert found[name].shape == tensor.shape


def test_codes_are_stored_as_the_method_made_them(tmp_path: Path) -> None:
    """With zero points, an odd number of blocks, and scales of any sign."""
    model, given = llama(**VARIANTS["odd-rows"]), {}
    format = int_format(4, 16, zeros=True)

    def solve(weight: torch.Tensor, _statistics: Statistics, format: Format) -> Blocks:
        random, (rows, columns) = np.random.default_rng(len(given)), weight.shape
        count = format.blocks(columns)
        blocks = Blocks(
            format,
            random.integers(0, 16, (rows, format.padded(columns)), np.uint8),
            (0.01 * random.standard_normal((rows, count))).astype(np.float32),
            random.integers(0, 16, (rows, count), np.uint8),
        )
        given[order_of(model)[len(given)]] = blocks
        return blocks

    tensors = source_tensors(model)
    formats = {name: format if len(one.shape) > 1 and name != EMBEDDING else FP32 for name, one in tensors.items()}
    with opened_work(tmp_path / "work", {}) as work:
        found = calibrated(run_of(model, Method("random", 1, "Random", solve), formats), work, Silent()).tensors
        for name, blocks in given.items():
            rows = tensors[name].shape[0]
            for start, stop in ((0, rows), (3, 5), (rows - 1, rows)):
                own = blocks_of(found[name], format)(start, stop)
                assert np.array_equal(own.codes, blocks.codes[start:stop])
                assert np.array_equal(own.scales, blocks.scales[start:stop])
                assert np.array_equal(own.zeros, blocks.zeros[start:stop])
                assert np.array_equal(found[name].read(start, stop), dequantise(own, tensors[name].shape[1]))
            assert found[name].dtype == "Random"


def test_the_head_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = llama(), Asked()
    whole = quantised(run_of(model, asked.method()), tmp_path).tensors[EMBEDDING]
    monkeypatch.setattr(layer_module, "PIECE", 100 * 128)
    parts = quantised(run_of(model, asked.method()), tmp_path).tensors[EMBEDDING]
    assert [len(weight) for weight in asked.weights[-4:]] == [asked.weights[-4].shape[0], 100, 100, 59]
    assert len({id(statistics) for statistics in asked.statistics[-3:]}) == 1
    assert np.array_equal(parts.read(0, 259), whole.read(0, 259))


def test_scales_of_graphs_in_float16_are_known_to_the_method_and_to_the_quantised_stream(tmp_path: Path) -> None:
    model, asked = llama(), Asked()
    run = run_of(model, asked.method(), scale_dtype="float16")
    found = quantised(run, tmp_path).tensors
    assert all(format.half for format in asked.formats)
    twin = with_stored_weights(model, found, run.formats, np.float16)
    after, counts = inputs_of(twin, run.text), weights_of(model, run.text)
    for name, statistics in zip(order_of(model), asked.statistics, strict=True):
        assert close(statistics.hessian, (after[name] * counts.get(name, 1)).T @ after[name] / sum(LENGTHS))
        blocks = found[name].blocks(0, 5)
        assert blocks.format == run.formats[name]
        assert np.array_equal(blocks.scales, blocks.scales.astype(np.float16).astype(np.float32))


# Which tensors are asked for


def test_only_blocks_of_integers_are_the_methods_work(tmp_path: Path) -> None:
    model, asked = llama(tie_word_embeddings=False), Asked()
    tensors = source_tensors(model)
    layer = "model.layers.1."
    formats = plan_formats(tensors, "int4") | {
        "lm_head.weight": FP16,
        f"{layer}self_attn.k_proj.weight": FP32,
        f"{layer}mlp.down_proj.weight": INT8_ROW,
        f"{layer}self_attn.o_proj.weight": FP16,
    }
    run = run_of(model, asked.method(), formats)
    found = quantised(run, tmp_path)
    names = [name for name in order_of(model) if formats[name].block]
    assert len(asked.formats) == len(names) == 21 - 3
    after = inputs_of(with_stored_weights(model, found.tensors, formats), run.text)
    counts = weights_of(model, run.text)
    for name, statistics in zip(names, asked.statistics, strict=True):
        assert close(statistics.hessian, (after[name] * counts.get(name, 1)).T @ after[name] / sum(LENGTHS)), name
    assert formats[EMBEDDING].block  # looked up: no text tells of it
    assert {name for name, one in found.tensors.items() if one.blocks is not None} == {*names, EMBEDDING}


def test_a_checkpoints_own_codes_stay_and_others_are_made_of_their_values(tmp_path: Path) -> None:
    write(tmp_path / "model", gptq_settings(4, 32, True), gptq_parts, group=32, symmetric=True)
    source = open_source(str(tmp_path / "model"))
    own = plan_formats(source.tensors, None)
    wanted = {name: int_format(8) if "down_proj" in name else format for name, format in own.items()}
    asked = Asked()
    model = llama()  # only its vocabulary counts here
    text = text_of(source.shape.vocab)
    found = quantised(run_of(model, asked.method(scaling=True), wanted, source=source, text=text), tmp_path).tensors
    assert [format.bits for format in asked.formats] == [8] * source.shape.layers
    assert not asked.channels  # moving scales would change the codes that stay
    for name, weight in zip([name for name in wanted if "down_proj" in name], asked.weights, strict=True):
        tensor = source.tensors[name]
        assert np.array_equal(weight.numpy(), tensor.read(0, tensor.shape[0]))
    for name, tensor in source.tensors.items():
        if tensor.keeps_own(wanted[name]):
            assert np.array_equal(found[name].blocks(0, 4).codes, tensor.blocks(0, 4).codes)


# Channel scales


@pytest.mark.parametrize("variant", ["grouped", "biased", "own-head-dim", "qwen2", "untied"])
def test_scales_move_between_tensors_and_the_method_sees_the_new_ones(variant: str, tmp_path: Path) -> None:
    model, asked = llama(**VARIANTS[variant]), Asked()
    run = run_of(model, asked.method(scaling=True, cross=True))
    found = quantised(run, tmp_path).tensors
    before = inputs_of(model, run.text)
    for index, channels in enumerate(asked.channels):
        assert {name.split(".")[2] for name in channels} == {str(index)}
        assert len(channels) == 7
        for name, one in channels.items():
            assert close(one.mean_square, before[name].square().mean(0)), name
            assert close(one.largest, before[name].abs().amax(0)), name
    norm = "model.layers.0.input_layernorm.weight"
    assert not np.allclose(found[norm].read(0, 128), run.source.tensors[norm].read(0, 128), rtol=0.1)
    twin = with_stored_weights(model, found, run.formats)
    after, counts = inputs_of(twin, run.text), weights_of(model, run.text)
    for name, statistics in zip(order_of(model), asked.statistics, strict=True):
        assert close(statistics.hessian, (after[name] * counts.get(name, 1)).T @ after[name] / sum(LENGTHS)), name
    exact = dict(zip(order_of(model), asked.weights, strict=True))
    moved = {name: found[name].read(0, tensor.shape[0]) for name, tensor in run.source.tensors.items()}
    state = {name: exact[name] if name in exact else torch.from_numpy(values) for name, values in moved.items()}
    state[EMBEDDING] = torch.from_numpy(run.source.tensors[EMBEDDING].read(0, model.config.vocab_size))
    ids = np.array([run.text.sequences[2]])
    wanted = logits_of(model, ids)
    model.load_state_dict(state, strict=False)
    assert np.abs(logits_of(model, ids) - wanted).max() < 1e-4  # unquantised, they compute the same


def test_an_adapter_beside_the_weights_keeps_scales_where_they_are(tmp_path: Path) -> None:
    asked = Asked()
    run = run_of(llama(), asked.method(scaling=True), scaling=False)
    quantised(run, tmp_path)
    assert not asked.channels


# A method that uses what it is told


def compensated(weight: torch.Tensor, statistics: Statistics, format: Format) -> Blocks:
    """GPTQ in its plainest form: symmetric blocks, columns in order."""
    rows, columns = weight.shape
    damped = statistics.hessian + 0.01 * statistics.hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    blocks, left = quantise(weight.numpy(), format), weight.clone()
    scales = torch.from_numpy(blocks.scales).repeat_interleave(format.block, 1)
    codes = torch.zeros(rows, format.padded(columns))
    for at in range(columns):
        scale = scales[:, at]
        codes[:, at] = (left[:, at] / torch.where(scale == 0, 1, scale)).round().clamp(-8, 7)
        error = (left[:, at] - codes[:, at] * scale) / upper[at, at]
        left[:, at:] -= error[:, None] * upper[at, at:]
    return Blocks(format, (codes + 8).to(torch.uint8).numpy(), blocks.scales)


def test_a_method_that_uses_the_statistics_keeps_more_of_the_model(tmp_path: Path) -> None:
    model = llama()
    text = text_of(32, *[48] * 24)  # few of the tokens: of all, a random model makes inputs that hardly tell any way
    tensors = source_tensors(model)
    formats = {name: INT4 if "layers" in name and len(tensor.shape) > 1 else FP32 for name, tensor in tensors.items()}
    plain = quantised(run_of(model, Asked().method(), formats, text=text), tmp_path)
    better = quantised(run_of(model, Method("gptq", 1, "GPTQ", compensated), formats, text=text), tmp_path)
    assert all(one < 0.65 * other for one, other in zip(better.errors, plain.errors, strict=True))


def test_errors_are_those_of_the_hidden_states(tmp_path: Path) -> None:
    model = llama()
    run = run_of(model, Asked().method())
    found = quantised(run, tmp_path)
    twin = with_stored_weights(model, found.tensors, run.formats)
    sums = np.zeros((2, model.config.num_hidden_layers))
    for sequence in run.text.sequences:
        with torch.no_grad():
            seen = [states_of(one, torch.tensor([sequence])) for one in (model, twin)]
        for index, (before, after) in enumerate(zip(*seen, strict=True)):
            sums[:, index] += float((after - before).square().sum()), float(before.square().sum())
    assert found.errors == pytest.approx(np.sqrt(sums[0] / sums[1]), rel=1e-4)


def states_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, state: seen.append(state)) for layer in model.model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float, tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = value
    with pytest.raises(LlamaExportError, match=f"{name} holds NaN or infinite"):
        quantised(run_of(model, Asked().method()), tmp_path)


def test_activations_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight").fill_(3e38)
    with pytest.raises(LlamaExportError, match=r"input of model\.layers\.0.* is not finite in float32"):
        quantised(run_of(model, Asked().method()), tmp_path)


# Without a text


def test_an_overlay_has_the_codes_of_its_method_and_leaves_others_alone() -> None:
    model = llama(tie_word_embeddings=False)
    tensors = source_tensors(model)
    formats = plan_formats(tensors, "int4") | {"lm_head.weight": FP16, "model.layers.0.mlp.up_proj.weight": INT8_ROW}
    found = searched(tensors, formats, lambda _, rows, format: search(rows, format), "float32")
    for name, tensor in tensors.items():
        if formats[name].block == 0:
            assert found[name] is tensor
            continue
        rows = tensor.read(3, 40)
        wanted = search(rows, formats[name])
        assert np.array_equal(blocks_of(found[name], formats[name])(3, 40).codes, wanted.codes)
        assert np.array_equal(found[name].read(3, 40), dequantise(wanted, tensor.shape[1]))


def test_an_overlay_of_rounding_to_nearest_changes_nothing() -> None:
    tensors = source_tensors(llama())
    formats = plan_formats(tensors, "int8")
    found = searched(tensors, formats, lambda _, rows, format: quantise(rows, format), "float16")
    for name, tensor in tensors.items():
        values = (stored_values(one, formats[name], 0, tensor.shape[0], "float16") for one in (found[name], tensor))
        assert np.array_equal(*values)


def test_an_overlay_tells_of_values_that_are_not_finite() -> None:
    values = np.ones((2, 64), np.float32)
    values[1, 40] = np.nan
    tensor = SourceTensor("w", (2, 64), "F32", FP32, lambda start, stop: values[start:stop])
    found = searched({"w": tensor}, {"w": INT4}, lambda _, rows, format: search(rows, format), "float32")["w"].blocks(
        0, 2
    )
    assert np.isfinite(found.scales).tolist() == [[True, True], [True, False]]


def test_an_embedding_of_its_own_is_quantised_without_the_text(tmp_path: Path) -> None:
    source = open_source(str(write_llama_folder(tmp_path / "model", tied=False)))
    formats = plan_formats(source.tensors, "int4")
    asked = Asked()
    run = Run(source, "0" * 64, formats, "float32", text_of(300), 64, asked.method())
    found = quantised(run, tmp_path)
    assert head_of(source.tensors) != EMBEDDING
    assert np.array_equal(
        found.tensors[EMBEDDING].read(0, 9),
        dequantise(quantise(source.tensors[EMBEDDING].read(0, 9), formats[EMBEDDING]), 64),
    )
