"""Steps from a CUDA graph: what is recorded, what stays in place, and what happens where none can be recorded.

A fake of ONNX Runtime with a GPU stands in; what it assumes of masks is proven on the CPU's own kernels. Tests marked
`gpu` do the same on a real one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.bundle import Bundle
from llama_export.runtime.choice import choose_backend, open_backend
from llama_export.runtime.cuda_backend import CudaBackend
from support.tiny_bundle import random_llama, write_bundle

onnxruntime = pytest.importorskip("onnxruntime", reason="the backend needs ONNX Runtime")

from support.fake_cuda_ort import CUDA, FakeOrt  # noqa: E402 (needs ONNX Runtime)

LLAMA = random_llama(3)
IDS = [int(token) for token in np.random.default_rng(5).integers(0, LLAMA.vocab, 40)]
EXPECTED = LLAMA.logits(IDS)
ON_GPU: dict[str, Any] = {"target": "cuda", "providers": (CUDA, "CPUExecutionProvider")}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle"), LLAMA, **ON_GPU)


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    fake = FakeOrt()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return fake


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def text_of(backend: OnnxRuntimeBackend) -> None:
    """A prompt, steps, several logits, a shorter text and one that goes to the end of the cache."""
    close(backend.extend(IDS[:10])[0], EXPECTED[9])
    for position in range(10, 15):
        close(backend.step(IDS[position]), EXPECTED[position])
    close(backend.extend(IDS[15:20], keep=5), EXPECTED[15:20])
    close(backend.step(IDS[20]), EXPECTED[20])
    backend.rewind(3)
    for position in range(3, 40):
        close(backend.step(IDS[position]), EXPECTED[position])
    assert backend.length == 40


@pytest.mark.parametrize("capacity", [40, 64])
def test_steps_are_recorded_once_and_replayed(ort: FakeOrt, bundle: Bundle, capacity: int) -> None:
    backend = CudaBackend(bundle, threads=1, capacity=capacity)
    assert backend.note is None
    assert set(ort.runs) == {(1, "recorded")}
    ort.runs.clear()
    text_of(backend)
    assert ort.runs == [(-1, "plain")] * 2 + [(1, "replayed")] * 5 + [(-1, "plain")] + [(1, "replayed")] * 38
    assert len(ort.sessions) == 1


def test_nothing_that_is_recorded_moves(ort: FakeOrt, bundle: Bundle) -> None:
    backend = CudaBackend(bundle, threads=1)
    assert backend._steps is not None
    held = dict(backend._steps._binding.on_device)
    addresses = {name: value.data_ptr() for name, value in held.items()}
    text_of(backend)
    assert backend._steps._binding.on_device == held
    assert {name: value.data_ptr() for name, value in held.items()} == addresses
    assert held["attention_mask"].array.shape == (1, backend.capacity)
    assert held["attention_mask"].updates == held["input_ids"].updates == 1 + 5 + 1 + 37
    assert "logits_to_keep" not in held


def test_the_mask_follows_a_text_that_was_cut(ort: FakeOrt, bundle: Bundle) -> None:
    backend = CudaBackend(bundle, threads=1)
    backend.extend(IDS[:20])
    backend.step(IDS[20])
    backend.rewind(4)
    backend.step(IDS[4])
    assert backend._steps is not None
    assert backend._steps._mask.array.tolist() == [[1] * 5 + [0] * 59]


def test_the_logits_of_a_step_are_the_callers(ort: FakeOrt, bundle: Bundle) -> None:
    backend = CudaBackend(bundle, threads=1)
    first = backend.step(IDS[0])
    backend.step(IDS[1])
    assert first.dtype == np.float32
    close(first, EXPECTED[0])


@pytest.mark.parametrize("problem", ["refuses", "fails"])
def test_without_cuda_graphs_it_goes_on_and_says_so(ort: FakeOrt, bundle: Bundle, problem: str) -> None:
    setattr(ort, problem, True)
    opened = open_backend(bundle, choose_backend(bundle), threads=1)
    assert isinstance(opened.backend, CudaBackend)
    text_of(opened.backend)
    reason = {"refuses": "cannot use the graph capture feature", "fails": "operation not permitted"}[problem]
    assert opened.note is not None
    assert opened.note.startswith("Every token starts its kernels one by one, without a CUDA graph")
    assert reason in opened.note
    assert {how for _, how in ort.runs} == {"plain"}
    assert ort.sessions[-1].options == {}


def test_a_session_that_cannot_be_made_at_all_is_an_error(
    ort: FakeOrt, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeOrt, "InferenceSession", none)
    with pytest.raises(LlamaExportError, match=r"cannot load the model of .*: out of memory"):
        CudaBackend(bundle, threads=1)


def test_an_interrupted_step_leaves_the_sequence_as_it_was(
    ort: FakeOrt, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CudaBackend(bundle, threads=1)
    backend.extend(IDS[:10])
    session = ort.sessions[0]
    run = session.run_with_iobinding

    def interrupted(*arguments: Any) -> None:
        run(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_with_iobinding", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.step(IDS[3])
    monkeypatch.undo()
    assert backend.length == 10
    close(backend.step(IDS[10]), EXPECTED[10])


def test_a_failed_step_is_one_sentence(ort: FakeOrt, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend(bundle, threads=1)

    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA failure 719: unspecified launch failure\nmore")

    monkeypatch.setattr(ort.sessions[0], "run_with_iobinding", lost)
    with pytest.raises(LlamaExportError, match=r"cannot run the model's CUDA graph: CUDA failure 719[^\n]*$"):
        backend.step(1)


def test_a_bundle_for_the_cpu_never_asks_for_cuda_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    make = onnxruntime.InferenceSession

    def session(graph: bytes, options: Any, **settings: Any) -> Any:
        asked.append(settings["providers"])
        return make(graph, options, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    plain = write_bundle(tmp_path, LLAMA)
    opened = open_backend(plain, choose_backend(plain), threads=1)
    assert type(opened.backend) is OnnxRuntimeBackend
    assert asked == [["CPUExecutionProvider"]]


def test_a_mask_of_the_whole_cache_gives_the_very_same_logits(tmp_path: Path) -> None:
    """On the CPU's kernels: ones up to the position and zeros behind, against a mask that grows."""
    plain = write_bundle(tmp_path, LLAMA)
    growing, constant = (OnnxRuntimeBackend(plain, threads=1) for _ in range(2))
    for start in (5, 1):  # twice: the second text is shorter than what the cache still holds
        growing.rewind(0)
        constant.rewind(0)
        for backend in (growing, constant):
            backend.extend(IDS[:start])
        for position in range(start, 40):
            expected = growing.step(IDS[position]).copy()
            mask = (np.arange(constant.capacity) <= position).astype(np.int64)[None]
            binding = constant._binding
            binding.bind_cpu_input("input_ids", np.array([[IDS[position]]], np.int64))
            binding.bind_cpu_input("attention_mask", mask)
            constant._session.run_with_iobinding(binding)
            constant.length += 1
            assert np.array_equal(constant._last[0, 0], expected), position


def test_each_adapter_has_a_recording_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="adapters are made with peft")
    from llama_export.build_options import RUNTIME, BuildOptions
    from llama_export.pipeline import build
    from llama_export.runtime.bundle import open_bundle
    from support.adapters import write_adapter
    from support.hf_models import write_llama_folder

    model = write_llama_folder(tmp_path / "llama")
    adapters = [write_adapter(model, tmp_path / name, seed=seed, size=0.5) for seed, name in enumerate(("one", "two"))]
    texts, folder = tuple(map(str, adapters)), tmp_path / "bundle"
    build(BuildOptions(str(model), "cuda", folder, adapters=texts, adapter_mode=RUNTIME, reference=False))
    fake = FakeOrt()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    replayed = CudaBackend(open_bundle(folder), threads=1, adapter="one")
    plain = OnnxRuntimeBackend(open_bundle(folder), threads=1, adapter="one")
    rows = []
    for name in ("one", None, "two", "one"):
        for backend in (replayed, plain):
            backend.use_adapter(name)
            backend.extend(IDS[:5])
            rows.append(backend.step(7).copy())
        assert np.array_equal(rows[-1], rows[-2])
    assert replayed.note is None
    assert not np.array_equal(rows[0], rows[2])
    assert np.array_equal(rows[0], rows[6])
    assert {graph_id for graph_id, how in fake.runs if how == "recorded"} == {1, 2, 3}
    assert [graph_id for graph_id, how in fake.runs if how == "replayed"] == [1, 2, 3, 1]


@pytest.mark.gpu
def test_texts_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    pytest.importorskip("torch", reason="building a bundle needs PyTorch")
    from llama_export.build_options import BuildOptions
    from llama_export.pipeline import build
    from llama_export.runtime.bundle import open_bundle
    from support.hf_models import write_llama_folder

    model = str(write_llama_folder(tmp_path / "llama"))
    for precision in ("fp16", "int8", "int4"):
        folders = {target: tmp_path / f"{target}-{precision}" for target in ("cuda", "cpu")}
        for target, folder in folders.items():
            build(BuildOptions(model=model, target=target, output=folder, precision=precision, reference=False))
        try:
            ours = CudaBackend(open_bundle(folders["cuda"]))
        except LlamaExportError as error:
            pytest.skip(str(error))
        assert ours.note is None
        theirs = OnnxRuntimeBackend(open_bundle(folders["cpu"]))
        ids = [index * 7 % 250 for index in range(30)]
        for length in (20, 4):
            ours.rewind(0)
            theirs.rewind(0)
            pairs = [(ours.extend(ids[:length], 3), theirs.extend(ids[:length], 3))]
            pairs += [(ours.step(token).copy(), theirs.step(token).copy()) for token in ids[length:]]
            assert max(np.abs(found - expected).max() for found, expected in pairs) < 0.1
