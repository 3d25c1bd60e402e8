"""Other tools run our bundle as it is, and other versions of Python and ONNX Runtime do too.

Each lives in an environment of its own, named by the path of its interpreter: LLAMA_EXPORT_PEER_GENAI for
onnxruntime-genai, LLAMA_EXPORT_PEER_OPTIMUM for optimum-onnx, LLAMA_EXPORT_PY310 for Python 3.10 with the base
dependencies and onnxruntime 1.23.2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_export
import pytest
from tokenizers import Tokenizer

pytestmark = [pytest.mark.smollm2, pytest.mark.peer]

SCRIPTS = Path(__file__).parent / "peers"
TEXTS = ("The capital of France is Paris, and the capital of", "Once upon a time")
COUNT = 64
Rows = list[list[int]]


def interpreter(variable: str, what: str) -> str:
    """The interpreter that an environment variable names; skips the test without it, fails where it is no file."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} does not name a Python with {what}")
    assert Path(path).is_file(), f"{variable} is {path}, which is no file"
    return path


@pytest.fixture(scope="module")
def genai() -> str:
    return interpreter("LLAMA_EXPORT_PEER_GENAI", "onnxruntime-genai")


@pytest.fixture(scope="module")
def optimum() -> str:
    return interpreter("LLAMA_EXPORT_PEER_OPTIMUM", "optimum-onnx")


@pytest.fixture(scope="module")
def py310() -> str:
    return interpreter("LLAMA_EXPORT_PY310", "Python 3.10, the base dependencies and onnxruntime 1.23.2")


def run(command: list[str], text: str = "", **environment: str) -> str:
    """What a command prints on stdout; fails with what it prints on stderr."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


def greedy(
    python: str, script: str, bundle: Path, prompts: Rows, *, count: int = COUNT, path: str = "", **options: Any
) -> Rows:
    """The tokens that follow each prompt, by one of the scripts in peers/, which says what its options are."""
    job = {"bundle": str(bundle), "prompts": prompts, "count": count, **options}
    result = run([python, str(SCRIPTS / script)], json.dumps(job), **({"PYTHONPATH": path} if path else {}))
    rows: Rows = json.loads(result.splitlines()[-1])
    assert [len(row) for row in rows] == [count] * len(prompts)
    return rows


@pytest.fixture(scope="module")
def prompts(smollm2_bundle: Path) -> Rows:
    tokenizer = Tokenizer.from_file(str(smollm2_bundle / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def ours(smollm2_bundle: Path, prompts: Rows) -> Rows:
    """What our runtime generates from each prompt alone."""
    return greedy(sys.executable, "own_rows.py", smollm2_bundle, prompts)


@pytest.mark.parametrize("row", range(len(TEXTS)))
def test_genai_generates_our_tokens(genai: str, smollm2_bundle: Path, prompts: Rows, ours: Rows, row: int) -> None:
    assert greedy(genai, "genai_rows.py", smollm2_bundle, [prompts[row]]) == [ours[row]]


@pytest.mark.parametrize("order", [1, -1], ids=["longer-first", "shorter-first"])
def test_genai_generates_our_tokens_in_a_batch_of_two_lengths(
    genai: str, smollm2_bundle: Path, prompts: Rows, ours: Rows, order: int
) -> None:
    assert len(prompts[0]) > len(prompts[1])
    assert greedy(genai, "genai_rows.py", smollm2_bundle, prompts[::order]) == ours[::order]


def test_genai_appends_to_a_prompt(genai: str, smollm2_bundle: Path, prompts: Rows) -> None:
    expected = greedy(sys.executable, "own_rows.py", smollm2_bundle, prompts[:1], split=4)
    assert greedy(genai, "genai_rows.py", smollm2_bundle, prompts[:1], split=4) == expected


def test_optimum_generates_our_tokens(optimum: str, smollm2_bundle: Path, prompts: Rows, ours: Rows) -> None:
    assert greedy(optimum, "optimum_rows.py", smollm2_bundle, prompts) == ours


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH that has this very package, whatever the other environment has installed."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "llama_export").symlink_to(Path(llama_export.__file__).parent, target_is_directory=True)
    return str(folder)


def test_python_3_10_generates_our_tokens(py310: str, smollm2_bundle: Path, prompts: Rows, source_tree: str) -> None:
    job: dict[str, Any] = {"count": 8, "full_precision": True}  # few, since such kernels take a third of a second each
    here = greedy(sys.executable, "own_rows.py", smollm2_bundle, prompts[1:], **job)
    assert greedy(py310, "own_rows.py", smollm2_bundle, prompts[1:], path=source_tree, **job) == here


def test_python_3_10_verifies_and_writes(py310: str, smollm2_bundle: Path, source_tree: str) -> None:
    versions = "import sys, onnxruntime; print(sys.version_info[:2], onnxruntime.__version__)"
    assert run([py310, "-c", versions]) == "(3, 10) 1.23.2\n"
    command = [py310, "-m", "llama_export"]
    run([*command, "verify", str(smollm2_bundle)], PYTHONPATH=source_tree)
    chat = ("--chat", "What is the capital of France?", "--max-new-tokens", "5", "--json")
    answer = json.loads(run([*command, "run", str(smollm2_bundle), *chat], PYTHONPATH=source_tree))
    assert answer["text"].strip()
    assert (answer["new_tokens"], answer["finish_reason"]) == (5, "length")
