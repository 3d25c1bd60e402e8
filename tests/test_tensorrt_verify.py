"""Verifying bundles for TensorRT where ONNX Runtime computes them, and which faults that finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.progress import Silent
from llama_export.runtime import choice, load
from llama_export.runtime.bundle import Bundle
from llama_export.runtime.choice import choose_backend, open_backend
from llama_export.runtime.generate import GenerationOptions
from llama_export.runtime.onnx_nodes import Node, read_nodes, with_nodes
from llama_export.runtime.ort_executors import BucketExecutor, onnxruntime_executor
from llama_export.runtime.proof import questions
from llama_export.runtime.proof import verify as verification
from llama_export.runtime.proof.gates import limits_of
from llama_export.runtime.proof.verdict import Verdict
from llama_export.runtime.proof.verify import planned, verify
from llama_export.runtime.proof.ways import BATCH
from llama_export.runtime.requirements import parse_version
from llama_export.runtime.session import LEAST
from support.tiny_bundle import random_llama, write_bundle
from support.tiny_tensorrt import PRIMITIVE, STATIC, write_tensorrt_bundle

onnxruntime = pytest.importorskip("onnxruntime", reason="bundles are verified with ONNX Runtime")

LLAMA = random_llama(3)
_OLD = parse_version(onnxruntime.__version__) < parse_version(LEAST[STATIC])
DIALECTS = [
    pytest.param(STATIC, marks=pytest.mark.skipif(_OLD, reason="opset 24 needs a newer ONNX Runtime")),
    PRIMITIVE,
]

MISSING = "The GPU is out; build one here with `llama-export engine x`."


@pytest.fixture(scope="module", params=DIALECTS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    return write_tensorrt_bundle(folder, request.param, LLAMA, dtype="float16", reference=True)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has."""
    monkeypatch.setattr(choice, "_engine", lambda *_: MISSING)


def verdict_of(bundle: Bundle, **settings: Any) -> Verdict:
    return verify(bundle, check_hashes=False, threads=1, progress=Silent(), **settings)


def failed(verdict: Verdict) -> set[str]:
    return {
        f"{check.id} {gate.figure}"
        for check in verdict.checks
        for case in check.cases
        for gate in case.gates
        if not gate.passed
    }


def test_a_bundle_passes_and_says_what_computed_it(bundle: Bundle) -> None:
    verdict = verdict_of(bundle)
    assert verdict.passed
    assert verdict.backend == f"onnxruntime {onnxruntime.__version__} cpu"
    assert [check.id for check in verdict.checks] == ["files", "weights", "full", "shipped", "cost"]
    assert verdict.notes == (f"ONNX Runtime computes on the CPU: {MISSING}",)


def changed_run(change: Callable[[Any, Any, Any], tuple[Any, Any, Any]]) -> Callable[..., Any]:
    """An executor that is given other tokens, positions or places than it was asked for."""

    def make(*arguments: Any, **settings: Any) -> Any:
        honest = onnxruntime_executor(*arguments, **settings)
        run = honest.run
        honest.run = lambda ids, positions, kept: run(*change(ids, positions, kept))  # type: ignore[method-assign]
        return honest

    return make


FAULTS = {
    "a position too far, once it decodes": lambda i, p, k: (i, p + (p.shape[1] == 1), k),
    "the prompt's second piece at the start": lambda i, p, k: (i, p * (p.shape[1] == 1), k),
    "two tokens exchanged": lambda i, p, k: (i[:, ::-1].copy(), p, k),
    "logits of another token": lambda i, p, k: (i, p, k[:, ::-1].copy()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_runs_the_graph_wrongly_is_found(bundle: Bundle, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what ships alone: the full-precision run, through the same code, is left as it is."""
    monkeypatch.setattr(choice, "onnxruntime_executor", changed_run(FAULTS[fault]))
    found = failed(verdict_of(bundle))
    assert found
    assert {name.partition(" ")[0] for name in found} <= {"shipped", "cost"}


def test_a_cache_that_is_written_a_row_too_early_is_found(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    if bundle.manifest.dialect == STATIC:
        pytest.skip("the graph itself writes this dialect's cache")
    honest = BucketExecutor.run

    def early(executor: BucketExecutor, ids: Any, positions: Any, kept: Any) -> Any:
        logits = honest(executor, ids, positions, kept)
        for part in executor._past.values():
            part[:, :, :-1] = part[:, :, 1:].copy()
        return logits

    monkeypatch.setattr(BucketExecutor, "run", early)
    assert "full difference" in failed(verdict_of(bundle))


@pytest.mark.parametrize(
    ("right", "wrong"), [("LessOrEqual", "Less"), ("LessOrEqual", "GreaterOrEqual"), ("Sqrt", "Abs"), ("Sub", "Add")]
)
def test_another_operator_in_the_graph_is_found(bundle: Bundle, right: str, wrong: str, tmp_path: Path) -> None:
    """The mask and who sees whom, a norm, the rotation."""
    graph = bundle.file("model.onnx").read_bytes()
    nodes = read_nodes(graph)
    faulty = [Node(wrong, node.inputs, node.outputs) if node.op == right else node for node in nodes]
    assert faulty != nodes
    changed = {"model.onnx": with_nodes(graph, faulty, {})}
    copy = write_tensorrt_bundle(
        tmp_path, bundle.manifest.dialect, LLAMA, dtype="float16", reference=True, extra=changed
    )
    assert "full difference" in failed(verdict_of(copy))


def test_a_changed_weight_is_found(bundle: Bundle, tmp_path: Path) -> None:
    data = bytearray(bundle.file("model.onnx.data").read_bytes())
    data[2 * 1000] ^= 1
    copy = write_tensorrt_bundle(
        tmp_path,
        bundle.manifest.dialect,
        LLAMA,
        dtype="float16",
        reference=True,
        extra={"model.onnx.data": bytes(data)},
    )
    assert "weights different" in failed(verdict_of(copy))


# What computes


def test_the_fallback_tells_why_and_writes_the_same_text(bundle: Bundle, tmp_path: Path) -> None:
    model = load(bundle.path, threads=1)
    assert model.backend_note == f"ONNX Runtime computes on the CPU: {MISSING}"
    asked = load(bundle.path, threads=1, backend="onnxruntime")
    assert asked.backend_note is None
    plain = load(write_bundle(tmp_path, LLAMA).path, threads=1)
    assert plain.backend_note is None
    options = GenerationOptions(max_new_tokens=12, ignore_eos=True)
    texts = {one.generate([1, 2, 3], options).text for one in (model, asked, plain)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("tensor-rt", r"no backend 'tensor-rt', only onnxruntime, tensorrt, tensorrt-rtx\. Did you mean 'tensorrt'\?"),
        ("tensorrt-rtx", r"made for tensorrt: run it with tensorrt or onnxruntime, or build one for a target that has"),
    ],
)
def test_backends_that_it_has_not(bundle: Bundle, asked: str, message: str) -> None:
    for call in (lambda: load(bundle.path, backend=asked), lambda: verdict_of(bundle, backend=asked)):
        with pytest.raises(UsageError, match=message):
            call()


def test_an_engine_that_was_asked_for_and_is_not_there(bundle: Bundle) -> None:
    for call in (lambda: load(bundle.path, backend="tensorrt"), lambda: verdict_of(bundle, backend="tensorrt")):
        with pytest.raises(LlamaExportError, match=r"^The GPU is out"):
            call()


class Engine:
    """An engine of TensorRT whose arithmetic is ONNX Runtime's, `noise` added."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bundle: Bundle, noise: float = 0.0) -> None:
        executor = onnxruntime_executor(bundle, threads=1)
        run, rng = executor.run, np.random.default_rng(1)
        executor.name = "tensorrt 10.16.2 Test GPU"

        def noisy(*arguments: Any) -> Any:
            logits = run(*arguments)
            return logits + rng.standard_normal(logits.shape).astype(np.float32) * np.float32(noise)

        executor.run = noisy  # type: ignore[method-assign]
        self.file = SimpleNamespace(module="tensorrt", version="10.16.2")
        self.error: Exception | None = None

        def opened(*_: Any) -> Any:
            if self.error is not None:
                raise self.error
            return executor

        monkeypatch.setattr(choice, "_engine", lambda *_: self.file)
        monkeypatch.setattr("llama_export.runtime.tensorrt.TensorRTExecutor", opened)


def test_an_engine_is_used_where_there_is_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    Engine(monkeypatch, bundle)
    model = load(bundle.path)
    assert (model.backend_name, model.backend_note) == ("tensorrt 10.16.2 Test GPU", None)
    assert load(bundle.path, backend="onnxruntime").backend_name.startswith("onnxruntime")
    verdict = verdict_of(bundle)
    assert verdict.passed
    assert verdict.backend == "tensorrt 10.16.2 Test GPU"
    check = next(check for check in verdict.checks if check.id == "engine")
    assert check.title == "Engine of tensorrt 10.16.2, against the full-precision kernels"
    limits = limits_of("engine", "float16").limits
    assert all(gate.limit == limits[gate.figure] for case in check.cases for gate in case.gates)


def test_an_engine_that_computes_something_else_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    Engine(monkeypatch, bundle, noise=0.5)
    assert "engine mean_kl" in failed(verdict_of(bundle))


def test_an_engine_that_does_not_load_is_replaced_unless_it_was_asked_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine(monkeypatch, bundle).error = LlamaExportError("The plan is of another version.")
    assert load(bundle.path).backend_note == "ONNX Runtime computes on the CPU: The plan is of another version."
    for call in (lambda: load(bundle.path, backend="tensorrt"), lambda: verdict_of(bundle)):
        with pytest.raises(LlamaExportError, match=r"^The plan is of another version\.$"):
            call()


def test_a_device_without_onnxruntime_compares_its_engine_with_pytorch(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine(monkeypatch, bundle)

    def missing(*_: Any) -> Any:
        raise LlamaExportError("ONNX Runtime cannot be imported; install it.")

    monkeypatch.setattr(questions, "import_onnxruntime", missing)
    verdict = verdict_of(bundle)
    assert verdict.passed
    assert [check.id for check in verdict.checks] == ["files", "weights", "engine", "cost"]
    assert verdict.checks[2].title.endswith("against PyTorch on the same stored weights")
    assert verdict.checks[2].details[-1] == "ONNX Runtime cannot be imported; install it."


def test_an_engine_for_several_texts_is_asked_for_them_together(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 3
    limits = replace(bundle.manifest.limits, batch=rows)
    dialect = bundle.manifest.dialect
    batched = write_tensorrt_bundle(tmp_path, dialect, LLAMA, dtype="float16", reference=True, limits=limits)
    Engine(monkeypatch, batched)
    monkeypatch.setattr(
        verification, "open_rows", lambda own, _, count: onnxruntime_executor(own, rows=count, threads=1)
    )
    verdict = verdict_of(batched)
    assert verdict.passed
    check = next(check for check in verdict.checks if check.id == "engine")
    assert BATCH in {case.way for case in check.cases}
    asked = [
        (check.id, case.way, case.prompt, gate.figure)
        for check in verdict.checks
        for case in check.cases
        for gate in case.gates
    ]
    told = planned(batched, check_hashes=False)
    assert [(gate.check, gate.way, gate.prompt, gate.figure) for gate in told] == asked


def test_a_device_with_neither_says_both(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise LlamaExportError("ONNX Runtime cannot be imported; install it.")

    monkeypatch.setattr(choice, "import_onnxruntime", missing)
    with pytest.raises(LlamaExportError, match=r"^The GPU is out; .* Nor can the CPU run it meanwhile: ONNX Runtime"):
        load(bundle.path)


def test_a_capacity_below_the_context(bundle: Bundle) -> None:
    opened = open_backend(bundle, choose_backend(bundle), threads=1, capacity=11)
    assert opened.backend.capacity == 11
    assert opened.backend.extend([1] * 11).shape == (1, LLAMA.vocab)
    with pytest.raises(UsageError, match="exceed the context of 11"):
        opened.backend.step(1)


def test_the_limits_are_decisions() -> None:
    engine, rounded = limits_of("engine", "float16").limits, limits_of("engine", "rounded").limits
    assert (engine["mean_kl"], engine["agreement"]) == (0.01, 0.95)
    assert (rounded["mean_kl"], rounded["agreement"]) == (0.25, 0.8)
