"""Running engines, on a fake of TensorRT and CUDA that computes with ONNX Runtime and checks every call."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime.bundle import Bundle, EngineRecord, Limits
from llama_export.runtime.executor import StepBackend
from llama_export.runtime.ort_executors import onnxruntime_executor
from llama_export.runtime.tensorrt import EngineFile, TensorRTExecutor
from llama_export.runtime.tensorrt.cuda import Cuda, CudaError
from llama_export.runtime.tensorrt.kv_cache import Bound, GrowingCache, blocks, buckets
from llama_export.runtime.tensorrt.lane import Recording
from support.fake_tensorrt import RELEASES, Release, fake_module, write_plan
from support.fake_tensorrt_cuda import FakeCuda
from support.tiny_bundle import random_llama
from support.tiny_tensorrt import OPSETS, write_tensorrt_bundle

NEWEST_OPSET = {(1, minor): 23 for minor in range(24)}.get(tuple(map(int, onnxruntime.__version__.split(".")[:2])), 24)
DIALECTS = [name for name, opset in OPSETS.items() if opset <= NEWEST_OPSET]

Opened = Callable[..., tuple[TensorRTExecutor, FakeCuda, Any]]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Open a bundle's engine on a fake machine; afterwards all has to be given back."""
    made: list[tuple[TensorRTExecutor, FakeCuda]] = []

    def open_(
        bundle: Bundle, release: Release = RELEASES["10.3"], cuda: FakeCuda | None = None, rows: int = 1, **plan: Any
    ) -> tuple[TensorRTExecutor, FakeCuda, Any]:
        cuda = cuda or FakeCuda()
        module = fake_module(release, cuda)
        monkeypatch.setitem(sys.modules, release.module, module)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        path = write_plan(tmp_path / "engine.plan", bundle, release, **plan)
        file = EngineFile(path, release.module, release.version, tmp_path / "kernels", built_here=True)
        try:
            executor = TensorRTExecutor(bundle, file, rows=rows)
        except Exception:
            assert cuda.live == 0
            raise
        made.append((executor, cuda))
        return executor, cuda, module

    yield open_
    for executor, cuda in made:
        executor.close()
        assert cuda.live == 0


def tiny(folder: Path, dialect: str, **changes: Any) -> Bundle:
    return write_tensorrt_bundle(folder / "bundle", dialect, **{"dtype": "float16", **changes})


def texts(executor: Any, bundle: Bundle, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], np.ndarray]:
    """Greedy continuations of every prompt, each begun anew, and all logits on the way."""
    backend = StepBackend(bundle, executor)
    written, seen = [], []
    for prompt in prompts:
        backend.rewind(0)
        logits = backend.extend(prompt)[-1]
        tokens = []
        for _ in range(steps):
            seen.append(logits.copy())
            tokens.append(int(logits.argmax()))
            logits = backend.step(tokens[-1])
        written.append(tokens)
    return written, np.array(seen)


PROMPTS = [[256, *range(40, 57)], [256], [256, 3, 9], [256, *range(100, 131)]]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("release", ["8.6", "10.0", "10.3", "10.16", "11.4"])
def test_texts_are_those_of_onnxruntime(release: str, dialect: str, tmp_path: Path, opened: Opened) -> None:
    bundle = tiny(tmp_path, dialect)
    expected, logits = texts(onnxruntime_executor(bundle, threads=1), bundle, PROMPTS, 20)
    executor, _, _ = opened(bundle, RELEASES[release])
    written, found = texts(executor, bundle, PROMPTS, 20)
    assert written == expected
    assert np.abs(found - logits).max() < 0.02
    assert executor.name == f"tensorrt {RELEASES[release].version} Orin"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_step_is_a_launch_and_at_most_one_copy(dialect: str, tmp_path: Path, opened: Opened) -> None:
    bundle = tiny(tmp_path, dialect, llama=random_llama(head_dim=64))  # so that new rows lie without gaps
    executor, cuda, module = opened(bundle)
    backend = StepBackend(bundle, executor)
    backend.extend([256, 1, 2, 3])
    steps = []
    for token in range(4):
        cuda.calls.clear()
        backend.step(token)
        steps.append(list(cuda.calls))
    copy = [] if dialect == "trt" else ["copy2D"]
    plain = ["cudaMemcpyHostToDevice", "run", "cudaMemcpyDeviceToHost"]
    assert steps == [[*plain, *copy], ["capture", "launch", *copy], ["launch", *copy], ["launch", *copy]]
    assert [context.runs for context in module.contexts] == [1, 4]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("where", ["by CUDA", "by TensorRT"])
def test_a_recording_that_is_refused_leaves_plain_runs(
    where: str, dialect: str, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny(tmp_path, dialect)
    cuda = FakeCuda(no_capture=True)
    if where == "by CUDA":
        monkeypatch.setattr(FakeCuda, "cudaStreamBeginCapture", lambda self, stream, mode: (self.cudaError_t(900),))
    expected, _ = texts(onnxruntime_executor(bundle, threads=1), bundle, PROMPTS, 9)
    executor, _, _ = opened(bundle, cuda=cuda)
    written, _ = texts(executor, bundle, PROMPTS, 9)
    assert written == expected
    assert "launch" not in cuda.calls
    assert cuda.calls.count("cudaGetLastError") == (1 if where == "by TensorRT" else 0)


def long_context(folder: Path, **changes: Any) -> Bundle:
    """A bundle whose cache grows: from 300 (of 600) to 600 tokens, neither a multiple of anything."""
    llama = random_llama(positions=603)
    return tiny(folder, "trt-primitive", llama=llama, context=603, prefill_chunk=101, **changes)


def test_the_cache_grows_with_a_text_and_shrinks_for_the_next(tmp_path: Path, opened: Opened) -> None:
    bundle = long_context(tmp_path)
    assert buckets(603) == (256, 603)
    prompts = [[256, *(index * 7 % 256 for index in range(count))] for count in (240, 3, 590, 5)]
    expected, logits = texts(onnxruntime_executor(bundle, threads=1), bundle, prompts[:2], 30)
    executor, cuda, _ = opened(bundle)
    written, found = texts(executor, bundle, prompts[:2], 30)
    assert written == expected
    assert np.abs(found - logits).max() < 0.02
    assert cuda.calls.count("capture") == 3  # in the short bucket, in the long one, in the short one again
    before = cuda.used
    assert (
        texts(executor, bundle, prompts[2:], 10)[0]
        == texts(onnxruntime_executor(bundle, threads=1), bundle, prompts[2:], 10)[0]
    )
    assert cuda.used == before  # all was reserved at the start


def test_growing_goes_on_where_it_was_interrupted(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = long_context(tmp_path)
    prompt = [256, *(index * 11 % 256 for index in range(249))]
    expected = texts(onnxruntime_executor(bundle, threads=1), bundle, [prompt], 12)[0]
    executor, _, _ = opened(bundle)
    backend = StepBackend(bundle, executor)
    tokens = [int(backend.extend(prompt)[-1].argmax())]
    copy, left = FakeCuda.cudaMemcpy2DAsync, [3]

    def interrupted(self: FakeCuda, *arguments: Any) -> Any:
        if arguments[4] > 16 * 2 and left[0]:  # wider than one token: a head on the move
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        return copy(self, *arguments)

    monkeypatch.setattr(FakeCuda, "cudaMemcpy2DAsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        while len(tokens) < 12:
            tokens.append(int(backend.step(tokens[-1]).argmax()))
    while len(tokens) < 12:
        tokens.append(int(backend.step(tokens[-1]).argmax()))
    assert [tokens] == expected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_rows_of_several_lengths(dialect: str, tmp_path: Path, opened: Opened) -> None:
    """Prompts are read text by text; rows that stand at different places, and then at the same one."""
    bundle = tiny(tmp_path, dialect, limits=Limits(64, 3, 7))
    reference, (executor, cuda, _) = onnxruntime_executor(bundle, rows=3, threads=1), opened(bundle, rows=3)
    random = np.random.default_rng(5)
    starts = np.zeros((3, 1), np.int64)
    for count, kept, moves in (
        (5, 2, (0, 0, 0)),
        (1, 1, (0, 0, 0)),
        (1, 1, (-3, 0, -1)),
        (4, 4, (0, -2, 0)),
        (1, 1, (0, 0, 0)),
    ):
        starts = starts + np.array(moves)[:, None]
        ids = random.integers(0, 250, (3, count))
        wanted = np.sort(random.permuted(np.tile(np.arange(count), (3, 1)), axis=1)[:, :kept], axis=1)
        cuda.calls.clear()
        given = ids, starts + np.arange(count), wanted
        found, expected = executor.run(*given), reference.run(*given)
        assert found.shape == (3, kept, bundle.manifest.shape.vocab)
        assert np.abs(found - expected).max() < 0.02
        starts = starts + count


@pytest.mark.parametrize("dialect", DIALECTS)
def test_logits_of_many_tokens(dialect: str, tmp_path: Path, opened: Opened) -> None:
    bundle = tiny(tmp_path, dialect)
    ids = [256, *range(60, 79)]
    expected = StepBackend(bundle, onnxruntime_executor(bundle, threads=1)).extend(ids, 17)
    executor, cuda, _ = opened(bundle)
    backend = StepBackend(bundle, executor)
    assert np.abs(backend.extend(ids, 17) - expected).max() < 0.02
    held = cuda.live
    backend.rewind(4)
    assert np.abs(backend.extend(ids[4:], 3) - expected[-3:]).max() < 0.02
    assert cuda.live == held


def test_memory_that_is_short_is_told_with_the_purpose(tmp_path: Path, opened: Opened) -> None:
    bundle = tiny(tmp_path, "trt-primitive")
    with pytest.raises(CudaError, match=r"Orin has .* free of 6\.00 kB, but the cache takes .*smaller --context"):
        opened(bundle, cuda=FakeCuda(total=6000))
    need = 64 * 2 * 2 * 2 * 16 * 2
    with pytest.raises(CudaError, match="but the engine's work takes"):
        opened(bundle, cuda=FakeCuda(total=need + 9000), scratch=1 << 20)


def test_memory_that_is_short_for_logits_ends_one_run_only(tmp_path: Path, opened: Opened) -> None:
    bundle = tiny(tmp_path, "trt-primitive", prefill_chunk=64)
    executor, cuda, _ = opened(bundle)
    backend = StepBackend(bundle, executor)
    first = backend.extend([256, 1, 2]).copy()
    backend.rewind(0)
    cuda.total = cuda.used + 5000
    with pytest.raises(CudaError, match="but logits takes"):
        backend.extend([256, *range(40)], 40)
    assert backend.length == 0
    assert np.array_equal(backend.extend([256, 1, 2]), first)


def test_an_engine_that_fails_says_what_tensorrt_said(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny(tmp_path, "trt-primitive")
    executor, _, module = opened(bundle)
    context = module.contexts[0]

    def fails(stream: int) -> bool:
        context.engine.logger.log(module.ILogger.ERROR, "Error Code 1: Cuda Runtime (unspecified launch failure)")
        return False

    monkeypatch.setattr(context, "execute_async_v3", fails)
    with pytest.raises(LlamaExportError, match=r"^TensorRT cannot run the model: Error Code 1.*launch failure\)\.$"):
        executor.run(np.array([[1, 2]]), np.array([[0, 1]]), np.array([[1]]))


@pytest.mark.parametrize(
    ("ids", "start"),
    [(np.zeros((2, 1), np.int64), 0), (np.zeros((1, 8), np.int64), 0), (np.zeros((1, 2), np.int64), 63)],
)
def test_runs_beyond_what_was_reserved_are_refused(ids: np.ndarray, start: int, tmp_path: Path, opened: Opened) -> None:
    executor, cuda, _ = opened(tiny(tmp_path, "trt-primitive"))
    cuda.calls.clear()
    with pytest.raises(UsageError, match="1 rows of 1 to 7 tokens below position 64"):
        executor.run(ids, start + np.arange(ids.shape[1]) + np.zeros_like(ids), np.zeros((len(ids), 1), np.int64))
    assert not cuda.calls


def test_rows_are_bounded_by_the_batch(tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(UsageError, match="from 1 to the bundle's batch 1, not 2"):
        opened(tiny(tmp_path, "trt-primitive"), rows=2)


def test_rtx_keeps_its_kernels_and_compiles_at_once_for_steps(tmp_path: Path, opened: Opened) -> None:
    if "trt" not in DIALECTS:
        pytest.skip("this onnxruntime does not know opset 24")
    bundle = rtx_bundle(tmp_path)
    executor, cuda, module = opened(bundle, RELEASES["rtx"])
    assert module.specialised == ["lazy", "eager"]
    written, _ = texts(executor, bundle, PROMPTS[:1], 9)
    assert written == texts(onnxruntime_executor(bundle, threads=1), bundle, PROMPTS[:1], 9)[0]
    assert "launch" in cuda.calls
    executor.close()
    assert (tmp_path / "kernels").read_bytes() == b"compiled"
    (tmp_path / "kernels").write_bytes(b"of a former run")
    _, _, module = opened(bundle, RELEASES["rtx"])
    assert module.contexts[0].engine.release.rtx


def rtx_bundle(folder: Path) -> Bundle:
    return tiny(folder, "trt", backend="tensorrt-rtx", engine=EngineRecord("tensorrt_rtx", "1.7.1"))


def test_an_executor_that_is_forgotten_gives_all_back(tmp_path: Path, opened: Opened) -> None:
    executor, cuda, _ = opened(tiny(tmp_path, "trt-primitive"))
    assert cuda.live
    executor.close()
    assert cuda.live == 0
    executor.close()  # and a second time does nothing


@pytest.mark.parametrize("context", [1, 255, 511, 512, 513, 1000, 4096, 131072])
def test_buckets_at_least_double(context: int) -> None:
    found = buckets(context)
    assert found[-1] == context
    assert all(longer >= 2 * shorter for shorter, longer in itertools.pairwise(found))
    assert all(length % 128 == 0 and length >= 256 for length in found[:-1])


def test_copies_are_as_few_as_they_can_be() -> None:
    whole = list(blocks((6, 1, 3), 0, (192, 64 * 3, 64), 10_000, (24, 24, 8), 8))
    assert [(one.height, one.target_pitch, one.source_pitch) for one in whole] == [(18, 64, 8)]
    padded = list(blocks((6, 1, 3), 0, (256, 64 * 3, 64), 10_000, (24, 24, 8), 8))
    assert [(one.target, one.source, one.height) for one in padded] == [
        (head * 64, 10_000 + head * 8, 6) for head in range(3)
    ]
    assert [one.height for one in blocks((1, 1, 1), 0, (64, 64, 64), 99, (8, 8, 8), 8)] == [1]


def overlapping(self: GrowingCache, row: int | None, count: int) -> Iterator[Bound]:
    return self._bound("present.", self._base, None, 1, count)


@pytest.mark.parametrize(
    ("where", "name", "instead"),
    [
        (Recording, "forget", lambda self: None),
        (Cuda, "wait", lambda self: None),
        (GrowingCache, "keep", lambda self, row, starts, count: None),
        (GrowingCache, "outputs", overlapping),
        (FakeCuda, "cudaMemsetAsync", lambda self, *rest: (self.cudaError_t.cudaSuccess,)),
    ],
)
def test_the_fake_sees_faults(
    where: Any, name: str, instead: Any, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What these tests rest on: each of these would be a wrong text or a crash on a GPU."""
    bundle = long_context(tmp_path)
    prompt = [256, *(index * 7 % 256 for index in range(240))]
    expected = texts(onnxruntime_executor(bundle, threads=1), bundle, [prompt], 24)[0]
    monkeypatch.setattr(where, name, instead)
    cuda = FakeCuda()
    try:
        executor, _, _ = opened(bundle, cuda=cuda)
        written = texts(executor, bundle, [prompt], 24)[0]
    except AssertionError as error:
        assert "overlap" in str(error) or "have changed" in str(error)
    else:
        assert written != expected
    cuda.queue.clear()
