"""The proof: what is sound passes, and every planted fault fails at a gate that says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from llama_export.cli import main
from llama_export.progress import Silent
from llama_export.runtime import verify as verification
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.verify import Check, Gate, Verdict, verify
from support import faults
from support.checkpoints import GGUF_TYPES, PRECISIONS

Built = Callable[[str], Path]
FILES, WEIGHTS, EXACT, SHIPPED = range(4)
"""The checks, in order."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def verdict_of(bundle: Path, *options: str, code: int) -> dict[str, Any]:
    """What `verify --json -` prints, which must end with `code` and say nothing on stderr."""
    result = call("verify", bundle, "--quiet", "--json", "-", *options)
    assert result.exit_code == code, result.output
    assert result.stderr == ""
    verdict: dict[str, Any] = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert verdict["passed"] == (code == 0)
    return verdict


def failed(verdict: dict[str, Any]) -> dict[str, Any]:
    """The figures of the gates that failed, by their names."""
    return {
        gate["name"]: gate["measured"] for check in verdict["checks"] for gate in check["gates"] if not gate["passed"]
    }


# What is sound


@pytest.mark.parametrize("stored", [*PRECISIONS, *GGUF_TYPES])
def test_sound_bundles_pass(stored: str, built: Built) -> None:
    verdict = verdict_of(built(stored), code=0)
    assert len(verdict["checks"]) == 4
    exact = {gate["name"]: gate for gate in verdict["checks"][EXACT]["gates"]}
    assert exact["largest difference of a logit"]["measured"] < 5e-5
    assert exact["largest KL divergence"]["measured"] < 1e-9
    assert "greedy text: 160 of 160 tokens are PyTorch's own choice" in verdict["checks"][EXACT]["details"]


@pytest.mark.parametrize("stored", ["int4", "Q8_0"])
def test_the_shipped_kernels_are_a_line_of_their_own(stored: str, built: Built) -> None:
    """Their int8 activations are far noisier than the gate for the full-precision kernels allows."""
    verdict = verdict_of(built(stored), code=0)
    (divergence, agreement) = verdict["checks"][SHIPPED]["gates"]
    assert 1e-6 < divergence["measured"] < divergence["limit"]
    assert agreement["measured"] >= agreement["limit"]
    largest = float(verdict["checks"][SHIPPED]["details"][0].rpartition(" ")[2])
    assert largest > 10 * verdict["checks"][EXACT]["gates"][0]["limit"]


# What people and programs read


def test_the_report_for_people(built: Built) -> None:
    result = call("verify", built("int4"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "passed"
    assert "Stored weights, 31 tensors dequantised here and compared bit for bit" in result.stdout
    assert "ok   largest difference of a logit: " in result.stdout
    assert "Replaying with full-precision kernels" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_report_for_programs_is_stable(built: Built, tmp_path: Path) -> None:
    result = call("verify", built("int4"), "--json", tmp_path / "verdict.json", "--threads", 1)
    assert result.exit_code == 0
    assert result.stdout.endswith("\npassed\n")
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert list(verdict) == [
        "schema_version",
        "bundle",
        "backend",
        "positions",
        "seconds",
        "passed",
        "checks",
        "longest",
        "engine",
        "notes",
    ]
    assert (verdict["schema_version"], verdict["bundle"]) == (1, str(built("int4")))
    for check in verdict["checks"]:
        assert list(check) == ["title", "gates", "details"]
        for gate in check["gates"]:
            assert list(gate) == ["name", "measured", "limit", "at_least", "passed"]
    assert [[gate["name"] for gate in check["gates"]] for check in verdict["checks"]] == [
        ["files that differ from the manifest"],
        ["tensors that differ from PyTorch's"],
        [
            "largest difference of a logit",
            "largest KL divergence",
            "positions with another argmax, near ties aside",
        ],
        ["mean KL divergence", "share of positions that agree on a likely token"],
    ]
    without = verdict_of(built("int4"), "--no-hash", code=0)
    assert [check["title"] for check in without["checks"]] == [check["title"] for check in verdict["checks"][1:]]


def test_infinite_figures_are_null() -> None:
    gates = (Gate("a", float("nan"), 1), Gate("b", float("inf"), 1), Gate("c", float("nan"), 1, at_least=True))
    verdict = Verdict("bundle", "cpu", 1, (Check("t", gates),), 0.5, 4, ("noted",))
    assert not verdict.passed
    assert verdict.lines()[-1] == "FAILED: t: a; t: b; t: c"
    assert "noted" in verdict.lines()
    (check,) = json.loads(json.dumps(verdict.to_json(), allow_nan=False))["checks"]
    assert [(gate["measured"], gate["passed"]) for gate in check["gates"]] == [(None, False)] * 3


def test_a_verdict_that_cannot_be_written(built: Built, tmp_path: Path) -> None:
    result = call("verify", built("fp32"), "--quiet", "--json", tmp_path / "absent" / "verdict.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: No such file or directory: ")


def test_what_cannot_be_verified(built: Built, tmp_path: Path) -> None:
    for path, code, message in [
        (tmp_path / "absent", 2, "There is no bundle"),
        (tmp_path, 1, "is not a bundle"),
        (__file__, 2, "is a file, but a bundle is a folder"),
    ]:
        result = call("verify", path, "--quiet")
        assert (result.exit_code, result.stdout) == (code, "")
        assert message in result.stderr
    copy = faults.copy_of(built("int4"), tmp_path / "copy", changed="")
    shutil.rmtree(copy / "reference")
    result = call("verify", copy, "--quiet", "--no-hash")
    assert result.exit_code == 1
    assert "has no reference to compare with, it was built with --no-reference" in result.stderr
    assert "Traceback" not in result.stderr


# Faults in the data


def test_one_flipped_byte_is_seen_by_verify_and_by_the_next_run(built: Built, tmp_path: Path) -> None:
    copy = faults.copy_of(built("int4"), tmp_path / "copy", changed=faults.DATA)
    greeting = ("run", copy, "Once upon a time", "--max-new-tokens", 2, "--quiet")
    assert call(*greeting).exit_code == 0
    faults.flip("model.layers.1.mlp.down_proj.codes", 5, at=7)(copy)
    result = call(*greeting)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "model.onnx.data is damaged: its SHA-256 differs from the manifest's" in result.stderr
    verdict = verdict_of(copy, code=1)
    assert failed(verdict).keys() >= {"files that differ from the manifest", "tensors that differ from PyTorch's"}
    assert "model.onnx.data is damaged" in verdict["checks"][FILES]["details"][0]


NORM, SCALES = "model.layers.1.post_attention_layernorm.weight", "model.layers.0.self_attn.q_k_v_proj.scales"
DATA_FAULTS = {
    "a scale's top exponent bit": (faults.flip(SCALES, 30, at=5), "model.layers.0.self_attn.q_proj.weight"),
    "a scale's sign": (faults.flip(SCALES, 31, at="last"), "model.layers.0.self_attn.v_proj.weight"),
    "a scale's lowest bit": (
        faults.flip("model.embed_tokens.scales", 0, at=639),
        "model.embed_tokens.weight",
    ),
    "a norm's top exponent bit": (faults.flip(NORM, 30, at=9), NORM),
    "a norm's top mantissa bit": (faults.flip(NORM, 22, at=63), NORM),
    "a norm's lowest mantissa bit": (faults.flip(NORM, 0), NORM),
    "a bias' lowest bit": (
        faults.flip("model.layers.1.self_attn.q_k_v_proj.bias", 0, at=64),
        "model.layers.1.self_attn.k_proj.bias",
    ),
    "a code's low bit": (
        faults.flip("model.layers.1.mlp.gate_up_proj.codes", 0, at=96 * 32),
        "model.layers.1.mlp.up_proj.weight",
    ),
    "a code's high bit": (faults.flip("lm_head.codes", 7, at="last"), "lm_head.weight"),
    "a cosine's lowest bit": (faults.flip("cos_cache", 0, at=3), "cos_cache"),
    "a cosine beyond all prompts": (faults.flip("cos_cache", 30, at="last"), "cos_cache"),
    "a sine beyond all prompts": (faults.flip("sin_cache", 0, at="last"), "sin_cache"),
    "NaN in a norm": (faults.put(NORM, float("nan"), at=3), NORM),
    "infinity in a scale": (faults.put(SCALES, float("inf"), at=1), "model.layers.0.self_attn.q_proj.weight"),
    "gate and up exchanged": (
        faults.swap_rows("model.layers.0.mlp.gate_up_proj.codes", 0, 96, 96),
        "model.layers.0.mlp.gate_proj.weight",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_faults_in_the_weights_are_named(fault: str, built: Built, tmp_path: Path) -> None:
    plant, name = DATA_FAULTS[fault]
    copy = faults.copy_of(built("int4"), tmp_path / "copy", changed=faults.DATA)
    plant(copy)
    verdict = verdict_of(copy, "--no-hash", code=1)
    assert failed(verdict)["tensors that differ from PyTorch's"] == (2 if "exchanged" in fault else 1)
    details = verdict["checks"][0]["details"]
    assert details[0].startswith(f"{name}: the root of the sum of squares is ")
    if "NaN" in fault or "infinity" in fault:
        assert failed(verdict)["largest difference of a logit"] is None
    result = call("verify", copy, "--no-hash", "--quiet")
    assert result.exit_code == 1
    assert "FAIL tensors that differ from PyTorch's" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAILED: Stored weights, 31 tensors")


@pytest.mark.parametrize(
    ("stored", "name", "tensor"),
    [
        ("fp32", "model.layers.0.mlp.down_proj.weight.fp32", "model.layers.0.mlp.down_proj.weight"),
        ("fp16", "model.embed_tokens.weight.fp16", "model.embed_tokens.weight"),
        ("int8", "model.layers.1.self_attn.o_proj.codes", "model.layers.1.self_attn.o_proj.weight"),
        ("Q4_1", "model.layers.1.mlp.down_proj.offsets", "model.layers.1.mlp.down_proj.weight"),
        ("mixed", "model.layers.1.mlp.gate_proj.weight.bf16", "model.layers.1.mlp.gate_proj.weight"),
    ],
)
def test_the_lowest_bit_of_every_format(stored: str, name: str, tensor: str, built: Built, tmp_path: Path) -> None:
    copy = faults.copy_of(built(stored), tmp_path / "copy", changed=faults.DATA)
    faults.flip(name, 0, at="last")(copy)
    verdict = verdict_of(copy, "--no-hash", code=1)
    assert failed(verdict)["tensors that differ from PyTorch's"] == 1
    assert verdict["checks"][0]["details"][0].startswith(f"{tensor}: ")


# Faults in the graph, whose weights are all right

GRAPH_FAULTS = {
    "another epsilon in every norm": faults.attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e-3, which=-1),
    "the default epsilon in the first": faults.attribute("SimplifiedLayerNormalization", "epsilon", 1e-6),
    "another scale of attention": faults.attribute("GroupQueryAttention", "scale", 0.3),
    "interleaved rotation": faults.attribute("GroupQueryAttention", "rotary_interleaved", 1, which=1),
    "no rotation": faults.attribute("GroupQueryAttention", "do_rotary", 0),
    "a window": faults.attribute("GroupQueryAttention", "local_window_size", 8, which=1),
    "gate and up exchanged": faults.swap_outputs("Split", "layers.1.mlp"),
}


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
@pytest.mark.parametrize("stored", ["fp32", "int4"])
def test_faults_in_the_graph_show_in_the_logits(fault: str, stored: str, built: Built, tmp_path: Path) -> None:
    copy = faults.copy_of(built(stored), tmp_path / "copy", changed="model.onnx")
    GRAPH_FAULTS[fault](copy)
    assert "files that differ from the manifest" in failed(verdict_of(copy, code=1))
    found = failed(verdict_of(copy, "--no-hash", code=1))
    assert "largest difference of a logit" in found
    assert "tensors that differ from PyTorch's" not in found


def test_a_fault_that_only_the_shipped_kernels_have(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cache in place and their chunks are not what the full-precision replay goes through."""
    honest = verification.OnnxRuntimeBackend.extend

    def forgetful(backend: Any, ids: Any, keep: int = 1) -> Any:
        logits = honest(backend, ids, keep)
        return logits if backend.length < 40 else np.roll(logits, 1, axis=1)

    monkeypatch.setattr(verification.OnnxRuntimeBackend, "extend", forgetful)
    verdict = verify(open_bundle(built("int4")), check_hashes=False, threads=2, progress=Silent())
    assert [[gate.passed for gate in check.gates] for check in verdict.checks[1:]] == [[True] * 3, [False] * 2]


UNUSABLE = {
    "heads of another size with the same product": faults.graph(
        lambda model: [
            one.CopyFrom(faults.onnx.helper.make_attribute(one.name, {"num_heads": 6, "kv_num_heads": 1}[one.name]))
            for node in model.graph.node
            for one in node.attribute
            if one.name in ("num_heads", "kv_num_heads")
        ]
    ),
    "heads that do not divide": faults.attribute("GroupQueryAttention", "num_heads", 3),
    "an operator that is not there": faults.graph(lambda model: setattr(model.graph.node[-1], "op_type", "Frobnicate")),
    "a width that is not there": faults.attribute("MatMulNBits", "N", 48),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_graphs_that_cannot_run_are_one_sentence(fault: str, built: Built, tmp_path: Path) -> None:
    copy = faults.copy_of(built("int4"), tmp_path / "copy", changed="model.onnx")
    UNUSABLE[fault](copy)
    result = call("verify", copy, "--no-hash", "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: onnxruntime ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_graph_cut_short(cut: int, built: Built, tmp_path: Path) -> None:
    copy = faults.copy_of(built("int4"), tmp_path / "copy", changed="model.onnx")
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes()[:-cut])
    result = call("verify", copy, "--no-hash", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: model.onnx is damaged (")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["model.onnx", faults.DATA, "reference/logits.npz"])
def test_a_file_gone(name: str, built: Built, tmp_path: Path) -> None:
    copy = faults.copy_of(built("int4"), tmp_path / "copy", changed="")
    (copy / name).unlink()
    for options in ((), ("--no-hash",)):
        result = call("verify", copy, "--quiet", *options)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert (result.stderr + result.stdout).count(name) >= 1


# A reference that does not belong to the bundle


def tampered(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Result:
    path = bundle / "reference" / "reference.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return call("verify", bundle, "--no-hash", "--quiet")


def weight(value: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in value["weights"] if one["name"] == name)


DOWN, GATE = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"
MISFITS = {
    "a tensor left out": (lambda v: v["weights"].pop(3), "The reference does not say what all of"),
    "a row left out": (lambda v: weight(v, DOWN).update(shape=[63, 96]), "does not say what all of"),
    "one row for another": (lambda v: weight(v, DOWN).update(row=1), "with the rows of"),
    "more rows than there are": (lambda v: weight(v, DOWN).update(shape=[10**9, 96]), "with the rows of"),
    "more rows than there can be": (lambda v: weight(v, DOWN).update(shape=[10**15, 96]), "of an impossible shape"),
    "three dimensions": (lambda v: weight(v, DOWN).update(shape=[2, 2**62, 4]), "of an impossible shape"),
    "an unknown initializer": (
        lambda v: weight(v, DOWN).update(initializers={"codes": "nothing"}),
        "model.onnx has no 'nothing'",
    ),
    "an unknown format": (lambda v: weight(v, DOWN).update(format="int3"), "unknown format 'int3'"),
    "another format": (lambda v: weight(v, DOWN).update(format="fp32"), f"does not store {DOWN} as fp32"),
    "another number of bits": (lambda v: weight(v, DOWN).update(format="int8"), f"does not store {DOWN} as int8"),
    "parts of another tensor": (
        lambda v: weight(v, DOWN)["initializers"].update(scales=weight(v, GATE)["initializers"]["scales"]),
        "does not",
    ),
    "far more columns": (lambda v: weight(v, DOWN).update(shape=[64, 10**9]), "does not store"),
    "fewer columns": (lambda v: weight(v, DOWN).update(shape=[64, 64]), "does not store"),
    "columns within the padding": (lambda v: weight(v, DOWN).update(shape=[64, 95]), "FAIL tensors that differ"),
    "another vocabulary": (lambda v: v.update(vocab=319), "outside of the vocabulary"),
    "another hash": (lambda v: weight(v, DOWN).update(sha256="0" * 64), "FAIL tensors that differ"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_references_that_do_not_fit(case: str, built: Built, tmp_path: Path) -> None:
    change, message = MISFITS[case]
    result = tampered(faults.copy_of(built("int4"), tmp_path / "copy", changed="reference.json"), change)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_the_limits_are_those_of_the_issue() -> None:
    """Full precision in float32: 1e-3. Loosening any of them is a decision, not a slip."""
    assert dataclasses.astuple(verification.LIMITS["float32"]) == (1e-3, 3e-5, 1e-5, 0.05, 0.9)


# A real model


@pytest.mark.smollm2
def test_smollm2_passes(smollm2_bundle: Path) -> None:
    verdict = verdict_of(smollm2_bundle, code=0)
    exact = verdict["checks"][EXACT]
    assert exact["gates"][0]["measured"] < 1e-3
    assert exact["gates"][2]["measured"] == 0
    assert "greedy text: 160 of 160 tokens are PyTorch's own choice" in exact["details"]


@pytest.mark.smollm2
def test_smollm2_with_bits_flipped_here_and_there(smollm2_bundle: Path, tmp_path: Path) -> None:
    """Each fault is in a tensor of its own, and each is found."""
    copy = faults.copy_of(smollm2_bundle, tmp_path / "copy", changed=faults.DATA)
    flipped = {
        "model.layers.3.mlp.down_proj.weight": faults.flip("model.layers.3.mlp.down_proj.scales", 30, at=77),
        "model.layers.11.input_layernorm.weight": faults.flip("model.layers.11.input_layernorm.weight", 22, at=5),
        "model.norm.weight": faults.flip("model.norm.weight", 0, at="last"),
        "model.layers.29.self_attn.o_proj.weight": faults.flip("model.layers.29.self_attn.o_proj.codes", 3, at=1000),
        "cos_cache": faults.flip("cos_cache", 0, at="last"),
    }
    for plant in flipped.values():
        plant(copy)
    verdict = verdict_of(copy, "--no-hash", code=1)
    assert failed(verdict).keys() >= {"tensors that differ from PyTorch's", "largest difference of a logit"}
    assert failed(verdict)["tensors that differ from PyTorch's"] == len(flipped)
    assert {line.partition(":")[0] for line in verdict["checks"][0]["details"]} == flipped.keys()


@pytest.mark.smollm2
def test_smollm2_with_a_wrong_epsilon(smollm2_bundle: Path, tmp_path: Path) -> None:
    """transformers' default for a config that lacks it, where this model has 1e-5."""
    copy = faults.copy_of(smollm2_bundle, tmp_path / "copy", changed="model.onnx")
    faults.attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e-6, which=-1)(copy)
    assert "largest difference of a logit" in failed(verdict_of(copy, "--no-hash", code=1))
