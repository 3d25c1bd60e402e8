"""The proof: what is sound passes, and every planted fault fails at a gate that says what is wrong."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from llama_export.cli import main
from llama_export.progress import Silent
from llama_export.runtime.bundle import open_bundle, reference_file
from llama_export.runtime.proof import verify as verification
from llama_export.runtime.proof.gates import limits_of
from llama_export.runtime.proof.reference import EXACT, Index
from llama_export.runtime.proof.reference_file import load
from llama_export.runtime.proof.reports.table import lines
from llama_export.runtime.proof.verdict import Case, Check, Gate, Verdict, to_json
from llama_export.runtime.proof.verify import planned, verify
from llama_export.runtime.proof.ways import BATCH, WAYS
from support import faults
from support.checkpoints import GGUF_TYPES, PRECISIONS

Built = Callable[[str], Path]
CHECKS = ["files", "weights", "full", "layers", "shipped", "cost"]


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


def check_of(verdict: dict[str, Any], id: str) -> dict[str, Any]:
    (run,) = verdict["runs"]
    return next(check for check in run["checks"] if check["id"] == id)


def gates_of(verdict: dict[str, Any], id: str) -> list[dict[str, Any]]:
    return [gate for case in check_of(verdict, id)["cases"] for gate in case["gates"]]


def worst(verdict: dict[str, Any], id: str, figure: str) -> float:
    return float(max(gate["measured"] for gate in gates_of(verdict, id) if gate["figure"] == figure))


def failed(verdict: dict[str, Any]) -> dict[str, Any]:
    """A measured figure of each that failed, by check and figure."""
    (run,) = verdict["runs"]
    return {
        f"{check['id']} {gate['figure']}": gate["measured"]
        for check in run["checks"]
        for case in check["cases"]
        for gate in case["gates"]
        if not gate["passed"]
    }


# What is sound


@pytest.mark.parametrize("stored", [*PRECISIONS, *GGUF_TYPES])
def test_sound_bundles_pass(stored: str, built: Built) -> None:
    verdict = verdict_of(built(stored), code=0)
    assert [check["id"] for check in verdict["runs"][0]["checks"]] == CHECKS
    assert worst(verdict, "full", "difference") < 1e-4
    assert worst(verdict, "full", "kl") < 1e-9
    assert worst(verdict, "layers", "hidden") < 1e-4
    (told,) = (detail for detail in check_of(verdict, "full")["details"] if detail.startswith("greedy text: "))
    own, of = (int(word) for word in told.split() if word.isdigit())
    assert own == of > 50


@pytest.mark.parametrize("stored", ["int4", "Q8_0"])
def test_the_shipped_kernels_are_a_line_of_their_own(stored: str, built: Built) -> None:
    """Their int8 activations are far noisier than the gate for the full-precision kernels allows."""
    verdict = verdict_of(built(stored), code=0)
    assert {gate["figure"] for gate in gates_of(verdict, "shipped")} == {"mean_kl", "agreement", "greedy"}
    assert 1e-6 < worst(verdict, "shipped", "mean_kl") < limits_of("shipped", "float32").limits["mean_kl"]
    assert worst(verdict, "shipped", "mean_kl") > 100 * worst(verdict, "full", "kl")


# What people and programs read


def test_the_report_for_people(built: Built) -> None:
    result = call("verify", built("int4"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "passed"
    assert "Stored weights, 31 tensors dequantised here and compared bit for bit" in result.stdout
    assert "ok  one piece" in result.stdout
    assert "Replaying with full-precision kernels" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_report_for_programs_is_stable(built: Built, tmp_path: Path) -> None:
    result = call("verify", built("int4"), "--json", tmp_path / "verdict.json", "--threads", 1)
    assert result.exit_code == 0
    assert result.stdout.endswith("\npassed\n")
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert list(verdict) == ["schema_version", "bundle", "passed", "runs", "quality"]
    assert (verdict["schema_version"], verdict["bundle"]) == (2, str(built("int4")))
    (run,) = verdict["runs"]
    keys = ["backend", "engine", "passed", "positions", "longest", "seconds", "checks", "notes"]
    assert list(run) == keys
    for check in run["checks"]:
        assert list(check) == ["id", "title", "passed", "error", "cases", "layers", "details"]
        for case in check["cases"]:
            assert list(case) == ["way", "prompt", "passed", "gates"]
            for gate in case["gates"]:
                assert list(gate) == ["figure", "name", "measured", "limit", "at_least", "passed", "reason"]
        for layer in check["layers"]:
            assert list(layer) == ["layer", "hidden", "keys", "values"]
    assert [check["id"] for check in run["checks"]] == CHECKS
    assert {case["way"] for case in check_of(verdict, "full")["cases"]} == set(WAYS)
    assert {case["way"] for case in check_of(verdict, "shipped")["cases"]} == {*WAYS} - {BATCH}
    without = verdict_of(built("int4"), "--no-hash", code=0)
    assert [check["id"] for check in without["runs"][0]["checks"]] == CHECKS[1:]


@pytest.mark.parametrize("hashes", [True, False])
def test_what_is_planned_is_what_is_asked(hashes: bool, built: Built) -> None:
    bundle = open_bundle(built("int4"))
    verdict = verify(bundle, check_hashes=hashes, threads=1, progress=Silent(), max_kl=9.0)
    asked = [
        (check.id, case.way, case.prompt, gate.figure)
        for check in verdict.checks
        for case in check.cases
        for gate in case.gates
    ]
    told = planned(bundle, check_hashes=hashes, max_kl=9.0)
    assert [(gate.check, gate.way, gate.prompt, gate.figure) for gate in told] == asked
    assert len(asked) == len(set(asked))


def test_worst_positions_and_curves_are_told(built: Built) -> None:
    verdict = verify(open_bundle(built("int4")), check_hashes=False, threads=1, progress=Silent())
    prompts = {prompt.name: prompt for prompt in index_of(built("int4")).prompts}
    cost = next(check for check in verdict.checks if check.id == "cost")
    for case in cost.cases:
        prompt = prompts[case.prompt]
        assert (len(case.kl), case.prompt_tokens) == (len(prompt.ids), prompt.prompt_tokens)
        assert len(case.worst) == 3
        assert [moment.kl for moment in case.worst] == sorted(case.kl, reverse=True)[:3]
        for moment in case.worst:
            assert moment.kl == case.kl[moment.position]
            assert len(moment.expected) == len(moment.found) == 5
            assert moment.expected[0].logit >= moment.expected[4].logit
            assert all(choice.text for choice in moment.expected)


def test_where_it_breaks_is_told_with_the_verdict(built: Built) -> None:
    verdict = verdict_of(built("int4"), "--no-hash", "--bisect", code=0)
    assert list(verdict)[-1] == "bisection"
    result = call("verify", built("int4"), "-m", "model", "--quiet")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "-m names the checkpoint that --bisect computes with" in result.stderr


def test_infinite_figures_are_null() -> None:
    nan, inf = float("nan"), float("inf")
    gates = (Gate("a", "A", nan, 1), Gate("b", "B", inf, 1), Gate("c", "C", nan, 1, at_least=True))
    verdict = Verdict("bundle", "cpu", 1, (Check("t", "T", (Case(gates),)),), 0.5, 4, ("noted",))
    assert not verdict.passed
    assert lines([verdict])[-1] == "FAILED: T: A; T: B; T: C"
    assert "noted" in lines([verdict])
    ((check,),) = (run["checks"] for run in json.loads(json.dumps(to_json((verdict,)), allow_nan=False))["runs"])
    assert [(gate["measured"], gate["passed"]) for gate in check["cases"][0]["gates"]] == [(None, False)] * 3


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
    assert "There is no reference" in result.stderr
    assert "exact.npz; build the bundle again" in result.stderr
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
    assert failed(verdict).keys() >= {"files different", "weights different"}
    assert "model.onnx.data is damaged" in check_of(verdict, "files")["details"][0]


NORM, SCALES = "model.layers.1.post_attention_layernorm.weight", "model.layers.0.self_attn.q_k_v_proj.scales"
DATA_FAULTS = {
    "a scale's top exponent bit": (faults.flip(SCALES, 14, at=5), "model.layers.0.self_attn.q_proj.weight"),
    "a scale's sign": (faults.flip(SCALES, 15, at="last"), "model.layers.0.self_attn.v_proj.weight"),
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
    assert failed(verdict)["weights different"] == (2 if "exchanged" in fault else 1)
    details = check_of(verdict, "weights")["details"]
    assert details[0].startswith(f"{name}: the root of the sum of squares is ")
    if "NaN" in fault or "infinity" in fault:
        assert failed(verdict)["full difference"] is None
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
    assert failed(verdict)["weights different"] == 1
    assert check_of(verdict, "weights")["details"][0].startswith(f"{tensor}: ")


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
    assert "files different" in failed(verdict_of(copy, code=1))
    found = failed(verdict_of(copy, "--no-hash", code=1))
    assert "full difference" in found
    assert "weights different" not in found


def test_a_fault_that_only_the_shipped_kernels_have(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cache in place and their chunks are not what the full-precision replay goes through."""
    honest = verification.OnnxRuntimeBackend.extend

    def forgetful(backend: Any, ids: Any, keep: int = 1) -> Any:
        logits = honest(backend, ids, keep)
        return logits if backend.length < 40 else np.roll(logits, 1, axis=1)

    monkeypatch.setattr(verification.OnnxRuntimeBackend, "extend", forgetful)
    verdict = verify(open_bundle(built("int4")), check_hashes=False, threads=1, progress=Silent())
    passed = {check.id: check.passed for check in verdict.checks}
    assert passed == {"weights": True, "full": True, "layers": True, "shipped": False, "cost": False}


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


@pytest.mark.parametrize("name", ["model.onnx", faults.DATA, "reference/exact.npz"])
def test_a_file_gone(name: str, built: Built, tmp_path: Path) -> None:
    copy = faults.copy_of(built("int4"), tmp_path / "copy", changed="")
    (copy / name).unlink()
    for options in ((), ("--no-hash",)):
        result = call("verify", copy, "--quiet", *options)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert (result.stderr + result.stdout).count(name) >= 1


# A reference that does not belong to the bundle


def index_of(bundle: Path) -> Index:
    return load(bundle / reference_file(EXACT)).index


def tampered(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Result:
    """Change the index of the bundle's exact reference, whatever its reader thinks of that."""
    path = bundle / reference_file(EXACT)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    value = json.loads(members["reference.json"])
    change(value)
    members["reference.json"] = json.dumps(value).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
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
    "another vocabulary": (lambda v: v["identity"].update(vocab=319), "out of range"),
    "another hash": (lambda v: weight(v, DOWN).update(sha256="0" * 64), "FAIL tensors that differ"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_references_that_do_not_fit(case: str, built: Built, tmp_path: Path) -> None:
    change, message = MISFITS[case]
    result = tampered(faults.copy_of(built("int4"), tmp_path / "copy", changed="exact.npz"), change)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_the_limits_are_those_of_the_issue() -> None:
    """Full precision in float32: 1e-3. Loosening any of them is a decision, not a slip."""
    full = limits_of("full", "float32")
    assert (full.limits["difference"], full.scaled, full.limits["kl"]) == (1e-3, 3e-5, 1e-5)
    assert (full.limits["argmax"], full.limits["greedy"]) == (0, 0)
    shipped = limits_of("shipped", "float32").limits
    assert (shipped["mean_kl"], shipped["agreement"]) == (0.05, 0.9)


# A real model


@pytest.mark.smollm2
def test_smollm2_passes(smollm2_bundle: Path) -> None:
    verdict = verdict_of(smollm2_bundle, code=0)
    assert worst(verdict, "full", "difference") < 1e-3
    assert worst(verdict, "full", "argmax") == worst(verdict, "full", "greedy") == 0
    assert worst(verdict, "cost", "mean_kl") < 0.05


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
    assert failed(verdict).keys() >= {"weights different", "full difference"}
    assert failed(verdict)["weights different"] == len(flipped)
    assert {line.partition(":")[0] for line in check_of(verdict, "weights")["details"]} == flipped.keys()


@pytest.mark.smollm2
def test_smollm2_with_a_wrong_epsilon(smollm2_bundle: Path, tmp_path: Path) -> None:
    """transformers' default for a config that lacks it, where this model has 1e-5."""
    copy = faults.copy_of(smollm2_bundle, tmp_path / "copy", changed="model.onnx")
    faults.attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e-6, which=-1)(copy)
    assert "full difference" in failed(verdict_of(copy, "--no-hash", code=1))
