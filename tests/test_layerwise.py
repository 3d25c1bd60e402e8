"""PyTorch's side: streamed layer by layer it is transformers' own model, with either set of weights, in one pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.errors import LlamaExportError
from llama_export.export import layerwise
from llama_export.export import reference as streamed_module
from llama_export.export.reference import Exact, Original, Samples, StreamedModel
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.policy import ORT, TENSORRT_RTX, Policy
from llama_export.optimize.quantise import stored_values
from llama_export.progress import Silent
from llama_export.runtime.proof.reference import EXACT, ORIGINAL, Identity, compress, fingerprint
from support.graphs import VARIANTS, llama, logits_of, source_tensors, with_stored_weights
from transformers import PreTrainedModel

CASES = [(variant, precision) for variant in VARIANTS for precision in ("fp32", "int4")]


class Heard(Silent):
    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def advance(self, done_bytes: int, total_bytes: int) -> None:
        self.told.append((done_bytes, total_bytes))


def streamed(model: PreTrainedModel, precision: str, scales: str = "float32", policy: Policy = ORT) -> StreamedModel:
    tensors = source_tensors(model)
    formats = plan_formats(tensors, precision, policy=policy)
    return StreamedModel(model.config, tensors, 64, (Original(tensors), Exact(tensors, formats, scales)))


def texts(vocab: int, *lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab, length).tolist() for length in lengths]


def identity(model: PreTrainedModel) -> Identity:
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    return Identity("0" * 64, "0" * 64, *sizes, head, config.vocab_size)


@pytest.mark.parametrize(("variant", "precision"), [*CASES, ("grouped", "fp16"), ("untied", "int8")])
def test_layer_by_layer_both_are_transformers_model(
    variant: str, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layerwise, "_STEP", 10_000)  # so that these small matrices come in several parts too
    monkeypatch.setattr(streamed_module, "_PIECE", 3_000)
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    sequences = texts(model.config.vocab_size, 17, 1, 33)
    full = {kind: tmp_path / kind for kind in (EXACT, ORIGINAL)}
    found = streamed(model, precision).run(sequences, Silent(), full=full)
    twins = {ORIGINAL: model, EXACT: with_stored_weights(model, tensors, plan_formats(tensors, precision))}
    assert list(found) == [ORIGINAL, EXACT]
    for kind, twin in twins.items():
        expected = np.concatenate([logits_of(twin, np.array([ids]))[0] for ids in sequences])
        logits = np.memmap(full[kind], np.float32, "r", shape=expected.shape)
        assert expected.std() > 0.1  # a degenerate model would prove nothing
        assert np.abs(logits - expected).max() < 1e-5
        kept, again = found[kind].logits, compress(np.asarray(logits))
        assert (kept.top_ids == again.top_ids).all()
        assert (kept.top_logits == again.top_logits).all()
        assert (kept.sampled == again.sampled).all()
        assert kept.logsumexp == pytest.approx(again.logsumexp, abs=1e-12)
    differ = np.abs(found[EXACT].logits.sampled - found[ORIGINAL].logits.sampled).max()
    assert differ == 0 if precision == "fp32" else differ > 1e-4
    assert found[EXACT].fingerprints.keys() == tensors.keys()
    assert not found[ORIGINAL].fingerprints  # nothing is compared with them


def inside(model: PreTrainedModel, ids: list[int]) -> tuple[list[torch.Tensor], Any]:
    """What each decoder layer of transformers' model leaves, and the cache."""
    seen: list[torch.Tensor] = []

    def watch(_module: torch.nn.Module, _inputs: object, state: torch.Tensor) -> None:
        seen.append(state)

    hooks = [layer.register_forward_hook(watch) for layer in model.model.layers]
    with torch.no_grad():
        past = model(torch.tensor([ids]), use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    return seen, past


@pytest.mark.parametrize("variant", ["grouped", "qwen2-window", "own-head-dim", "yarn"])
def test_samples_are_hidden_states_and_cache_of_transformers(variant: str) -> None:
    model = llama(**VARIANTS[variant])
    tensors, (ids, other) = source_tensors(model), texts(model.config.vocab_size, 11, 4)
    samples = Samples((0, 2), ((3, 10), (0, 1, 3)), identity(model))
    found = streamed(model, "int8").run([ids, other], Silent(), samples)
    twins = {ORIGINAL: model, EXACT: with_stored_weights(model, tensors, plan_formats(tensors, "int8"))}
    for kind, twin in twins.items():
        layers = found[kind].layers
        assert layers is not None
        seen, past = inside(twin, ids)
        for place, layer in enumerate(samples.layers):
            hidden = seen[layer][0, [3, 10]].numpy()[:, layers.hidden_ids]
            assert np.abs(layers.hidden[place, :2] - hidden).max() < 1e-5
            for name, whole in (("keys", past.layers[layer].keys), ("values", past.layers[layer].values)):
                flat = whole[0].transpose(0, 1).flatten(1).numpy()
                offset = len(ids) - len(flat)  # a window keeps the latest alone
                got = getattr(layers, name)[place, 1]
                assert np.abs(got - flat[10 - offset, layers.cache_ids]).max() < 1e-5
        assert layers.hidden.shape == (2, 5, len(layers.hidden_ids))
        assert layers.keys.std() > 0.01


def test_scales_are_those_that_survive_in_float16() -> None:
    model = llama()
    tensors = source_tensors(model)
    formats = plan_formats(tensors, "int4", policy=TENSORRT_RTX)
    found = {
        dtype: streamed(model, "int4", dtype, TENSORRT_RTX).run([[3, 5, 7]], Silent())[EXACT]
        for dtype in ("float16", "float32")
    }
    assert 0 < np.abs(found["float16"].logits.sampled - found["float32"].logits.sampled).max() < 0.1
    name = "model.layers.1.mlp.up_proj.weight"
    rows = stored_values(tensors[name], formats[name], 0, tensors[name].shape[0], np.float16)
    assert found["float16"].fingerprints[name] == fingerprint(iter([rows]))
    assert found["float32"].fingerprints[name] != fingerprint(iter([rows]))


def test_each_row_of_a_layer_is_read_once() -> None:
    model, read = llama(tie_word_embeddings=False), dict[str, int]()
    tensors = source_tensors(model)

    def counted(name: str) -> None:
        inner = tensors[name].read

        def rows(start: int, stop: int) -> np.ndarray:
            read[name] = read.get(name, 0) + stop - start
            return inner(start, stop)

        object.__setattr__(tensors[name], "read", rows)

    for name in tensors:
        counted(name)
    sides = (Original(tensors), Exact(tensors, plan_formats(tensors, "int4"), "float32"))
    StreamedModel(model.config, tensors, 64, sides).run([[1, 2, 3]], Silent())
    for name, tensor in tensors.items():
        if name != "model.embed_tokens.weight":
            assert read[name] == tensor.shape[0], name


def test_one_kind_alone_is_what_it_is_beside_the_other() -> None:
    model = llama()
    tensors, sequences = source_tensors(model), texts(model.config.vocab_size, 9, 5)
    both = streamed(model, "int4").run(sequences, Silent())
    for side in (Original(tensors), Exact(tensors, plan_formats(tensors, "int4"), "float32")):
        alone = StreamedModel(model.config, tensors, 64, (side,)).run(sequences, Silent())[side.kind]
        assert (alone.logits.sampled == both[side.kind].logits.sampled).all()
        assert alone.fingerprints == both[side.kind].fingerprints


def test_the_model_given_is_left_as_it_is() -> None:
    model = llama()
    model.config._attn_implementation = "eager"
    before = model.config.to_dict()
    streamed(model, "int4").run([[1, 2]], Silent())
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("tied", [True, False])
def test_progress_grows_to_the_whole(tied: bool) -> None:
    model, heard = llama(tie_word_embeddings=tied), Heard()
    tensors = source_tensors(model)
    streamed(model, "fp16").run([[1, 2]], heard)
    done = [one for one, _ in heard.told]
    assert done == sorted(done)
    assert heard.told[-1] == (done[-1], done[-1]) == (sum(math.prod(one.shape) for one in tensors.values()) * 4,) * 2


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
def test_logits_that_are_not_finite_are_no_reference(name: str) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = float("nan")
    with pytest.raises(LlamaExportError, match="not finite"):
        streamed(model, "fp32").run([[1, 2]], Silent())


def test_a_fingerprint_is_of_the_values_however_they_are_cut() -> None:
    rows = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    whole = fingerprint(iter([rows]))
    parts = fingerprint(iter([rows[:2], rows[2:3], rows[3:]]))
    assert parts[0] == whole[0]
    assert parts[1] == pytest.approx(whole[1]) == pytest.approx(float(np.linalg.norm(rows)))
    for changed in (rows * np.float32(1 + 2**-23), -rows, rows[::-1]):
        assert fingerprint(iter([changed]))[0] != whole[0]
    assert math.isnan(fingerprint(iter([rows * np.float32(np.nan)]))[1])
