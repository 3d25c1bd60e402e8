"""Quantised checkpoints from end to end: the bundle holds their codes, and computes what PyTorch computes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from llama_export.build_options import BuildOptions
from llama_export.build_report import BuildReport
from llama_export.errors import LlamaExportError
from llama_export.export.config import transformers_config
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.onnx_file import with_accuracy_level
from llama_export.runtime.proof.verify import verify
from onnx import numpy_helper
from support.graphs import logits_of, run_ort, session
from support.prequantised import (
    Parts,
    Quantised,
    awq_parts,
    byte_parts,
    compressed_parts,
    gptq_parts,
    packed,
    values_of,
)
from test_prequantised import Contents, awq_settings, compressed_settings, gptq_settings, write
from transformers import LlamaForCausalLM

SIZES = {"layers": 1, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 40, "ffn": 192}


def packed_parts(matrix: Quantised) -> Parts:
    return compressed_parts(matrix, symmetric=False)


def symmetric_byte_parts(matrix: Quantised) -> Parts:
    return byte_parts(matrix, symmetric=True)


KINDS: dict[str, tuple[dict[str, Any], Callable[[Quantised], Parts], dict[str, Any]]] = {
    "gptq sorted": (gptq_settings(4, 32, False, desc_act=True), gptq_parts, {"shuffled": True}),
    "gptq 128": (gptq_settings(4, 128, True), gptq_parts, {"group": 128, "symmetric": True}),
    "gptq 8 bits": (gptq_settings(8, -1, False), gptq_parts, {"group": -1, "bits": 8}),
    "awq": (awq_settings(64, "gemm"), awq_parts, {"group": 64}),
    "w4a16": (compressed_settings(4, 32, False), packed_parts, {"scales": "BF16", "dense": "BF16"}),
    "w8a8": (
        compressed_settings(8, -1, True, "int-quantized"),
        symmetric_byte_parts,
        {"bits": 8, "group": -1, "symmetric": True, "scales": "BF16", "dense": "BF16"},
    ),
}


def made(kind: str, folder: Path, **options: Any) -> tuple[Contents, BuildReport]:
    settings, parts_of, how = KINDS[kind]
    contents = write(folder / "m", settings, parts_of, **{**SIZES, **how})
    return contents, build(
        BuildOptions(model=str(folder / "m"), output=folder / "bundle", **{"target": "cpu", **options})
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_computes_what_pytorch_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    contents, report = made(kind, tmp_path)
    assert report.manifest.precision == KINDS[kind][0]["quant_method"]
    assert report.losses == []
    assert any("lm_head.weight stays" in note and "--head-precision int8" in note for note in report.notes)
    verdict = verify(open_bundle(tmp_path / "bundle"), check_hashes=True, threads=1, progress=Silent())
    assert verdict.passed, verdict.failed
    check_codes(tmp_path / "bundle", contents)
    exact = tmp_path / "bundle" / "exact.onnx"
    exact.write_bytes(with_accuracy_level((tmp_path / "bundle" / "model.onnx").read_bytes(), 0))
    ids = np.random.default_rng(3).integers(0, 300, (1, 24))
    expected = logits_of(dequantised(tmp_path / "m", contents), ids)
    assert np.abs(run_ort(session(exact), ids, (17, 23, 24)) - expected).max() < 1e-5 * np.abs(expected).max()


def dequantised(path: Path, contents: Contents) -> LlamaForCausalLM:
    """PyTorch's model in float32 with the values that the checkpoint's numbers stand for."""
    model = LlamaForCausalLM(transformers_config(json.loads((path / "config.json").read_text()))).eval()
    values = {name: values_of(content) for name, content in contents.items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    return model


def check_codes(bundle: Path, contents: Contents) -> None:
    """The bytes of every output and down projection are the checkpoint's numbers, in the stored order of columns."""
    model = onnx.load(bundle / "model.onnx")
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    inputs = {node.name: node.input[0] for node in model.graph.node}
    makers = {output: node for node in model.graph.node for output in node.output}
    for name, content in contents.items():
        module = name.removesuffix(".weight")
        if isinstance(content, Quantised) and ("o_proj" in name or "down_proj" in name):
            gather = makers[inputs[f"{module}/MatMulNBits"]]
            order = stored[gather.input[1]] if gather.op_type == "Gather" else np.arange(content.codes.shape[1])
            rows = [packed(row[order], content.bits).view(np.uint8) for row in content.codes]
            found = stored[f"{module}.codes"].reshape(len(rows), -1)[:, : len(rows[0])]  # padded to whole blocks
            np.testing.assert_array_equal(found, rows)


def test_float16_activations_keep_float16_scales(tmp_path: Path) -> None:
    """What a GPU runs, on the CPU's kernels."""
    contents, report = made("awq", tmp_path, target="cuda")
    assert report.losses == []
    assert not any("lm_head.weight" in note for note in report.notes)
    check_codes(tmp_path / "bundle", contents)
    ids = np.random.default_rng(3).integers(0, 300, (1, 24))
    expected = logits_of(dequantised(tmp_path / "m", contents), ids)
    found = run_ort(session(tmp_path / "bundle" / "model.onnx"), ids, (17, 24))
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_a_precision_quantises_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, report = made("gptq sorted", tmp_path, precision="int8")
    assert report.manifest.precision == "int8"
    assert report.losses == []
    assert verify(open_bundle(tmp_path / "bundle"), check_hashes=False, threads=1, progress=Silent()).passed


def test_what_activations_were_quantised_with_is_told(tmp_path: Path) -> None:
    settings, parts_of, how = KINDS["w8a8"]
    group = {**settings["config_groups"]["group_0"], "input_activations": {"num_bits": 8, "dynamic": True}}
    write(tmp_path / "m", {**settings, "config_groups": {"group_0": group}}, parts_of, **{**SIZES, **how})
    report = build(BuildOptions(model=str(tmp_path / "m"), target="cpu", output=tmp_path / "bundle", reference=False))
    assert any("quantisation of activations" in line for line in report.lines())


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_scales_that_are_not_numbers_are_told(number: float, tmp_path: Path) -> None:
    settings, _, how = KINDS["gptq 128"]

    def parts_of(matrix: Quantised) -> Parts:
        parts = gptq_parts(matrix)
        parts["scales"] = parts["scales"].copy()
        parts["scales"][-1, 7] = number
        return parts

    write(tmp_path / "m", settings, parts_of, **{**SIZES, **how})
    with pytest.raises(LlamaExportError, match=r"tensor model\.layers\.0\..*_proj\.weight holds NaN or infinite"):
        build(BuildOptions(model=str(tmp_path / "m"), target="cpu", output=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()
