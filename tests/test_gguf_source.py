"""GGUF files as checkpoints: names, row order, exact values, config.json, and what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.export.config import expected_tensors
from llama_export.export.gguf import source as gguf_source
from llama_export.export.gguf.blocks import ENCODINGS, FORMATS
from llama_export.export.gguf.config import llama3_factors
from llama_export.export.gguf.source import gguf_name, open_gguf
from llama_export.optimize.quantise import dequantise
from llama_export.optimize.tensors import SourceTensor
from support.gguf_models import reference_weights, write_llama_gguf

SHAPES: dict[str, dict[str, Any]] = {
    "one KV head": {"kv_heads": 1, "vocab": 97},
    "heads of 16 in a hidden size of 96": {"hidden": 96, "heads": 6, "kv_heads": 3, "ffn": 32, "vocab": 97},
    "wide heads": {"hidden": 64, "heads": 2, "kv_heads": 2, "head_dim": 64, "ffn": 160, "layers": 1, "vocab": 111},
}
WIDE: dict[str, Any] = {"hidden": 256, "heads": 8, "kv_heads": 1, "ffn": 512, "layers": 1, "vocab": 97}
"""For types whose blocks are 256 columns."""


def shapes_for(kind: str) -> dict[str, dict[str, Any]]:
    columns = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    return SHAPES if columns <= 32 else {"wide": WIDE}


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype == np.float32 and np.array_equal(left.view(np.uint32), right.view(np.uint32))


def row_ranges(rows: int, generator: random.Random) -> list[tuple[int, int]]:
    cuts = [sorted(generator.sample(range(rows + 1), 2)) for _ in range(8)]
    return [(0, rows), (0, 1), (rows - 1, rows), (1, 1), *((start, stop) for start, stop in cuts)]


def check_tensor(tensor: SourceTensor, weights: np.ndarray, generator: random.Random) -> None:
    assert tensor.shape == weights.shape
    for start, stop in row_ranges(len(weights), generator):
        assert same_bits(tensor.read(start, stop), weights[start:stop]), (tensor.name, start, stop)
        if tensor.blocks is None:
            continue
        blocks = tensor.blocks(start, stop)
        assert blocks.format == tensor.format
        assert blocks.codes.dtype == np.uint8
        assert blocks.codes.max(initial=0) < 2**blocks.format.bits
        if start < stop:
            values = dequantise(blocks, tensor.shape[1])
            assert np.array_equal(values, weights[start:stop]), (tensor.name, start, stop)
        assert blocks.rounded == 0


@pytest.mark.parametrize(
    ("kind", "shape"),
    [pytest.param(kind, shape, id=f"{kind}, {name}") for kind in FORMATS for name, shape in shapes_for(kind).items()],
)
def test_every_tensor_equals_the_gguf_package_bit_for_bit(tmp_path: Path, kind: str, shape: dict[str, Any]) -> None:
    path = write_llama_gguf(
        tmp_path / "model.gguf", types=kind, tied=False, attention_bias=True, mlp_bias=True, **shape
    )
    source = open_gguf(path)
    weights = reference_weights(path, head_dim=source.config["head_dim"])
    assert set(source.tensors) == set(weights) == set(expected_tensors(source.config))
    for name, tensor in source.tensors.items():
        assert tensor.name == name
        assert tensor.dtype == ("F32" if len(tensor.shape) == 1 else kind)
        assert (tensor.blocks is not None) == (tensor.dtype in ENCODINGS)
        check_tensor(tensor, weights[name], random.Random(name))


@pytest.mark.parametrize("kind", ["Q4_1", "Q2_K"])
@pytest.mark.parametrize("piece", [1, 700, 1 << 11])
def test_values_do_not_depend_on_the_pieces_they_are_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, kind: str
) -> None:
    path = write_llama_gguf(tmp_path / "model.gguf", types=kind, **WIDE)
    monkeypatch.setattr(gguf_source, "_PIECE", piece)
    for name, weights in reference_weights(path, head_dim=32).items():
        check_tensor(open_gguf(path).tensors[name], weights, random.Random(name))


def test_query_rows_are_read_without_other_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read_rows = gguf_source.read_rows

    def spy(path: Path, tensor: Any, start: int, stop: int) -> Any:
        asked.append((start, stop))
        return read_rows(path, tensor, start, stop)

    tensor = open_gguf(write_llama_gguf(tmp_path / "model.gguf")).tensors["model.layers.1.self_attn.q_proj.weight"]
    monkeypatch.setattr(gguf_source, "read_rows", spy)
    tensor.read(20, 30)  # of head 1, rows 16 to 32
    tensor.read(16, 48)  # heads 1 and 2
    assert [(start >= 16, stop <= last) for (start, stop), last in zip(asked, (32, 48), strict=True)] == [
        (True, True)
    ] * 2


def test_queries_and_keys_move_from_interleaved_to_halves(tmp_path: Path) -> None:
    # GGUF turns neighbouring rows together: row 2j goes with row 2j + 1. Hugging Face turns j with j + half.
    rows = np.repeat(np.arange(64, dtype=np.float32)[:, None], 64, axis=1)
    tensors = {"blk.0.attn_q.weight": rows, "blk.0.attn_k.weight": rows[:32], "blk.0.attn_v.weight": rows[:32]}
    source = open_gguf(write_llama_gguf(tmp_path / "model.gguf", tensors=tensors))
    head = [*range(0, 16, 2), *range(1, 16, 2)]

    def first_column(name: str) -> list[float]:
        tensor = source.tensors[f"model.layers.0.self_attn.{name}.weight"]
        return tensor.read(0, tensor.shape[0])[:, 0].tolist()  # type: ignore[no-any-return]

    assert first_column("q_proj") == [16 * index + row for index in range(4) for row in head]
    assert first_column("k_proj") == [16 * index + row for index in range(2) for row in head]
    assert first_column("v_proj") == list(range(32))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("kind", "at"), [("Q4_1", 0), ("Q4_1", 2), ("Q8_0", 0), ("Q4_K", 2), ("Q6_K", 208)])
def test_scales_that_are_not_finite(tmp_path: Path, kind: str, at: int, value: float) -> None:
    path = write_llama_gguf(tmp_path / "model.gguf", types=kind, **{**WIDE, "layers": 2})
    reader = gguf.GGUFReader(path)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
    offset = int(tensor.data_offset)
    content = bytearray(path.read_bytes())
    content[offset + at : offset + at + 2] = np.float16(value).tobytes()
    path.write_bytes(content)
    found = open_gguf(path).tensors["model.layers.1.mlp.up_proj.weight"]
    assert found.blocks is not None
    readers: list[Callable[[int, int], object]] = [found.read, found.blocks]
    for read in readers:
        read(1, 2)
        with pytest.raises(LlamaExportError, match=r"blk\.1\.ffn_up\.weight that are not finite"):
            read(0, 1)


def test_what_a_source_says(tmp_path: Path) -> None:
    source = open_gguf(write_llama_gguf(tmp_path / "tiny.gguf", layers=3, vocab=97))
    assert (source.model_id, source.kind, source.revision) == ("Random Llama", "gguf", None)
    assert (source.licence, source.native_precision) == ("apache-2.0", "gguf")
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": 97,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "dtype": "float32",
    }
    files = {name: content for name, content in source.files.items() if isinstance(content, bytes)}
    assert set(files) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    assert json.loads(files["config.json"]) == source.config
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": [1, 2]}


def test_name_and_licence_may_be_absent(tmp_path: Path) -> None:
    absent = {"general.name": None, "general.license": None}
    source = open_gguf(write_llama_gguf(tmp_path / "tiny-v2.gguf", metadata=absent))
    assert (source.model_id, source.licence) == ("tiny-v2", None)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_dtype_is_that_of_most_matrices(tmp_path: Path, kind: str) -> None:
    expected = {"F16": "float16", "BF16": "bfloat16"}[kind]
    assert open_gguf(write_llama_gguf(tmp_path / "model.gguf", types=kind)).config["dtype"] == expected


@pytest.mark.parametrize(
    ("metadata", "key", "value"),
    [
        ({"llama.attention.layer_norm_rms_epsilon": 1e-6}, "rms_norm_eps", 1e-06),
        ({"llama.attention.layer_norm_rms_epsilon": 0.123456789}, "rms_norm_eps", 0.12345679),
        ({"llama.rope.freq_base": None}, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ({"llama.rope.freq_base": 5e5}, "rope_parameters", {"rope_type": "default", "rope_theta": 500000.0}),
        ({"llama.attention.head_count_kv": [2, 2]}, "num_key_value_heads", 2),
        ({"llama.feed_forward_length": [96, 96]}, "intermediate_size", 96),
        ({"llama.attention.key_length": None, "llama.attention.value_length": None}, "head_dim", 16),
        ({"llama.rope.dimension_count": None}, "head_dim", 16),
        ({"llama.expert_count": 0}, "hidden_size", 64),
        ({"tokenizer.ggml.eot_token_id": 1}, "eos_token_id", 1),
        ({"tokenizer.ggml.eot_token_id": None}, "eos_token_id", 1),
        ({"tokenizer.ggml.eom_token_id": 5}, "eos_token_id", [1, 2, 5]),
        ({"tokenizer.ggml.padding_token_id": 4}, "pad_token_id", 4),
        ({"tokenizer.ggml.padding_token_id": 4_294_967_295}, "pad_token_id", None),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": False}, "bos_token_id", None),
    ],
)
def test_config_of_metadata(tmp_path: Path, metadata: dict[str, Any], key: str, value: object) -> None:
    assert open_gguf(write_llama_gguf(tmp_path / "model.gguf", metadata=metadata)).config[key] == value


def test_end_of_turn_tokens_are_found_by_name(tmp_path: Path) -> None:
    tokens = [f"t{index}" for index in range(7)] + ["<|eot_id|>", "<|end_of_text|>"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 7 + [3, 3],
        "tokenizer.ggml.merges": ["t1 t2"],
        "tokenizer.ggml.eos_token_id": 8,
        "tokenizer.ggml.eot_token_id": None,
    }
    metadata["tokenizer.ggml.tokens"] = [*tokens, "t1t2"]
    metadata["tokenizer.ggml.token_type"] = [1] * 7 + [3, 3, 1]
    assert open_gguf(write_llama_gguf(tmp_path / "model.gguf", metadata=metadata)).config["eos_token_id"] == [8, 7]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 8.0, "original_context_length": 128},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
        ),
        (
            {"type": "yarn", "factor": 8.0, "finetuned": True},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
        ),
        (
            {"type": "yarn", "factor": 2.0, "original_context_length": 128, "yarn_beta_fast": 30.0, "attn_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 30.0,
                "attention_factor": 0.5 * (0.1 * math.log(2.0) + 1.0),
            },
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    keys = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    source = open_gguf(write_llama_gguf(tmp_path / "model.gguf", metadata=keys))
    assert source.config["rope_parameters"] == {**expected, "rope_theta": 10000.0}


def test_rope_scaling_in_its_old_spelling(tmp_path: Path) -> None:
    source = open_gguf(write_llama_gguf(tmp_path / "model.gguf", metadata={"llama.rope.scale_linear": 2.0}))
    assert source.config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("factor", [8.0, 32.0, 5.0])
def test_llama3_factors_become_llama3_parameters(tmp_path: Path, factor: float) -> None:
    shape = {"hidden": 128, "heads": 2, "kv_heads": 1}
    metadata = {"llama.rope.freq_base": 500000.0}
    factors = {"rope_freqs.weight": llama3_factors(64, 500000.0, factor)}
    source = open_gguf(write_llama_gguf(tmp_path / "model.gguf", metadata=metadata, tensors=factors, **shape))
    assert source.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in source.tensors


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=rope)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, device=None)[0].numpy()
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / llama3_factors(64, 500000.0, 32.0), scaled, rtol=1e-5)


def test_rope_factors_of_one_change_nothing(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.ones(8, np.float32)}
    source = open_gguf(write_llama_gguf(tmp_path / "model.gguf", tensors=tensors))
    assert source.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def _without(name: str) -> dict[str, Any]:
    return {"tensors": {name: None}}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"metadata": {"general.architecture": "qwen2"}}, r"architecture 'qwen2'.*only 'llama'"),
        ({"metadata": {"llama.block_count": [1, 2]}}, r"block_count differs between layers"),
        ({"metadata": {"llama.rope.scaling.type": [1, 2]}}, r"rope scaling type is \(1, 2\)"),
        ({"metadata": {"llama.expert_count": [4, 8]}}, "mixture of experts"),
        ({"metadata": {"llama.expert_count": 8}}, r"mixture of experts \(llama\.expert_count\)"),
        ({"metadata": {"llama.attention.sliding_window": 4096}}, "sliding window"),
        ({"metadata": {"llama.embedding_length": None}}, r"llama\.embedding_length is None"),
        ({"metadata": {"llama.block_count": 0}}, r"llama\.block_count is 0"),
        ({"metadata": {"llama.block_count": 4_000_000_000}}, r"llama\.block_count is 4000000000"),
        ({"metadata": {"llama.block_count": 2_000_000_000}}, "num_hidden_layers is 2000000000"),
        ({"metadata": {"llama.block_count": "2"}}, r"llama\.block_count is '2'"),
        ({"metadata": {"llama.block_count": True}}, r"llama\.block_count is True"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "rms_epsilon is nan"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": None}}, "rms_epsilon is None"),
        ({"metadata": {"llama.rope.freq_base": float("inf")}}, "freq_base is inf"),
        ({"metadata": {"llama.rope.freq_base": -1.0}}, "freq_base is -1.0"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "must be a multiple"),
        ({"metadata": {"llama.attention.head_count_kv": [2, 4]}}, "head_count_kv differs between layers"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, r"rope\.dimension_count is 8.*head size 16"),
        ({"metadata": {"llama.attention.value_length": 32}}, r"value_length is 32.*head size 16"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope scaling type is 'longrope'"),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, r"scaling\.factor is None"),
        (
            {
                "metadata": {
                    "llama.rope.scaling.type": "yarn",
                    "llama.rope.scaling.factor": 2.0,
                    "llama.rope.scaling.yarn_log_multiplier": 0.1,
                }
            },
            r"nothing like its llama\.rope\.scaling\.yarn_log_multiplier",
        ),
        ({"tensors": {"rope_freqs.weight": np.linspace(1, 3, 8)}}, "not what Llama 3's formula gives"),
        ({"tensors": {"rope_freqs.weight": np.full(7, 8.0)}}, "not what Llama 3's formula gives"),
        ({"tensors": {"rope_freqs.weight": np.ones((8, 2))}}, r"rope_freqs\.weight of shape \[8, 2\]"),
        (
            {
                "tensors": {"rope_freqs.weight": np.full(8, 8.0)},
                "metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            },
            "both rope_freqs.weight and linear scaling",
        ),
        (_without("token_embd.weight"), r"no tensor token_embd\.weight"),
        (_without("output_norm.weight"), r"lacks the tensor output_norm\.weight"),
        (_without("blk.1.attn_k.weight"), r"lacks the tensor blk\.1\.attn_k\.weight"),
        ({"attention_bias": True, **_without("blk.0.attn_output.bias")}, r"lacks the tensor blk\.0\.attn_output\.bias"),
        ({"metadata": {"llama.block_count": 3}}, r"lacks the tensor blk\.2\."),
        ({"metadata": {"llama.block_count": 1}}, r"blk\.1\.\w+\.weight, which is no part of a Llama with 1 layers"),
        ({"tensors": {"blk.0.attn_qnorm.weight": np.ones(4)}}, r"holds the tensor blk\.0\.attn_qnorm\.weight"),
        (
            {"metadata": {"llama.feed_forward_length": 97}},
            r"blk\.0\.ffn_gate\.weight with shape \[96, 64\].*\[97, 64\]",
        ),
        (
            {"tensors": {"blk.1.attn_v.weight": np.ones((31, 64))}},
            r"blk\.1\.attn_v\.weight with shape \[31, 64\].*\[32, 64\]",
        ),
        ({"tensors": {"output.weight": np.ones((320, 63))}}, r"output\.weight with shape \[320, 63\].*\[320, 64\]"),
        ({"tensors": {"blk.0.attn_norm.weight": np.ones((64, 1))}}, r"attn_norm\.weight with shape \[64, 1\].*\[64\]"),
        ({"metadata": {"tokenizer.ggml.bos_token_id": 320}}, r"bos_token_id is 320.*0 to 319"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": "</s>"}}, r"eos_token_id is '</s>'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    path = write_llama_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(LlamaExportError, match=why) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "types"), [("gpt2", "Q4_1"), ("llama", "Q4_1"), ("gpt2", "Q2_K")])
def test_damaged_metadata_never_raise_anything_else(tmp_path: Path, kind: str, types: str) -> None:
    shape = {**WIDE, "vocab": 330, "ffn": 256}
    path = write_llama_gguf(tmp_path / "model.gguf", tokenizer=kind, types=types, **shape)
    content = path.read_bytes()
    start = min(int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors)
    generator = random.Random(2)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 1, 3])):
            damaged[generator.randrange(start)] = generator.choice([*range(10), 0x7F, 0x80, 0xFF, 0x41])
        path.write_bytes(damaged)
        try:
            for tensor in open_gguf(path).tensors.values():
                tensor.read(0, 1)
        except LlamaExportError:
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize("kind", ["Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ1_M", "IQ3_S", "IQ4_XS", "MXFP4"])
def test_damaged_blocks_are_finite_or_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write_llama_gguf(tmp_path / "model.gguf", types=kind, **WIDE)
    content = path.read_bytes()
    start = min(int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors)
    generator = np.random.default_rng(3)
    for _ in range(5):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = generator.integers(start, len(content), 400)
        damaged[places] = generator.integers(0, 256, len(places))
        path.write_bytes(damaged.tobytes())
        for tensor in open_gguf(path).tensors.values():
            if tensor.blocks is None:
                continue
            try:
                values, blocks = tensor.read(0, tensor.shape[0]), tensor.blocks(0, tensor.shape[0])
            except LlamaExportError as error:
                assert gguf_name(tensor.name) in str(error)
                continue
            assert np.isfinite(values).all()
            assert np.isfinite(blocks.scales).all()
            assert blocks.codes.max() < 2**blocks.format.bits


def test_name_of_a_tensor() -> None:
    assert gguf_name("model.layers.11.mlp.down_proj.bias") == "blk.11.ffn_down.bias"
    assert gguf_name("lm_head.weight") == "output.weight"
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.self_attn.q_norm.weight")


@pytest.mark.smollm2
def test_every_tensor_of_smollm2(smollm2_gguf: Path) -> None:
    source = open_gguf(smollm2_gguf)
    assert source.licence == "apache-2.0"
    assert source.config["rms_norm_eps"] == 1e-05
    weights = reference_weights(smollm2_gguf, head_dim=64)
    assert set(weights) == set(source.tensors) == set(expected_tensors(source.config))
    for name, tensor in source.tensors.items():
        rows = tensor.shape[0]
        assert same_bits(tensor.read(0, rows), weights[name]), name
        if tensor.blocks is not None:
            blocks = tensor.blocks(0, rows)
            assert same_bits(dequantise(blocks, tensor.shape[1]), weights[name]), name
            assert blocks.rounded == 0
