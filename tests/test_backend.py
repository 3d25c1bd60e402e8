"""The ONNX Runtime backend against the same model in NumPy: chunks, steps, rewinding, a cache never copied."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.bundle import Bundle
from llama_export.runtime.cache import lazy_zeros

from .support.tiny_bundle import TinyLlama, random_llama, write_bundle

pytest.importorskip("onnxruntime", reason="the backend needs ONNX Runtime")

LLAMA = random_llama(3)
IDS = [int(token) for token in np.random.default_rng(5).integers(0, LLAMA.vocab, 40)]
EXPECTED = LLAMA.logits(IDS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle"), LLAMA)


@pytest.fixture
def backend(bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, threads=1)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, atol=2e-4)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 33])
def test_prefill_in_chunks_of_seven(backend: OnnxRuntimeBackend, count: int) -> None:
    close(backend.extend(IDS[:count]), EXPECTED[count - 1 : count])
    assert backend.length == count


@pytest.mark.parametrize(("count", "keep"), [(7, 7), (8, 2), (9, 3), (33, 33), (33, 12), (14, 7)])
def test_keeping_the_logits_of_several_positions(backend: OnnxRuntimeBackend, count: int, keep: int) -> None:
    close(backend.extend(IDS[:count], keep=keep), EXPECTED[count - keep : count])


def test_steps_after_a_prompt_and_after_several_logits(backend: OnnxRuntimeBackend) -> None:
    backend.extend(IDS[:10])
    for position in range(10, 15):
        close(backend.step(IDS[position]), EXPECTED[position])
    close(backend.extend(IDS[15:20], keep=5), EXPECTED[15:20])
    close(backend.step(IDS[20]), EXPECTED[20])


def test_rewinding_forgets_what_came_after(backend: OnnxRuntimeBackend) -> None:
    backend.extend([*IDS[:9], *reversed(IDS)])
    backend.rewind(9)
    close(backend.extend(IDS[9:30])[0], EXPECTED[29])
    backend.rewind(0)
    close(backend.extend(IDS[:2])[0], EXPECTED[1])


def test_logits_of_a_step_are_float32_and_of_extend_are_ours(backend: OnnxRuntimeBackend) -> None:
    first = backend.extend(IDS[:3])
    copy = first.copy()
    step = backend.step(IDS[3])
    assert first.dtype == step.dtype == np.float32
    assert step.shape == (LLAMA.vocab,)
    np.testing.assert_array_equal(first, copy)


def test_the_cache_is_written_in_place_and_only_where_it_is_valid(backend: OnnxRuntimeBackend) -> None:
    buffers = {name: value.data_ptr() for name, value in backend._cache.items()}
    backend.extend(IDS[:10])
    backend.step(IDS[10])
    assert buffers == {name: value.data_ptr() for name, value in backend._cache.items()}
    assert len(buffers) == 2 * LLAMA.layers
    for value in backend._cache.values():
        keys = value.numpy()
        assert keys.shape == (1, LLAMA.kv_heads, 64, LLAMA.head_dim)
        assert keys[:, :, :11].any(axis=(0, 1, 3)).all()
        assert not keys[:, :, 11:].any()


def test_an_interrupted_run_leaves_the_sequence_as_it_was(
    backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.extend(IDS[:10])
    run = backend._session.run_with_iobinding

    def interrupted(binding: Any) -> None:
        run(binding)
        raise KeyboardInterrupt

    monkeypatch.setattr(backend._session, "run_with_iobinding", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.extend([1, 2, 3], keep=2)
    monkeypatch.undo()
    assert backend.length == 10
    close(backend.step(IDS[10]), EXPECTED[10])


def test_the_context_is_a_wall(bundle: Bundle) -> None:
    backend = OnnxRuntimeBackend(bundle, threads=1, capacity=12)
    close(backend.extend(IDS[:12])[0], EXPECTED[11])
    with pytest.raises(UsageError, match="12 tokens and 1 more exceed the context of 12"):
        backend.step(1)
    backend.rewind(5)
    with pytest.raises(UsageError, match="5 tokens and 8 more"):
        backend.extend(IDS[:8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.extend([1, 261]), "from 0 to 260"),
        (lambda b: b.extend([-1]), "from 0 to 260"),
        (lambda b: b.step(261), "from 0 to 260, not 261"),
        (lambda b: b.extend([]), "keep must be from 1 to the number of tokens 0"),
        (lambda b: b.extend([1, 2], keep=3), "keep must be from 1 to the number of tokens 2"),
        (lambda b: b.rewind(1), "from 0 to 0, not 1"),
    ],
)
def test_wrong_arguments(backend: OnnxRuntimeBackend, call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(backend)
    assert backend.length == 0


def test_a_changed_graph_as_bytes_finds_its_weights(bundle: Bundle, tmp_path: Path) -> None:
    graph = bundle.file("model.onnx").read_bytes()
    close(OnnxRuntimeBackend(bundle, model=graph).extend(IDS)[0], EXPECTED[-1])
    elsewhere = tmp_path / "copy.onnx"
    elsewhere.write_bytes(graph)
    (tmp_path / "model.onnx.data").write_bytes(bundle.file("model.onnx.data").read_bytes())
    close(OnnxRuntimeBackend(bundle, model=elsewhere).extend(IDS)[0], EXPECTED[-1])


def with_manifest(bundle: Bundle, **changes: Any) -> Bundle:
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, r"past_key_values\.2\.key should be .* and is absent"),
        ({"layers": 1}, r"past_key_values\.1\.key should be absent and is"),
        ({"kv_heads": 3}, r"past_key_values\.0\.key should be \(None, 3, None, 16\) and is \['batch', 2"),
        ({"head_dim": 8}, r"past_key_values\.0\.key should be"),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest(bundle: Bundle, changes: dict[str, int], message: str) -> None:
    with pytest.raises(LlamaExportError, match=message):
        OnnxRuntimeBackend(with_manifest(bundle, shape=dataclasses.replace(bundle.manifest.shape, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dialect": "trt"}, "dialect 'ort', but this one is 'trt'"),
        ({"minimum": {"onnxruntime": "99.1"}}, r"needs onnxruntime 99\.1 or newer, but here is .*; upgrade"),
        ({"providers": ("CUDAExecutionProvider",)}, r"needs CUDAExecutionProvider.*llama-export\[gpu\]"),
        ({"providers": ("MagicExecutionProvider",)}, "asks for MagicExecutionProvider, but only CPU"),
    ],
)
def test_what_cannot_run_here_says_so(bundle: Bundle, changes: dict[str, Any], message: str) -> None:
    if "CUDA" in message:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(LlamaExportError, match=message):
        OnnxRuntimeBackend(with_manifest(bundle, **changes))


def test_without_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(LlamaExportError, match=r"pip install 'llama-export\[cpu\]'"):
        OnnxRuntimeBackend(bundle)


@pytest.mark.parametrize("graph", [b"", b"not a graph", b"\x08\x0a"])
def test_a_graph_that_is_none(bundle: Bundle, graph: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph)
    with pytest.raises(LlamaExportError, match="cannot load the model") as caught:
        OnnxRuntimeBackend(bundle, model=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"threads": 0}, {"threads": 5000}, {"capacity": 0}, {"capacity": 65}])
def test_settings_out_of_range(bundle: Bundle, changes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(changes))} must be from 1"):
        OnnxRuntimeBackend(bundle, **changes)


def test_name_and_threads(backend: OnnxRuntimeBackend) -> None:
    assert backend.name.startswith("onnxruntime 1.")
    assert backend.name.endswith(" cpu")
    assert backend.threads == 1


def test_a_cache_beyond_the_address_space_is_refused() -> None:
    with pytest.raises(LlamaExportError, match="smaller --context"):
        lazy_zeros((1 << 20, 1 << 20, 1 << 20), np.float32)


def test_a_large_cache_takes_no_memory_before_it_is_written() -> None:
    psutil = pytest.importorskip("psutil", reason="memory is measured with psutil")
    before = psutil.Process().memory_info().rss
    cache = lazy_zeros((1, 8, 65536, 64), np.float32)
    cache[0, :, :100] = 1
    assert cache.nbytes == 128 << 20
    assert psutil.Process().memory_info().rss - before < 8 << 20


def test_another_shape(tmp_path: Path) -> None:
    llama: TinyLlama = random_llama(9, layers=1, hidden=20, heads=3, kv_heads=3, head_dim=32, ffn=12, vocab=301)
    backend = OnnxRuntimeBackend(write_bundle(tmp_path, llama, prefill_chunk=512))
    close(backend.extend(IDS[:30])[0], llama.logits(IDS[:30])[-1])
