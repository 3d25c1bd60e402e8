"""Which references `verify` takes: its own or a user's, told apart by hash, sizes and tokens before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from llama_export.cli import main
from llama_export.errors import LlamaExportError
from llama_export.progress import Silent
from llama_export.runtime import choice
from llama_export.runtime.bundle import Bundle, ModelRecord, seal
from llama_export.runtime.proof import verify as verification
from llama_export.runtime.proof.reference import EXACT, ORIGINAL, Index, Logits, Reference
from llama_export.runtime.proof.reference_file import load_of_bundle, save
from llama_export.runtime.proof.replayers import GraphReplayer
from llama_export.runtime.proof.verdict import Verdict
from llama_export.runtime.proof.verify import verify
from support.tiny_bundle import random_llama
from support.tiny_reference import MODEL_SHA256
from support.tiny_tensorrt import PRIMITIVE, write_tensorrt_bundle

pytest.importorskip("onnxruntime", reason="bundles are verified with ONNX Runtime")

LLAMA = random_llama(3)
MISSING = "The GPU is out; build one here with `llama-export engine x`."


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choice, "_engine", lambda *_: MISSING)
    model = ModelRecord("tests/tiny", "folder", sha256=MODEL_SHA256)
    return write_tensorrt_bundle(tmp_path / "bundle", PRIMITIVE, LLAMA, reference=True, model=model)


def call(bundle: Bundle, *options: object) -> Result:
    return CliRunner().invoke(main, ["verify", str(bundle.path), "--quiet", "--no-hash", *map(str, options)])


def changed(bundle: Bundle, kind: str, **facts: Any) -> Reference:
    """The bundle's reference with other facts in its index; `identity` may be some of its facts alone."""
    reference = load_of_bundle(bundle.path, kind)
    identity = replace(reference.index.identity, **facts.pop("identity", {}))
    return replace(reference, index=replace(reference.index, identity=identity, **facts))


def longer(bundle: Bundle) -> Reference:
    """A reference whose first prompt is longer than the context, its logits repeated."""
    reference = load_of_bundle(bundle.path, ORIGINAL)
    prompt = reference.index.prompts[0]
    long = replace(prompt, ids=(1,) * 70, prompt_tokens=70, proven=0)
    logits = Logits.joined([reference.logits.rows(0, 1)] * 70)
    return Reference(replace(reference.index, prompts=(long,)), logits, None)


REFUSED: dict[str, tuple[Callable[[Bundle], Reference], str]] = {
    "another model": (
        lambda bundle: changed(bundle, ORIGINAL, identity={"model_sha256": "1" * 64}),
        "is of another model, tests/tiny, by its weights",
    ),
    "another vocabulary": (
        lambda bundle: changed(bundle, ORIGINAL, identity={"vocab": 300}),
        "vocabulary",
    ),
    "another tokenizer": (
        lambda bundle: changed(bundle, ORIGINAL, identity={"tokenizer_sha256": "2" * 64}),
        "has another tokenizer than",
    ),
    "other sizes": (
        lambda bundle: changed(bundle, ORIGINAL, identity={"hidden": 40}),
        "is of a model with hidden 40, and",
    ),
    "longer heads": (
        lambda bundle: changed(bundle, ORIGINAL, identity={"head_dim": 32}),
        "with heads of 32",
    ),
    "an adapter that is not there": (
        lambda bundle: changed(bundle, ORIGINAL, adapter="poet"),
        "is of the adapter 'poet'",
    ),
    "exact for another precision": (
        lambda bundle: changed(bundle, EXACT, precision="int8"),
        "is an exact reference for int8",
    ),
    "beyond the context": (longer, "has 70 tokens in 'text 0', and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_references_of_something_else(
    case: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = REFUSED[case]
    save(make(bundle), tmp_path / "other.npz")
    monkeypatch.setattr(GraphReplayer, "run", lambda *_: pytest.fail("the graph ran"))
    result = call(bundle, "--reference", tmp_path / "other.npz")
    assert message in result.stderr
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


def test_another_checkpoint_with_the_same_tokens_may_be_meant(bundle: Bundle, tmp_path: Path) -> None:
    other = changed(bundle, ORIGINAL, identity={"model_sha256": "1" * 64})
    save(other, tmp_path / "other.npz")
    assert call(bundle, "--reference", tmp_path / "other.npz", "--any-model").exit_code == 0
    save(changed(bundle, EXACT, identity={"model_sha256": "1" * 64}), tmp_path / "exact.npz")
    assert call(bundle, "--reference", tmp_path / "exact.npz", "--any-model").exit_code == 2


def test_two_of_a_kind(bundle: Bundle, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(load_of_bundle(bundle.path, ORIGINAL), tmp_path / f"{name}.npz")
    result = call(bundle, "--reference", tmp_path / "one.npz", "--reference", tmp_path / "two.npz")
    assert result.exit_code == 2
    assert "are both original references of the same model; give one" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"), [(None, "There is no reference"), (b"PK\x03\x04 cut", "is damaged"), (b"", "is damaged")]
)
def test_files_that_are_no_references(content: bytes | None, message: str, bundle: Bundle, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "other.npz").write_bytes(content)
    result = call(bundle, "--reference", tmp_path / "other.npz")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_prompts_of_its_own_are_a_run_of_their_own(bundle: Bundle, tmp_path: Path) -> None:
    """The bundle's exact reference still tells whether it is correct; the price is told of the user's texts."""
    original = load_of_bundle(bundle.path, ORIGINAL)
    first = original.index.prompts[0]
    mine = Reference(replace(original.index, prompts=(replace(first, name="mine"),)), original.of_prompt(0), None)
    save(mine, tmp_path / "mine.npz")
    verdict = run(bundle, references=(tmp_path / "mine.npz",))
    assert verdict.passed, verdict.failed
    prompts = {check.id: {case.prompt for case in check.cases} for check in verdict.checks}
    assert prompts["cost"] == {"mine"}
    assert prompts["full"] == {prompt.name for prompt in original.index.prompts}


def run(bundle: Bundle, **settings: Any) -> Verdict:
    return verify(bundle, check_hashes=False, threads=1, progress=Silent(), **settings)


def without(bundle: Bundle, kind: str) -> Bundle:
    (bundle.path / "reference" / f"{kind}.npz").unlink()
    return replace(bundle, manifest=seal(bundle.path, bundle.manifest))


def test_without_an_original_reference_the_price_is_not_told(bundle: Bundle) -> None:
    verdict = run(without(bundle, ORIGINAL))
    assert verdict.passed
    assert [check.id for check in verdict.checks] == ["files", "weights", "full", "shipped"]
    result = call(bundle, "--max-kl", "0.1")
    assert result.exit_code == 2
    assert "there is no original reference to tell" in result.stderr


def test_without_an_exact_reference_that_is_said(bundle: Bundle) -> None:
    verdict = run(without(bundle, EXACT))
    assert verdict.passed
    assert [check.id for check in verdict.checks] == ["files", "shipped", "cost"]
    assert any(note.startswith("There is no exact reference") for note in verdict.notes)


def test_a_budget_of_the_users_own(bundle: Bundle, tmp_path: Path) -> None:
    original = load_of_bundle(bundle.path, ORIGINAL)
    moved = replace(original.logits, top_logits=original.logits.top_logits + np.float32(0))
    moved.top_logits[:, 0] += 1
    save(replace(original, logits=replace(moved, logsumexp=moved.logsumexp + 1)), tmp_path / "moved.npz")
    passed = call(bundle, "--reference", tmp_path / "moved.npz", "--max-kl", "5", "--json", "-")
    gates = [gate for check in json.loads(passed.stdout)["runs"][0]["checks"] for gate in check["cases"][-1]["gates"]]
    (own,) = (gate for gate in gates if gate["figure"] == "max_kl")
    assert 0 < own["measured"] < own["limit"] == 5
    assert call(bundle, "--reference", tmp_path / "moved.npz", "--max-kl", own["measured"] / 2).exit_code == 1


def test_nan_fails_wherever_it_is(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, at one place of one text, in a vocabulary entry that no reference keeps."""
    kept = set(load_of_bundle(bundle.path, EXACT).logits.sample_ids.tolist())
    token = next(one for one in range(LLAMA.vocab) if one not in kept)
    honest = verification.BackendReplayer.run

    def broken(replayer: Any, ids: Any, firsts: Any, counts: Any) -> Any:
        logits = honest(replayer, ids, firsts, counts).copy()
        if firsts[0] == 11 and counts[0] == 1:
            logits[0, 0, token] = np.nan
        return logits

    monkeypatch.setattr(verification.BackendReplayer, "run", broken)
    verdict = run(bundle)
    failed = {(check.id, case.way) for check in verdict.checks for case in check.cases if not case.passed}
    assert {("shipped", "decode"), ("cost", "decode")} <= failed
    assert not {check for check, _ in failed} & {"weights", "full"}


# Several backends


def test_every_backend_has_a_run(bundle: Bundle, tmp_path: Path) -> None:
    """One that cannot run here is a failure of its own, and the others go on."""
    files = [option for name in ("json", "junit", "html") for option in (f"--{name}", tmp_path / f"verdict.{name}")]
    result = call(bundle, "--backend", "tensorrt,ort", *files)
    assert result.exit_code == 1
    runs = json.loads((tmp_path / "verdict.json").read_text())["runs"]
    assert [run["passed"] for run in runs] == [False, True]
    assert runs[0]["checks"][0]["error"] == MISSING
    assert "<testsuites" in (tmp_path / "verdict.junit").read_text()
    assert "<html" in (tmp_path / "verdict.html").read_text()
    assert not list(tmp_path.glob(".verdict*"))


def test_an_engine_and_the_cpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_export.runtime.ort_executors import onnxruntime_executor

    executor = onnxruntime_executor(bundle, threads=1)
    executor.name = "tensorrt 10.16.2 Test GPU"
    monkeypatch.setattr(choice, "_engine", lambda *_: SimpleNamespace(module="tensorrt", version="10.16.2"))
    monkeypatch.setattr("llama_export.runtime.tensorrt.TensorRTExecutor", lambda *_, **__: executor)
    result = call(bundle, "--backend", "trt,ort", "--json", "-")
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [run["backend"].split()[0] for run in runs] == ["tensorrt", "onnxruntime"]
    assert ["engine" in {check["id"] for check in run["checks"]} for run in runs] == [True, False]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ort,", "has an empty name in it"),
        ("ort,onnxruntime", "names one backend twice"),
        ("ort,tensor-rt", "Did you mean 'tensorrt'?"),
    ],
)
def test_backends_that_cannot_be_meant(names: str, message: str, bundle: Bundle) -> None:
    result = call(bundle, "--backend", names)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_backend_that_fails_is_one_sentence(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise LlamaExportError("The engine stopped.")

    monkeypatch.setattr(verification.BackendReplayer, "run", failing)
    result = call(bundle)
    assert (result.exit_code, result.stderr) == (1, "Error: The engine stopped.\n")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_budget_that_is_no_number_is_refused(bundle: Bundle, value: str) -> None:
    result = call(bundle, "--max-kl", value)
    assert result.exit_code == 2
    assert "--max-kl must be a number of nats" in result.stderr


def test_an_index_is_what_tells_them_apart(bundle: Bundle) -> None:
    index: Index = load_of_bundle(bundle.path, EXACT).index
    assert index.precision == bundle.manifest.precision
