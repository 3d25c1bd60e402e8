"""The relatives of Llama, sliding windows, stretched contexts and large vocabularies: equal to transformers' models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from llama_export.build_options import BuildOptions
from llama_export.errors import LlamaExportError
from llama_export.export.canonical import canonical
from llama_export.export.config import ModelShape, check_config, expected_tensors, model_notes, transformers_config
from llama_export.export.families import FAMILIES, classes
from llama_export.export.reference import Original, StreamedModel
from llama_export.export.rotary import rotary_tables
from llama_export.export.trace import window_of
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.proof.reference import sample_ids
from llama_export.runtime.proof.verify import verify
from support.graphs import (
    llama,
    logits_of,
    lowered,
    run_canonical,
    run_ort,
    saved_canonical,
    session,
    source_tensors,
    with_stored_weights,
)
from support.hf_models import random_weights, write_json, write_llama_folder, write_weights
from transformers import PreTrainedModel

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 5, "head_dim": 24},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
}


def config(model_type: str, /, **changes: Any) -> dict[str, Any]:
    """A config.json; a change to `...` takes the key away."""
    values = SMALL | {"model_type": model_type} | CONFIGS[model_type] | changes
    return {key: value for key, value in values.items() if value is not ...}


def distances(
    model: PreTrainedModel, folder: Path, ids: np.ndarray, cuts: tuple[int, ...], *, context: int = 64
) -> dict[str, float]:
    """Largest difference of logits to transformers' on all of `ids` at once: the canonical graph's, and the `ort`
    dialect's in float32 and in int4, which is compared on its own weights.
    """
    graph, tensors, found = canonical(model.config, context=context), source_tensors(model), {}
    path = saved_canonical(graph.clone(), model, folder / "canonical.onnx")
    found["canonical"] = run_canonical(path, ids, cuts) - logits_of(model, ids)
    for precision in ("fp32", "int4"):
        formats = lowered(graph.clone(), model.config, tensors, folder, precision=precision, context=context)
        expected = logits_of(with_stored_weights(model, tensors, formats), ids)
        found[precision] = run_ort(session(folder / "model.onnx"), ids, cuts) - expected
    return {name: float(np.abs(difference).max()) for name, difference in found.items()}


def some_ids(model: PreTrainedModel, length: int = 40, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (rows, length))


# Families


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"head_dim": ..., "num_key_value_heads": 4, "tie_word_embeddings": False}])
def test_the_tensors_of_a_family_are_those_of_transformers(model_type: str, changes: dict[str, Any]) -> None:
    given = config(model_type, **changes)
    with torch.device("meta"):
        model = classes(model_type).model(transformers_config(given))
    assert expected_tensors(given) == {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert type(model).__name__ == FAMILIES[model_type].architecture


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_of_a_family_are_those_of_transformers(model_type: str) -> None:
    absent = dict.fromkeys(("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "head_dim"), ...)
    absent |= dict.fromkeys(("sliding_window", "tie_word_embeddings", "attention_bias"), ...)
    given = config(model_type, **absent, num_attention_heads=32)
    shape, theirs = ModelShape.from_config(given), classes(model_type).config(**given)
    assert shape.kv_heads == theirs.num_key_value_heads
    assert (shape.max_positions, shape.rms_norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (shape.tied, shape.window) == (theirs.tie_word_embeddings, window_of(theirs))
    assert shape.head_dim == 2


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_may_be_named_by_its_architecture_alone(model_type: str) -> None:
    assert check_config(config(model_type, model_type=...)).family == model_type


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096},
        7_241_732_096,
    ),
    "Mistral-Nemo-Base-2407": (
        {"model_type": "mistral", "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 14336}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072, "sliding_window": None}
        | {"head_dim": 128},
        12_247_782_400,
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "sliding_window": 32768}
        | {"use_sliding_window": False, "max_window_layers": 24, "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "sliding_window": 131072}
        | {"use_sliding_window": False, "max_window_layers": 28},
        7_615_616_512,
    ),
}
"""What their config.json say of their shape, and the weights that they are known to have."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_relatives_have_the_weights_that_they_are_known_for(name: str) -> None:
    given, parameters = PUBLISHED[name]
    shape = check_config(given)
    assert shape.parameters() == parameters
    assert shape.window == (4096 if name == "Mistral-7B-v0.1" else None)


# Spellings of the rotary embedding

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", ROPES)
def test_old_and_new_spellings_turn_alike(kind: str, model_type: str) -> None:
    """And as transformers turns heads when it reads the config.json itself."""
    named = {"rope_type": kind, **ROPES[kind]}
    old = {"rope_theta": 5e4, "rope_scaling": {"type": kind, **ROPES[kind]} if kind != "default" else None}
    spellings = (old, {"rope_theta": 5e4, "rope_scaling": named}, {"rope_parameters": {**named, "rope_theta": 5e4}})
    theirs = classes(model_type)
    for spelling in spellings:
        given = config(model_type, **spelling)
        cos, sin = theirs.rotary(theirs.config(**copy.deepcopy(given)))(torch.zeros(1), torch.arange(64)[None])
        for mine, both_halves in zip(rotary_tables(transformers_config(given), 64), (cos, sin), strict=True):
            assert np.abs(np.tile(mine, 2) - both_halves[0].numpy()).max() < 1e-6


# Vocabularies


@pytest.mark.parametrize("vocab", [32001, 32003, 128257])
def test_odd_vocabularies(vocab: int, tmp_path: Path) -> None:
    """The middle one with a head of its own; nothing of them is a multiple of a block, nor of what a kernel takes."""
    sizes = {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 77}
    model = llama(vocab_size=vocab, num_hidden_layers=1, tie_word_embeddings=vocab != 32003, **sizes)
    ids = some_ids(model, 9, rows=1)
    ids[0, -2:] = vocab - 1
    assert max(distances(model, tmp_path, ids, (6, 8, 9)).values()) < 1e-4


# Sliding windows


@pytest.mark.parametrize("window", [1, 5, 39])
def test_windows_in_one_piece_in_chunks_and_in_steps(window: int, tmp_path: Path) -> None:
    """Two rows in one piece and in steps that cross the window's end; one row in chunks longer than the window, since
    GroupQueryAttention takes no chunks of a batch."""
    model = llama(model_type="mistral", sliding_window=window)
    ids = some_ids(model)
    without = logits_of(llama(model_type="mistral", sliding_window=None), ids)
    assert np.abs(logits_of(model, ids) - without).max() > 1e-3
    graph, tensors = canonical(model.config, context=41), source_tensors(model)
    path = saved_canonical(graph.clone(), model, tmp_path / "canonical.onnx")
    lowered(graph, model.config, tensors, tmp_path, precision="fp32", context=41)
    expected, dialect = logits_of(model, ids), session(tmp_path / "model.onnx")
    for cuts, rows in (((40,), 2), ((3, *range(4, 41)), 2), ((7, 29, 31, 40), 1)):
        assert np.abs(run_canonical(path, ids[:rows], cuts) - expected[:rows]).max() < 1e-4
        assert np.abs(run_ort(dialect, ids[:rows], cuts) - expected[:rows]).max() < 1e-4


@pytest.mark.parametrize(("window", "context", "kept"), [(47, 48, True), (48, 48, False)])
def test_a_window_that_no_text_outgrows_is_left_out(window: int, context: int, kept: bool) -> None:
    given = llama(model_type="mistral", sliding_window=window, num_hidden_layers=1)
    graph = canonical(given.config, context=context)
    assert ("And" in {node.op_type for node in graph.graph}) == kept
    lowered_to = attributes_of(graph, given, context)
    assert lowered_to.get("local_window_size") == (window if kept else None)
    notes = model_notes(config("mistral", sliding_window=window), context)
    assert [f"the latest {window} tokens" in note for note in notes] == [True] * kept


def attributes_of(graph: ir.Model, model: PreTrainedModel, context: int) -> dict[str, Any]:
    from llama_export.optimize.ort.attention import lower_attention

    lower_attention(graph, rotary_tables(model.config, context))
    attention = next(node for node in graph.graph if node.op_type == "GroupQueryAttention")
    return {name: attribute.value for name, attribute in attention.attributes.items()}


WINDOWS: dict[str, tuple[dict[str, Any], int | None]] = {
    "mistral, absent": (config("mistral", sliding_window=...), 4096),
    "mistral, null": (config("mistral", sliding_window=None), None),
    "mistral": (config("mistral", sliding_window=1024), 1024),
    "qwen2, off": (config("qwen2", sliding_window=4096, use_sliding_window=False), None),
    "qwen2, not said": (config("qwen2", sliding_window=4096), None),
    "qwen2, on": (config("qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=0), 7),
    "qwen2, null": (config("qwen2", sliding_window=None, use_sliding_window=True, max_window_layers=0), None),
    "qwen2, beyond the last layer": (config("qwen2", sliding_window=7, use_sliding_window=True), None),
    "qwen2, by layers": (
        config("qwen2", sliding_window=7, use_sliding_window=True, layer_types=["sliding_attention"] * 2),
        7,
    ),
    "llama knows none": (config("llama", sliding_window=7), None),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_read_as_transformers_does(case: str) -> None:
    given, window = WINDOWS[case]
    assert check_config(given).window == window
    assert window_of(transformers_config(given)) == window


# Dynamic rope


def stretched() -> PreTrainedModel:
    return llama(
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        num_hidden_layers=2,
    )


@pytest.mark.parametrize("context", [40, 64])
def test_a_dynamic_rope_is_fixed_for_the_context(context: int, tmp_path: Path) -> None:
    """transformers computes the same base on one text of that length; the chunks of a bundle share it."""
    model = stretched()
    ids = some_ids(model, context, rows=1)
    plain = llama(max_position_embeddings=16, num_hidden_layers=2)
    assert np.abs(logits_of(model, ids) - logits_of(plain, ids)).max() > 0.1
    found = distances(model, tmp_path, ids, (20, context - 1, context), context=context)
    assert max(found.values()) < 1e-4
    tensors = source_tensors(model)
    streamed = StreamedModel(model.config, tensors, context, (Original(tensors),))

    def sampled(*texts: np.ndarray) -> np.ndarray:
        return streamed.run([text.tolist() for text in texts], Silent())["original"].logits.sampled

    whole = np.concatenate([logits_of(model, row[None])[0] for row in ids])
    assert np.abs(sampled(*ids) - whole[:, sample_ids(whole.shape[1])]).max() < 1e-4
    assert np.abs(sampled(ids[0, :8]) - sampled(ids[0])[:8]).max() < 1e-4  # whatever follows


def test_a_dynamic_rope_up_to_the_original_context_is_the_original_one(tmp_path: Path) -> None:
    model = stretched()
    assert max(distances(model, tmp_path, some_ids(model, 16, rows=1), (7, 15, 16), context=16).values()) < 1e-4
    plain = llama(max_position_embeddings=16, num_hidden_layers=2)
    for mine, theirs in zip(rotary_tables(model.config, 16), rotary_tables(plain.config, 16), strict=True):
        assert (mine == theirs).all()


# The whole way


def checkpoint(path: Path, given: dict[str, Any], *, add_bos: bool = True) -> Path:
    """A folder with a random model of this config.json."""
    sizes = {"vocab": given["vocab_size"], "max_positions": given["max_position_embeddings"]}
    write_llama_folder(path, add_bos=add_bos, **sizes)
    write_json(path / "config.json", given | {"bos_token_id": 0, "eos_token_id": [1, 2], "dtype": "float32"})
    write_weights(path, random_weights(given))
    return path


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_a_bundle_of_a_relative_is_built_and_verified(model_type: str, tmp_path: Path) -> None:
    slides = model_type == "mistral"
    folder = checkpoint(tmp_path / "model", config(model_type), add_bos=slides)
    report = build(BuildOptions(model=str(folder), target="cpu", output=tmp_path / "bundle", precision="int4"))
    assert (report.manifest.tokens.eos, report.manifest.tokens.add_bos) == ((1, 2), slides)
    assert any("the latest 5 tokens" in note for note in report.manifest.notes) == slides
    assert report.manifest.minimum["onnxruntime"] == ("1.24.0" if slides else "1.23.2")
    bundle = open_bundle(tmp_path / "bundle")
    assert verify(bundle, check_hashes=True, threads=1, progress=Silent()).passed


def test_a_stretched_context_is_built_and_told(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.5}}
    folder = checkpoint(tmp_path / "model", config("llama", max_position_embeddings=32, **rope))

    def built(context: int | None) -> tuple[int, list[str]]:
        options = BuildOptions(str(folder), "cpu", tmp_path / "bundle", "fp32", context, force=True)
        manifest = build(options).manifest
        return manifest.limits.context, [note for note in manifest.notes if "rotary base" in note]

    assert built(None) == (32, [])
    context, notes = built(80)
    assert context == 80
    (note,) = notes
    assert "fixed at 59,342.3, which the dynamic rope type gives a text of all 80 tokens" in note
    with pytest.raises(LlamaExportError, match="--context 81 is above the 80 tokens"):
        built(81)
