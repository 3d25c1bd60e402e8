"""A bundle in each family of schemes in each dialect is built and proven, and what cannot be is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_export.build_options import BuildOptions
from llama_export.build_report import BuildReport
from llama_export.errors import LlamaExportError, UsageError
from llama_export.names import BUILT_IN
from llama_export.pipeline import build
from llama_export.planning import BuildPlan, plan_build
from llama_export.progress import Silent
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.proof.reference import EXACT
from llama_export.runtime.proof.reference_file import load_index_of_bundle
from llama_export.runtime.proof.verify import verify
from llama_export.targets.choice import choose
from llama_export.targets.devices import load_target
from support.hf_models import write_llama_folder

UP, HEAD = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
ORIN_7 = {"target": "jetson-orin", "jetpack": "7.2"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def options(tmp_path: Path, **changes: Any) -> BuildOptions:
    model = tmp_path / "llama"
    if not model.exists():
        write_llama_folder(model, hidden=64, ffn=changes.pop("ffn", 128), tied=changes.pop("tied", False))
    return BuildOptions(
        **{"model": str(model), "target": "cpu", "output": tmp_path / "out", "quality": False, **changes}
    )


def made(tmp_path: Path, **changes: Any) -> tuple[BuildReport, dict[str, str]]:
    """A bundle that `verify` has passed, and the format of each tensor."""
    report = build(options(tmp_path, **changes))
    verdict = verify(open_bundle(tmp_path / "out"), check_hashes=True, threads=1, progress=Silent())
    assert verdict.passed, verdict.failed
    records = load_index_of_bundle(tmp_path / "out", EXACT).weights
    return report, {record.name: record.format for record in records}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"precision": "int4", "method": "rtn"}, "int4-zeros-f16"),
        ({"precision": "int8-b16-zeros", "ffn": 77, "method": "rtn"}, "int8-b16-zeros-f16"),
        ({"precision": "int4-b256", "tied": True, "method": "rtn"}, "int4-b256-f16"),
        ({"precision": "w8a8"}, "int8-f16"),
        ({"precision": "int4-b64", "target": "jetson-orin"}, "int4-b64"),
        ({"precision": "w8a8", "calibrate": BUILT_IN, "target": "jetson-orin"}, "int8-row"),
        ({"precision": "int4-b16", **ORIN_7}, "int4-b16"),
    ],
    ids=str,
)
def test_a_bundle_of_each_family_is_proven(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    report, formats = made(tmp_path, **changes)
    assert formats[UP] == expected
    assert report.manifest.precision == changes["precision"]


def planned(tmp_path: Path, **changes: Any) -> BuildPlan:
    asked = options(tmp_path, **changes)
    target = choose(load_target(asked.target), jetpack=asked.jetpack, backend=asked.backend)
    return plan_build(asked, target, Silent())


@pytest.mark.parametrize(
    ("changes", "method", "tokens", "rounds"),
    [
        ({"precision": "fp16"}, None, 0, False),
        ({"precision": "int4"}, "search", 0, False),
        ({"precision": "int4", "method": "rtn"}, "rtn", 0, False),
        ({"precision": "int4", "calibrate": BUILT_IN}, "gptq", 16_384, False),
        ({"precision": "fp16", "head_precision": "int8", "calibrate": BUILT_IN}, "gptq", 16_384, False),
        ({"precision": "int4-b16", "target": "jetson-orin", "calibrate": BUILT_IN}, "gptq", 16_384, False),
        ({"precision": "w8a8", "target": "jetson-orin", "calibrate": BUILT_IN}, "rtn", 4096, True),
        ({"precision": "fp8", "target": "jetson-thor-t5000"}, "rtn", 0, False),
        ({"precision": "fp8", "target": "rtx-4090", "calibrate": BUILT_IN}, "search", 4096, True),  # the embedding
        ({"precision": "int8", "target": "rtx-4090", "calibrate": BUILT_IN}, "gptq", 16_384, False),
    ],
    ids=str,
)
def test_the_method_is_the_best_that_there_is(
    changes: dict[str, Any], method: str | None, tokens: int, rounds: bool, tmp_path: Path
) -> None:
    plan = planned(tmp_path, **changes)
    found = 0 if plan.calibration is None else plan.calibration.tokens
    assert (plan.method, plan.rounds_inputs) == (method, rounds)
    assert tokens * 0.9 <= found <= tokens


def test_scales_are_float16_anyway_where_activations_are(tmp_path: Path) -> None:
    plan = planned(tmp_path, precision="int4-b64-zeros", target="rtx-4090", backend="onnxruntime")
    assert {plan.formats[name].name for name in (UP, HEAD)} == {"int4-b64-zeros"}
    assert plan.formats["model.embed_tokens.weight"].name == "int8"


def test_w8a8_on_a_cpu_is_told_to_be_int8(tmp_path: Path) -> None:
    plan = planned(tmp_path, precision="w8a8")
    assert plan.formats == planned(tmp_path, precision="int8").formats
    assert [note for note in plan.source.notes if "int8 by another name" in note]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": "int4-b128", "target": "jetson-orin"},
            r"--precision int4-b128 .*_proj.weight have 64 numbers; ",
        ),
        ({"precision": "int4-b64", "target": "jetson-orin", "ffn": 96}, "choose int4-b16, int4-b32 or int4."),
        ({"precision": "int8-b256", "target": "rtx-4090", "ffn": 72}, "; choose int8."),
        ({"precision": "int8-b64", "target": "jetson-orin"}, "not int8-b64: choose one of these, or --backend onnx"),
        (
            {"precision": "int4-b64-zeros", "target": "jetson-orin"},
            "not int4-b64-zeros: choose one of these, or --back",
        ),
        ({"precision": "int4-b64", "target": "jetson-orin", "jetpack": "6.0"}, "or --jetpack 6.1"),
        ({"precision": "int4", "head_precision": "int4-b7"}, "Unknown precision 'int4-b7'; .*Did you mean 'int4-b"),
        ({"precision": "fp16", "calibrate": BUILT_IN}, "fp16 quantises nothing here: leave it out, or add --precision"),
        ({"precision": "int4", "method": "search", "calibrate": BUILT_IN}, "--method search uses no text"),
        ({"precision": "int4", "method": "gptq"}, "add --calibrate FILE, or --calibrate built-in."),
        ({"precision": "fp32", "method": "gptq", "calibrate": BUILT_IN}, "quantised to blocks of integers here"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_what_can(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, LlamaExportError), match=message) as caught:
        planned(tmp_path, **changes)
    assert "\n" not in str(caught.value)
