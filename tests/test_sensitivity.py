"""What a format is predicted to cost, against what it costs; and how the prediction streams."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_export.errors import LlamaExportError
from llama_export.export import sensitivity
from llama_export.export.sensitivity import Sensitivity
from llama_export.optimize.formats import EMBEDDING, FP16, HEAD, Format, int_format
from llama_export.optimize.quantise import stored_values
from llama_export.optimize.tensors import Float32, SourceTensor
from llama_export.progress import Silent
from support.graphs import llama, source_tensors
from transformers import LlamaForCausalLM

INT4, INT8 = int_format(4, zeros=True), int_format(8, 16)


def as_stored(tensor: SourceTensor, format: Format, start: int, stop: int, rows: Float32) -> Float32:
    return stored_values(tensor, format, start, stop, np.float32, rows)


def sharp_llama(**sizes: object) -> LlamaForCausalLM:
    """A model whose predictions differ from one another: those of untrained ones are all nearly the same."""
    model = llama(**sizes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = 3.0 if "embed" in name or "lm_head" in name else 1.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale / weight.shape[1] ** 0.5)
    return model


def texts(model: LlamaForCausalLM, count: int = 6, length: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, model.config.vocab_size, (count, length), generator=generator).tolist()


def predicted(
    model: LlamaForCausalLM, formats: list[Format], folder: Path, sequences: list[list[int]] | None = None
) -> Mapping[str, Mapping[Format, float]]:
    tensors = source_tensors(model)
    candidates = {name: formats for name, tensor in tensors.items() if len(tensor.shape) == 2}
    found = Sensitivity(
        model.config, tensors, 64, texts(model) if sequences is None else sequences, candidates, as_stored, Silent()
    )
    return found.measure(folder)


@torch.no_grad()
def measured(model: LlamaForCausalLM, name: str, format: Format, sequences: list[list[int]]) -> float:
    """The KL divergence of the model with this one matrix stored so."""
    weights = dict(model.named_parameters())
    tied = model.config.tie_word_embeddings and name == EMBEDDING
    assert not tied or weights[name] is model.lm_head.weight
    ids = torch.tensor(sequences)
    before, kept = model(ids).logits.double().log_softmax(-1), weights[name].clone()
    tensor = source_tensors(model)[name]
    weights[name].copy_(torch.from_numpy(as_stored(tensor, format, 0, len(kept), kept.numpy().copy())))
    after = model(ids).logits.double().log_softmax(-1)
    weights[name].copy_(kept)
    return float((before.exp() * (before - after)).sum(-1).mean())


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


@pytest.mark.parametrize("tied", [False, True])
def test_predictions_are_near_what_each_matrix_really_costs(tied: bool, tmp_path: Path) -> None:
    model = sharp_llama(tie_word_embeddings=tied)
    sequences = texts(model, 16)
    found = predicted(model, [INT4, INT8], tmp_path, sequences)
    assert set(found) == {name for name, weight in model.named_parameters() if weight.dim() == 2}
    assert (HEAD in found) is not tied
    real = {name: measured(model, name, INT8, sequences) for name in found}
    ratios = {name: found[name][INT8] / real[name] for name in found}
    assert 0.7 < sum(found[name][INT8] for name in found) / sum(real.values()) < 1.4, ratios
    assert all(0.3 < ratio < 3 for ratio in ratios.values()), ratios
    assert np.corrcoef(ranks([found[name][INT8] for name in found]), ranks(list(real.values())))[0, 1] > 0.85
    coarse = {name: measured(model, name, INT4, sequences) for name in found}
    assert 0.6 < sum(found[name][INT4] for name in found) / sum(coarse.values()) < 1.6


def test_finer_formats_cost_less_and_what_keeps_the_weights_costs_nothing(tmp_path: Path) -> None:
    model = sharp_llama()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    formats = [int_format(4, 32, zeros=True), int_format(4, 16, zeros=True), int_format(8, 32), FP16]
    for costs in predicted(model, formats, tmp_path).values():
        coarse, fine, eight, same = (costs[format] for format in formats)
        assert coarse > fine > 50 * eight > 0
        assert same == 0


def test_the_same_model_is_predicted_the_same(tmp_path: Path) -> None:
    model = sharp_llama()
    assert predicted(model, [INT4], tmp_path) == predicted(model, [INT4], tmp_path)


def test_texts_of_different_lengths_and_pieces_of_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sharp_llama(tie_word_embeddings=False)
    sequences = [sequence[: 5 + 3 * index] for index, sequence in enumerate(texts(model))]
    whole = predicted(model, [INT8], tmp_path, sequences)
    monkeypatch.setattr(sensitivity, "IN_MEMORY", 0)  # what enters the layers lies in a file
    monkeypatch.setattr(sensitivity, "_PIECE", 100)
    pieces = predicted(model, [INT8], tmp_path, sequences)
    assert list(tmp_path.iterdir()) == []
    for name, costs in whole.items():
        assert pieces[name][INT8] == pytest.approx(costs[INT8], rel=1e-5)
    monkeypatch.setattr(sensitivity, "_LOGITS", 1 << 10)  # other labels are drawn
    drawn = predicted(model, [INT8], tmp_path, sequences)
    assert drawn[HEAD][INT8] == pytest.approx(whole[HEAD][INT8], rel=1e-3)
    total = sum(costs[INT8] for costs in whole.values())
    assert sum(costs[INT8] for costs in drawn.values()) == pytest.approx(total, rel=0.5)


def test_one_layer_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = [0, 0]
    real = sensitivity.decoder_layer

    def counted(*arguments: object) -> torch.nn.Module:
        layer: torch.nn.Module = real(*arguments)  # type: ignore[arg-type]
        alive[0] += 1
        alive[1] = max(alive)

        class Gone:
            def __del__(self) -> None:
                alive[0] -= 1

        layer.__dict__["gone"] = Gone()
        return layer

    monkeypatch.setattr(sensitivity, "decoder_layer", counted)
    predicted(sharp_llama(num_hidden_layers=5), [INT8], tmp_path)
    assert alive == [0, 1]


def test_numbers_that_overflow_are_told(tmp_path: Path) -> None:
    model = sharp_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    with pytest.raises(LlamaExportError, match="logits are not finite"):
        predicted(model, [INT8], tmp_path)
