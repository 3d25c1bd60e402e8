"""config.json: what is read, what is refused, and whether it agrees with transformers and with the tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.export.config import (
    ModelShape,
    check_config,
    check_tensors,
    expected_tensors,
    transformers_config,
)
from llama_export.export.rope import rope_type
from llama_export.optimize.formats import FP32
from llama_export.optimize.tensors import SourceTensor

BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "intermediate_size": 44,
    "vocab_size": 77,
    "max_position_embeddings": 99,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(**changes: Any) -> dict[str, Any]:
    """BASE with changes; None takes a key away."""
    return {key: value for key, value in (copy.deepcopy(BASE) | changes).items() if value is not None}


def tensors_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, SourceTensor]:
    def read(start: int, stop: int) -> np.ndarray:
        raise AssertionError("the checks must not read weights")

    return {name: SourceTensor(name, shape, "F32", FP32, read) for name, shape in shapes.items()}


def test_the_shape_is_read() -> None:
    assert ModelShape.from_config(config(tie_word_embeddings=True, attention_bias=True)) == ModelShape(
        layers=3,
        hidden=60,
        heads=6,
        kv_heads=2,
        head_dim=14,
        ffn=44,
        vocab=77,
        max_positions=99,
        tied=True,
        rms_norm_eps=1e-5,
        longest=99,
        biased=frozenset(f"self_attn.{name}_proj" for name in "qkvo"),
        window=None,
        family="llama",
    )


def test_defaults_are_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    small = config(num_key_value_heads=None, head_dim=None, max_position_embeddings=None, rms_norm_eps=None)
    shape, theirs = ModelShape.from_config(small), transformers_config(small)
    assert (shape.kv_heads, shape.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (6, 10)
    assert (shape.max_positions, shape.rms_norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (shape.tied, bool(shape.biased)) == (theirs.tie_word_embeddings, theirs.attention_bias or theirs.mlp_bias)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": None},
        {"attention_bias": True},
        {"mlp_bias": True, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    ],
)
def test_the_expected_tensors_are_those_of_transformers(changes: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers_config(config(**changes)))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert expected_tensors(config(**changes)) == theirs
    assert ModelShape.from_config(config(**changes)).parameters() == model.num_parameters()


OLD = {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}
NEW = {"rope_theta": None, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 5e5}}


@pytest.mark.parametrize("spelling", [OLD, NEW])
def test_both_spellings_of_rope_reach_transformers(spelling: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    given = config(**spelling)
    before = copy.deepcopy(given)
    parameters = transformers_config(given).rope_parameters
    assert parameters == LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 5e5}
    assert given == before
    assert rope_type(given) == "llama3"


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 32},
        OLD,
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2, "rope_theta": 1e4}},
    ],
)
def test_rope_types_that_export(rope: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    given = config(**rope)
    assert check_config(given).head_dim == 14
    assert LlamaRotaryEmbedding(transformers_config(given)).inv_freq.shape == (7,)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vision": ({"model_type": "mllama"}, r"is Llama 3\.2 Vision \('mllama'\), which is another network than Llama"),
    "vision by architecture": (
        {"architectures": ["MllamaForConditionalGeneration"]},
        r"is Llama 3\.2 Vision \('MllamaForConditionalGeneration'\)",
    ),
    "llama 4": ({"model_type": "llama4"}, r"is Llama 4 \('llama4'\)"),
    "llama 4 text": ({"model_type": "llama4_text", "architectures": None}, r"is Llama 4 \('llama4_text'\)"),
    "two families": (
        {"model_type": "mistral"},
        r"is mistral / LlamaForCausalLM, which is not supported; supported are llama \(LlamaForCausalLM\), mistral",
    ),
    **{
        f"{model_type}": (
            {"model_type": model_type, "architectures": [architecture]},
            rf"is {model_type} / {architecture}, which is not supported; .*, qwen2 \(Qwen2ForCausalLM\)\.",
        )
        for model_type, architecture in {
            "mixtral": "MixtralForCausalLM",
            "qwen2_moe": "Qwen2MoeForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
            "gemma2": "Gemma2ForCausalLM",
            "phi3": "Phi3ForCausalLM",
            "ministral": "MinistralForCausalLM",
        }.items()
    },
    "no model_type": ({"model_type": 7, "architectures": None}, "is 7, which is not supported"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "nameless": ({"model_type": None, "architectures": None}, "names neither model_type nor architectures"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but a Llama's is 'silu'"),
    "no layers": ({"num_hidden_layers": None}, "has no num_hidden_layers, but it must"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads is 0, but a whole number from 1"),
    "zero kv heads": ({"num_key_value_heads": 0}, "num_key_value_heads is 0, but a whole number from 1"),
    "kv heads": (
        {"num_key_value_heads": 4},
        "num_attention_heads is 6 and num_key_value_heads is 4, but the first must",
    ),
    "hidden": ({"hidden_size": 61}, "hidden_size is 61 and num_attention_heads is 6, but the first must be a multiple"),
    "odd head_dim": ({"head_dim": 7}, "a head_dim of 7, but the rotary embedding needs an even one"),
    "text": ({"vocab_size": "77"}, "vocab_size is '77', but a whole number"),
    "boolean": ({"vocab_size": True}, "vocab_size is True, but a whole number"),
    "fraction": ({"vocab_size": 77.5}, "vocab_size is 77.5, but a whole number"),
    "absurd": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but a whole number from 1 to 1024"),
    "epsilon": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, but a number above 1e-13"),
    "tied": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', but true or false"),
    "dynamic without factor": ({"rope_scaling": {"type": "dynamic"}}, "rope parameters lack factor"),
    "dynamic below 1": (
        {"rope_scaling": {"type": "dynamic", "factor": 0.5}},
        "factor is 0.5, but its rope type stretches the context, by 1 or more",
    ),
    "dynamic text": ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor is '2', but a number above 0"),
    "dynamic nan": ({"rope_scaling": {"type": "dynamic", "factor": float("nan")}}, "factor is nan, but a number"),
    "dynamic tiny heads": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
        "a head_dim of 2, but the dynamic rope type's formula divides by head_dim - 2",
    ),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "rope type is 'longrope', which this version does not"),
    "unknown rope": ({"rope_scaling": {"type": "lama3"}}, r"'lama3' is unknown; .* Did you mean 'llama3'\?"),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, "rope parameters lack factor"),
    "rope factor": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, but a number above 0"),
    "yarn text": ({"rope_scaling": YARN | {"attention_factor": "x"}}, "attention_factor is 'x', but a number above 0"),
    "yarn negative": ({"rope_scaling": YARN | {"attention_factor": -1}}, "attention_factor is -1, but a number above"),
    "yarn betas": (
        {"rope_scaling": YARN | {"beta_fast": 0.5}},
        "beta_slow is 1 and beta_fast is 0.5, but the first must be below the second",
    ),
    "llama3 factors": (
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
        "low_freq_factor is 4 and high_freq_factor is 4, but the first must be below the second",
    ),
    "rope theta": ({"rope_theta": "big"}, "rope_theta is 'big', but a number above 1"),
    "rope no object": ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', but an object is expected"),
    "partial": ({"partial_rotary_factor": 0.5}, "sets partial_rotary_factor, but only whole heads are rotated"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(LlamaExportError, match=message) as caught:
        check_config(config(**changes))
    assert "\n" not in str(caught.value)


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 0,
}
WINDOWS: dict[str, tuple[dict[str, Any], str]] = {
    "zero": (MISTRAL | {"sliding_window": 0}, "sliding_window is 0, but a whole number from 1"),
    "negative": (MISTRAL | {"sliding_window": -4096}, "sliding_window is -4096, but a whole number from 1"),
    "text": (MISTRAL | {"sliding_window": "4096"}, "sliding_window is '4096', but a whole number from 1"),
    "boolean": (MISTRAL | {"sliding_window": True}, "sliding_window is True, but a whole number from 1"),
    "a fraction": (QWEN2 | {"sliding_window": 4.5}, "sliding_window is 4.5, but a whole number from 1"),
    "switch": (QWEN2 | {"use_sliding_window": "yes"}, "use_sliding_window is 'yes', but true or false"),
    "full layers": (QWEN2 | {"max_window_layers": -1}, "max_window_layers is -1, but a whole number"),
    "some layers": (
        QWEN2 | {"max_window_layers": 2},
        "In this Qwen2 1 of 3 layers have a sliding window and the others see everything, which is not supported",
    ),
    "layer types": (
        QWEN2 | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "In this Qwen2 1 of 3 layers have a sliding window",
    ),
    "mistral by layers": (
        MISTRAL | {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "In this Mistral 1 of 3 layers have a sliding window",
    ),
    "contradiction": (
        MISTRAL | {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
        "layer_types say 'full_attention', but its sliding_window is 8",
    ),
    "no window": (
        QWEN2 | {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3},
        "layer_types say 'sliding_attention', but its sliding_window is None",
    ),
    "short list": (QWEN2 | {"layer_types": ["sliding_attention"]}, "layer_types must be a list of 3 names"),
    "no list": (QWEN2 | {"layer_types": "sliding_attention"}, "layer_types must be a list of 3 names"),
    "no names": (QWEN2 | {"layer_types": [1, 2, 3]}, "layer_types must be a list of 3 names"),
    "another kind": (QWEN2 | {"layer_types": ["linear_attention"] * 3}, "layer_types has 'linear_attention', but"),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_that_are_refused(case: str) -> None:
    changes, message = WINDOWS[case]
    with pytest.raises(LlamaExportError, match=message) as caught:
        check_config(config(**changes))
    assert "\n" not in str(caught.value)


def test_what_transformers_refuses_is_told_in_one_line() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(LlamaExportError, match=r"transformers refuses config\.json") as caught:
        transformers_config(config(attention_dropout="much"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_config_cannot_choose_code() -> None:
    pytest.importorskip("transformers")
    evil = {"_attn_implementation": "evil/kernels", "attn_implementation": "evil/kernels", "auto_map": {"A": "evil.B"}}
    theirs = transformers_config(config(**evil))
    assert theirs._attn_implementation != "evil/kernels"
    assert "evil" not in str(theirs.to_dict())


def test_the_shape_needs_no_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, llama_export.export.config; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensors_that_fit_come_back_in_the_models_order() -> None:
    expected = expected_tensors(config())
    shuffled = dict(reversed(tensors_of(expected).items()))
    harmless = {"model.layers.2.self_attn.rotary_emb.inv_freq": (7,), "model.rotary_emb.inv_freq": (7,)}
    assert list(check_tensors(config(), shuffled | tensors_of(harmless))) == list(expected)


TENSORS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...] | None], str]] = {
    "shape": (
        {},
        {"model.layers.1.self_attn.k_proj.weight": (84, 60)},
        r"Tensor model\.layers\.1\.self_attn\.k_proj\.weight has the shape \[84, 60\], but config\.json expects "
        r"\[28, 60\] \(num_key_value_heads \* head_dim, hidden_size\)",
    ),
    "transposed": ({}, {"model.layers.0.mlp.down_proj.weight": (44, 60)}, r"\[44, 60\], but .* \[60, 44\]"),
    "vocabulary": ({}, {"lm_head.weight": (78, 60)}, r"lm_head\.weight has the shape \[78, 60\], but .* \(vocab_size"),
    "norm": ({}, {"model.norm.weight": (61,)}, r"model\.norm\.weight has the shape \[61\]"),
    "missing": (
        {},
        {"model.layers.1.mlp.up_proj.weight": None},
        r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "no head": ({}, {"lm_head.weight": None}, "has no tensor lm_head.weight, but config.json does not say tie_word"),
    "bias": (
        {},
        {"model.layers.0.self_attn.q_proj.bias": (84,)},
        r"holds model\.layers\.0\.self_attn\.q_proj\.bias, but config\.json does not say attention_bias: true",
    ),
    "mlp bias": ({}, {"model.layers.0.mlp.up_proj.bias": (44,)}, "does not say mlp_bias: true"),
    "no bias": (
        {"attention_bias": True},
        {"model.layers.2.self_attn.o_proj.bias": None},
        r"says attention_bias: true, but the checkpoint has no tensor model\.layers\.2\.self_attn\.o_proj\.bias",
    ),
    "more layers": (
        {},
        {"model.layers.3.input_layernorm.weight": (60,)},
        r"num_hidden_layers is 3, but the checkpoint holds a tensor of layer 3 \(model\.layers\.3\.input_layernorm",
    ),
    "adapter": (
        {},
        {"model.layers.0.self_attn.q_proj.lora_A.weight": (8, 60)},
        r"holds the tensor model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight, which is no part of a LlamaForCausalLM",
    ),
    "misspelt": ({}, {"model.norm.weigth": (60,)}, r"Did you mean 'model\.norm\.weight'\?"),
    "no key for it": (
        QWEN2,
        {"model.layers.0.self_attn.o_proj.bias": (60,)},
        r"holds the tensor model\.layers\.0\.self_attn\.o_proj\.bias, which is no part of a Qwen2ForCausalLM",
    ),
    "no bias of Qwen2": (
        QWEN2,
        {"model.layers.0.self_attn.k_proj.bias": None},
        r"has no tensor model\.layers\.0\.self_attn\.k_proj\.bias, which config\.json expects",
    ),
    "no bias in Mistral": (
        MISTRAL | {"attention_bias": True},
        {"model.layers.0.self_attn.q_proj.bias": (84,)},
        r"self_attn\.q_proj\.bias, which is no part of a MistralForCausalLM",
    ),
    "tied copy": ({"tie_word_embeddings": True}, {"lm_head.weight": (77, 60)}, "holds the tensor lm_head.weight"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_contradict_the_config(case: str) -> None:
    changes, tensors, message = TENSORS[case]
    shapes: dict[str, Any] = expected_tensors(config(**changes)) | tensors
    with pytest.raises(LlamaExportError, match=message) as caught:
        check_tensors(config(**changes), tensors_of({name: shape for name, shape in shapes.items() if shape}))
    assert "\n" not in str(caught.value)


def test_fewer_layers_than_the_config_says() -> None:
    tensors = tensors_of(expected_tensors(config(num_hidden_layers=2)))
    with pytest.raises(LlamaExportError, match="num_hidden_layers is 3, but the checkpoint's tensors end with layer 1"):
        check_tensors(config(), tensors)
