"""Both dialects for TensorRT on ONNX Runtime, against the same model in NumPy: caches, chunks, buckets and rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime import ort_executors
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.bundle import Bundle
from llama_export.runtime.executor import StepBackend
from llama_export.runtime.ort_executors import BucketExecutor, StaticExecutor, onnxruntime_executor
from llama_export.runtime.proof.replayers import GraphReplayer
from llama_export.runtime.requirements import parse_version
from llama_export.runtime.session import LEAST
from support.tiny_bundle import random_llama, write_bundle
from support.tiny_tensorrt import PRIMITIVE, STATIC, write_tensorrt_bundle

onnxruntime = pytest.importorskip("onnxruntime", reason="the executors need ONNX Runtime")

LLAMA = random_llama(3)
IDS = [int(token) for token in np.random.default_rng(5).integers(0, LLAMA.vocab, 64)]
EXPECTED = LLAMA.logits(IDS)

_OLD = parse_version(onnxruntime.__version__) < parse_version(LEAST[STATIC])
DIALECTS = [
    pytest.param(STATIC, marks=pytest.mark.skipif(_OLD, reason="opset 24 needs a newer ONNX Runtime")),
    PRIMITIVE,
]

Opened = Callable[..., StepBackend]


@pytest.fixture(scope="module", params=DIALECTS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tensorrt_bundle(tmp_path_factory.mktemp("bundle"), request.param, LLAMA)


@pytest.fixture
def opened(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Opens the bundle; its buckets are of 8 tokens, so that short texts cross them."""
    monkeypatch.setattr(ort_executors, "FIRST_BUCKET", 8)
    return lambda **settings: StepBackend(bundle, onnxruntime_executor(bundle, threads=1), **settings)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, atol=2e-4)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 33, 64])
def test_prefill_in_chunks_of_seven(opened: Opened, count: int) -> None:
    backend = opened()
    close(backend.extend(IDS[:count]), EXPECTED[count - 1 : count])
    assert backend.length == count


@pytest.mark.parametrize(("count", "keep"), [(7, 7), (8, 2), (9, 3), (33, 33), (33, 12), (14, 7)])
def test_keeping_the_logits_of_several_positions(opened: Opened, count: int, keep: int) -> None:
    close(opened().extend(IDS[:count], keep=keep), EXPECTED[count - keep : count])


def test_steps_to_the_end_of_the_context(opened: Opened) -> None:
    backend = opened()
    backend.extend(IDS[:10])
    for position in range(10, 64):
        close(backend.step(IDS[position]), EXPECTED[position])
    with pytest.raises(UsageError, match="64 tokens and 1 more exceed the context of 64"):
        backend.step(1)


def test_rewinding_forgets_what_came_after(opened: Opened) -> None:
    backend = opened()
    backend.extend([*IDS[:9], *reversed(IDS[:50])])
    backend.rewind(9)
    close(backend.extend(IDS[9:30], keep=4), EXPECTED[26:30])
    backend.rewind(0)
    close(backend.extend(IDS[:2])[0], EXPECTED[1])


def test_the_tokens_are_those_of_the_ort_dialect(
    bundle: Bundle, opened: Opened, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Property: any mix of prompts, steps and rewinds gives the same argmax everywhere."""
    other = OnnxRuntimeBackend(write_bundle(tmp_path_factory.mktemp("ort"), LLAMA), threads=1)
    backend, rng = opened(), np.random.default_rng(11)
    for _ in range(40):
        count = int(rng.integers(1, 20))
        if backend.length + count > 64:
            length = int(rng.integers(0, backend.length + 1))
            backend.rewind(length)
            other.rewind(length)
            continue
        ids = rng.integers(0, LLAMA.vocab, count)
        keep = int(rng.integers(1, count + 1))
        found, expected = backend.extend(ids, keep), other.extend(ids, keep)
        close(found, expected)
        np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
        assert backend.length == other.length


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.extend([1, 261]), "from 0 to 260"),
        (lambda b: b.step(-1), "from 0 to 260, not -1"),
        (lambda b: b.extend([]), "keep must be from 1 to the number of tokens 0"),
        (lambda b: b.extend([1, 2], keep=3), "keep must be from 1 to the number of tokens 2"),
        (lambda b: b.rewind(1), "from 0 to 0, not 1"),
        (lambda b: b.use_adapter("none"), "has no adapter 'none'"),
    ],
)
def test_wrong_arguments(opened: Opened, call: Any, message: str) -> None:
    backend = opened()
    with pytest.raises(UsageError, match=message):
        call(backend)
    assert backend.length == 0


@pytest.mark.parametrize("capacity", [0, 65])
def test_a_capacity_out_of_range(opened: Opened, capacity: int) -> None:
    with pytest.raises(UsageError, match="capacity must be from 1 to the bundle's context 64"):
        opened(capacity=capacity)


def test_choosing_no_adapter_forgets_the_sequence(opened: Opened) -> None:
    backend = opened(capacity=12)
    backend.extend(IDS[:12])
    backend.use_adapter(None)
    close(backend.extend(IDS[:12])[0], EXPECTED[11])


def test_an_interrupted_run_can_be_made_again(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened()
    backend.extend(IDS[:10])
    session = backend._executor._session  # type: ignore[attr-defined]
    name = "run_with_iobinding" if isinstance(backend._executor, StaticExecutor) else "run"
    honest = getattr(session, name)

    def interrupted(*arguments: Any) -> None:
        honest(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.extend([1, 2, 3], keep=2)
    monkeypatch.setattr(session, name, honest)
    assert backend.length == 10
    close(backend.step(IDS[10]), EXPECTED[10])


def test_rows_may_stand_at_different_positions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_executors, "FIRST_BUCKET", 8)
    executor = onnxruntime_executor(bundle, rows=3, threads=1)
    other = IDS[::-1]
    rows = (IDS, other, IDS[5:])
    expected = [LLAMA.logits(row[:30]) for row in rows]
    starts = np.zeros(3, np.int64)
    for counts in ((4, 4, 4), (5, 5, 5), (1, 1, 1), (7, 7, 7)):
        count = counts[0]
        positions = starts[:, None] + np.arange(count)
        ids = np.array([row[start : start + count] for row, start in zip(rows, starts, strict=True)])
        kept = np.array([[count - 1], [0], [count // 2]])
        logits = executor.run(ids, positions, kept)
        assert logits.shape == (3, 1, LLAMA.vocab)
        for row in range(3):
            close(logits[row, 0], expected[row][starts[row] + kept[row, 0]])
        starts += count - np.array([0, 2, 1]) * (count > 2)  # some go back a little
    assert len(set(starts.tolist())) == 3


def test_a_replay_of_several_rows(bundle: Bundle) -> None:
    rows = np.array([IDS[:20], IDS[20:40], IDS[40:60]])
    replay = GraphReplayer(bundle, bundle.file("model.onnx").read_bytes(), 1, exact=True)
    replay.begin(3)
    parts = [
        replay.run(rows[:, start:stop], [start] * 3, [stop - start] * 3)
        for start, stop in ((0, 9), (9, 10), (10, 11), *((one, one + 1) for one in range(11, 20)))
    ]
    close(np.concatenate(parts, axis=1), np.array([LLAMA.logits(row.tolist()) for row in rows]))


def test_half_precision(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> None:
    half = write_tensorrt_bundle(
        tmp_path_factory.mktemp("half"), bundle.manifest.dialect, LLAMA, dtype="float16", prefill_chunk=9
    )
    backend = StepBackend(half, onnxruntime_executor(half, threads=1))
    logits = backend.extend(IDS[:30], keep=30)
    assert logits.dtype == np.float32
    assert 1e-5 < np.abs(logits - EXPECTED[:30]).max() < 0.15
    np.testing.assert_allclose(backend.step(IDS[30]), EXPECTED[30], atol=0.15)


@pytest.mark.skipif(_OLD, reason="opset 24 needs a newer ONNX Runtime")
def test_the_static_cache_is_written_in_place(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = write_tensorrt_bundle(tmp_path_factory.mktemp("static"), STATIC, LLAMA)
    executor = StaticExecutor(bundle, model=None, rows=1, threads=1, exact=False)
    backend = StepBackend(bundle, executor)
    places = [part.ctypes.data for part in executor._past.values()]
    backend.extend(IDS[:10])
    backend.step(IDS[10])
    outputs = executor._binding.get_outputs()
    assert [value.data_ptr() for value in outputs[:-1]] == places
    for keys in executor._past.values():
        assert keys.shape == (1, LLAMA.kv_heads, 64, LLAMA.head_dim)
        assert keys[:, :, :11].any(axis=(0, 1, 3)).all()
        assert not keys[:, :, 11:].any()


def test_buckets_grow_with_the_text_and_never_beyond_the_context(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_executors, "FIRST_BUCKET", 8)
    bundle = write_tensorrt_bundle(tmp_path_factory.mktemp("primitive"), PRIMITIVE, LLAMA, context=21)
    executor = BucketExecutor(bundle, model=None, rows=1, threads=1, exact=False)
    backend = StepBackend(bundle, executor)
    found = []
    for count in (1, 7, 1, 7, 1, 4):
        close(backend.extend(IDS[backend.length : backend.length + count])[0], EXPECTED[backend.length - 1])
        found.append({part.shape[2] for part in executor._past.values()})
    assert found == [{8}, {8}, {16}, {16}, {21}, {21}]
    backend.rewind(2)
    close(backend.step(IDS[2]), EXPECTED[2])


def test_a_context_below_the_first_bucket(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = write_tensorrt_bundle(tmp_path_factory.mktemp("short"), PRIMITIVE, LLAMA, context=5)
    backend = StepBackend(bundle, onnxruntime_executor(bundle, threads=1))
    close(backend.extend(IDS[:5], keep=5), EXPECTED[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, r"past_key_values\.2\.key should be .* and is absent"),
        ({"vocab": 1 << 20}, r"the output logits should be \(None, None, 1048576\) and is \['batch', "),
        ({"kv_heads": 3}, r"past_key_values\.0\.key should be .*3.* and is \['batch', 2"),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest(bundle: Bundle, changes: dict[str, int], message: str) -> None:
    shape = dataclasses.replace(bundle.manifest.shape, **changes)
    changed = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, shape=shape))
    with pytest.raises(LlamaExportError, match=message):
        onnxruntime_executor(changed, threads=1)


def test_an_onnxruntime_that_is_too_old(bundle: Bundle) -> None:
    manifest = dataclasses.replace(bundle.manifest, minimum={"onnxruntime": "99.1"})
    with pytest.raises(LlamaExportError, match=r"needs onnxruntime 99\.1 or newer, but here is .*; upgrade"):
        onnxruntime_executor(dataclasses.replace(bundle, manifest=manifest), threads=1)


def test_what_an_engine_says_is_one_sentence(opened: Opened) -> None:
    backend = opened()
    ids = np.zeros((1, 3), np.int64)
    with pytest.raises(LlamaExportError, match=r"onnxruntime .* cannot run the model: [^\n]*$"):
        backend._executor.run(ids, ids, np.full((1, 1), 9))  # no tenth token of three
