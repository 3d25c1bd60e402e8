"""A tiny Llama exported by optimum-onnx and by onnxruntime-genai's builder, held to PyTorch by the limits of `verify`;
and the same with a fault.

Each tool lives in an environment of its own, named by the path of its interpreter: LLAMA_EXPORT_PEER_OPTIMUM and
LLAMA_EXPORT_PEER_GENAI.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from llama_export.runtime.proof.foreign import GENAI, OPTIMUM, ForeignReplayer, open_foreign
from llama_export.runtime.proof.gates import limits_of
from llama_export.runtime.proof.parity import Comparison, compare
from llama_export.runtime.proof.reference import compress
from llama_export.runtime.proof.ways import BATCH, WAYS, Text
from safetensors.numpy import load_file
from support.hf_models import write_llama_folder

pytestmark = pytest.mark.peer

VARIABLES = {OPTIMUM: "LLAMA_EXPORT_PEER_OPTIMUM", GENAI: "LLAMA_EXPORT_PEER_GENAI"}
THETA = 10000.0
TEXTS = (Text(tuple(range(5, 45)), 33), Text((0, 7, 300, 21, 21, 9, 100, 11, 250), 4), Text((0, 90, 80, 70), 2))

Export = Callable[[Path, Path], Path]


@pytest.fixture(scope="module", params=VARIABLES)
def tool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def interpreter(tool: str) -> str:
    path = os.environ.get(VARIABLES[tool])
    if not path:
        pytest.skip(f"{VARIABLES[tool]} does not name a Python with {tool}")
    assert Path(path).is_file(), f"{VARIABLES[tool]} is {path}, which is no file"
    return path


def export(tool: str, model: Path, folder: Path, *, precision: str = "fp32", options: tuple[str, ...] = ()) -> Path:
    python = interpreter(tool)
    command = {
        OPTIMUM: ["optimum.exporters.onnx", "--model", str(model), "--task", "text-generation-with-past", str(folder)],
        GENAI: [
            *("onnxruntime_genai.models.builder", "-i", str(model), "-o", str(folder), "-p", precision, "-e", "cpu"),
            *("-c", str(folder.parent / "cache"), *(("--extra_options", *options) if options else ())),
        ],
    }[tool]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([python, "-m", *command], capture_output=True, text=True, check=False, env=settings)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_folder(tmp_path_factory.mktemp("model") / "hf", rope={"rope_theta": THETA}, seed=5)


@pytest.fixture(scope="module")
def exported(tool: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tool, model, tmp_path_factory.mktemp(tool) / "exported")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[np.ndarray]:
    llama = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return [llama(torch.tensor([text.ids])).logits[0].numpy() for text in TEXTS]


def passed(folder: Path, expected: list[np.ndarray]) -> dict[str, bool]:
    """By way, whether the logits are within the limits of full precision."""
    opened = open_foreign(folder)
    replayer = ForeignReplayer(opened, threads=1, exact=True)
    kept = [compress(logits) for logits in expected]
    largest = max(float(np.abs(logits).max()) for logits in expected)
    result = {}
    for name, way in WAYS.items():
        if name == BATCH and replayer.most_rows == 1:
            continue
        found = [
            compare(kept[piece.text].rows(piece.start, piece.stop), piece.logits) for piece in way(replayer, TEXTS, 16)
        ]
        gates = limits_of("full", opened.cache_dtype).judge(Comparison.joined(found), largest)
        result[name] = all(gate.passed for gate in gates)
    return result


def test_an_export_is_what_pytorch_computes(tool: str, exported: Path, expected: list[np.ndarray]) -> None:
    opened = open_foreign(exported)
    assert (opened.kind, opened.weights, opened.context) == (tool, "fp32", 256)
    assert passed(exported, expected) == dict.fromkeys(WAYS, True)


def test_a_wrong_rope_theta_fails(tool: str, model: Path, expected: list[np.ndarray], tmp_path: Path) -> None:
    wrong = shutil.copytree(model, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "rope_theta": 0.9 * THETA}))
    found = passed(export(tool, wrong, tmp_path / "exported"), expected)
    assert not any(found.values())


def test_one_corrupted_weight_fails(exported: Path, model: Path, expected: list[np.ndarray], tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "corrupted")
    norm = load_file(model / "model.safetensors")["model.layers.1.post_attention_layernorm.weight"]
    changed = norm.copy()
    changed[11] *= 1.5
    (file,) = [file for file in folder.glob("model.onnx*") if norm.tobytes() in file.read_bytes()]
    file.write_bytes(file.read_bytes().replace(norm.tobytes(), changed.tobytes()))
    assert not any(passed(folder, expected).values())


def test_a_pruned_head(model: Path, expected: list[np.ndarray], tmp_path: Path) -> None:
    folder = export(GENAI, model, tmp_path / "pruned", options=("prune_lm_head=true",))
    assert "token by token" in ForeignReplayer(open_foreign(folder)).notes[0]
    assert passed(folder, expected) == dict.fromkeys(WAYS, True)


def test_kernels_of_4_bits_in_full_precision(model: Path, tmp_path: Path) -> None:
    opened = open_foreign(export(GENAI, model, tmp_path / "int4", precision="int4"))
    assert (opened.weights, opened.quantised, opened.blockwise) == ("4", True, True)
    ids = np.array([TEXTS[0].ids])
    exact, shipped = (ForeignReplayer(opened, exact=exact) for exact in (True, False))
    whole = exact.run(ids, [0], [40])
    exact.begin(1)
    steps = np.concatenate([exact.run(ids[:, at : at + 1], [at], [1]) for at in range(40)], axis=1)
    np.testing.assert_allclose(steps, whole, atol=2e-4)
    assert np.abs(shipped.run(ids, [0], [40]) - whole).max() > 1e-2
