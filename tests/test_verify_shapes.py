"""Whole bundles of odd shapes in every dialect: all ways and layers are proven, also where the context is short."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from llama_export.build_options import BuildOptions
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime import choice
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.proof.verify import verify
from llama_export.runtime.proof.ways import WAYS
from llama_export.runtime.requirements import parse_version
from llama_export.runtime.session import LEAST
from support.hf_models import write_llama_folder

onnxruntime = pytest.importorskip("onnxruntime", reason="bundles are verified with ONNX Runtime")

TARGETS: Mapping[str, Mapping[str, str]] = {
    "ort": {"target": "cpu"},
    "trt": {"target": "jetson-orin", "jetpack": "7.2"},
    "trt-primitive": {"target": "jetson-orin", "jetpack": "6.2"},
}
SHAPES: Mapping[str, Mapping[str, int]] = {
    "heads of 20, which most kernels do not take": {"hidden": 60, "heads": 3, "kv_heads": 1, "head_dim": 20},
    "one head of keys for each": {"heads": 4, "kv_heads": 4, "layers": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dialect", TARGETS)
def test_odd_shapes_are_proven_in_every_way_and_layer(
    dialect: str, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parse_version(onnxruntime.__version__) < parse_version(LEAST[dialect]):
        pytest.skip("opset 24 needs a newer ONNX Runtime")
    monkeypatch.setattr(choice, "_engine", lambda *_: "There is no GPU.")
    model = write_llama_folder(tmp_path / "llama", **SHAPES[shape])
    options: dict[str, Any] = {"precision": "int4", "context": 50, **TARGETS[dialect]}
    build(BuildOptions(model=str(model), output=tmp_path / "bundle", **options), Silent())
    bundle = open_bundle(tmp_path / "bundle")
    verdict = verify(bundle, check_hashes=True, threads=1, progress=Silent())
    assert verdict.passed, verdict.failed
    assert verdict.longest <= bundle.manifest.limits.context == 50
    checks = {check.id: check for check in verdict.checks}
    assert {case.way for case in checks["full"].cases} == set(WAYS)
    layers = checks["layers"].layers
    assert [figure.layer for figure in layers] == list(range(bundle.manifest.shape.layers))
    assert all(None not in (figure.hidden, figure.keys, figure.values) for figure in layers)
    assert {gate.figure for case in checks["layers"].cases for gate in case.gates} == {"hidden", "keys", "values"}
