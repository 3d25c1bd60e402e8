"""GGUF files of every tensor type as bundles: the stored weights are the file's, and what is lost is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_export.export.gguf.blocks import ENCODINGS, FORMATS
from llama_export.export.gguf.source import gguf_name
from llama_export.runtime.proof.reference import EXACT
from llama_export.runtime.proof.reference_file import load_index_of_bundle
from support.command import call
from support.gguf_models import write_llama_gguf

PARTS = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output")
MIXES = {
    "K": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q4_1", "Q8_0"),
    "IQ": ("Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q5_K"),
    "other": ("Q5_K", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q4_0", "Q4_K"),
    "tied": ("Q4_K", *["Q3_K"] * 7, None),
    "ternary": ("TQ2_0", *["Q6_K"] * 7, "Q3_K"),
}
"""The types of PARTS; the embedding has another format in each."""


def write(path: Path, types: tuple[str | None, ...]) -> Path:
    by_part = {part: kind for part, kind in zip(PARTS, types, strict=True) if kind is not None}
    shape = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "layers": 1, "max_positions": 96}
    return write_llama_gguf(path, types=by_part, tied="output" not in by_part, **shape)


def build(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The report of a build, for programs and as the warnings that people get."""
    result = call("build", "-m", folder / "m.gguf", "-o", folder / "bundle", "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_the_mixes_hold_every_type() -> None:
    assert {kind for types in MIXES.values() for kind in types} - {None} == set(ENCODINGS)


@pytest.mark.parametrize("mix", MIXES)
def test_every_type_builds_and_verifies(mix: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", MIXES[mix])
    report, told = build(tmp_path, "-t", "cpu")
    assert report["losses"] == []
    assert "not exactly" not in told
    weights = load_index_of_bundle(tmp_path / "bundle", EXACT).weights
    formats = {gguf_name(w.name).split(".")[-2]: w.format for w in weights if len(w.shape) == 2}
    assert {part: formats[part] for part in PARTS if part in formats} == {
        part: FORMATS[kind].name for part, kind in zip(PARTS, MIXES[mix], strict=True) if kind is not None
    }

    verified = call("verify", tmp_path / "bundle", "--json", "-")
    verdict = json.loads(verified.stdout)
    assert verdict["passed"]
    assert {"weights", "full", "shipped", "cost"} <= {check["id"] for check in verdict["runs"][0]["checks"]}
    assert verified.exit_code == 0, verified.stdout
    ran = call("run", tmp_path / "bundle", "The quick", "--max-new-tokens", 4, "--json")
    assert json.loads(ran.stdout)["new_tokens"] > 0


def test_biases_beside_offsets(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf", types="Q4_1", attention_bias=True, mlp_bias=True)
    build(tmp_path, "-t", "cpu")
    verified = call("verify", tmp_path / "bundle")
    assert verified.exit_code == 0, verified.output


def test_float16_rounds_scales_and_the_loss_of_each_tensor_is_told(tmp_path: Path) -> None:
    kinds = ("Q8_0", "Q2_K", "Q8_0", "Q6_K", "Q4_0", "F16", "IQ4_XS", "Q5_0", "Q4_K")
    write(tmp_path / "m.gguf", kinds)
    report, told = build(tmp_path, "-t", "cuda", "--no-reference")
    losses = {gguf_name(loss["tensor"]).split(".")[-2]: loss for loss in report["losses"]}
    # A product of two scales has more bits than a half.
    assert set(losses) == {"attn_q", "attn_v", "ffn_up", "output"}
    types = dict(zip(PARTS, kinds, strict=True))
    for part, loss in losses.items():
        assert (loss["dtype"], loss["format"]) == (types[part], FORMATS[types[part]].name)
        assert 0 < loss["relative"] < 1e-3
        assert loss["blocks"] > 0
    assert f"blocks of {len(losses)} tensors are not exactly the checkpoint's own" in told
