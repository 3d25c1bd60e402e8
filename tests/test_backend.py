"""The ONNX Runtime backend against the same model in NumPy: chunks, steps, rewinding, a cache never copied."""

from __future__ import annotations

import dataclasses
import errno
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.bundle import Bundle
from llama_export.runtime.cache import lazy_zeros
from llama_export.runtime.proof.replayers import GraphReplayer
from support.tiny_bundle import TinyLlama, random_llama, write_bundle

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


def test_a_changed_graph_finds_its_weights(bundle: Bundle) -> None:
    graph = bundle.file("model.onnx").read_bytes()
    close(OnnxRuntimeBackend(bundle, model=graph).extend(IDS)[0], EXPECTED[-1])


@pytest.fixture
def own_bundle(tmp_path: Path) -> Bundle:
    """To be damaged."""
    return write_bundle(tmp_path / "own", LLAMA)


LOADERS: dict[str, Callable[[Bundle, bytes], object]] = {
    "run": lambda bundle, graph: OnnxRuntimeBackend(bundle, model=graph, threads=1),
    "replay": lambda bundle, graph: GraphReplayer(bundle, graph, 1, exact=True),
}
"""Every way to load a graph: all make the same checks."""


@pytest.fixture(params=LOADERS)
def load(request: pytest.FixtureRequest) -> Callable[[Bundle, bytes], object]:
    return LOADERS[request.param]


def test_no_weight_is_read_from_outside_of_the_bundle(own_bundle: Bundle, load: Callable[..., object]) -> None:
    """ONNX Runtime 1.23 itself follows such a location."""
    graph, data = (own_bundle.file(name) for name in ("model.onnx", "model.onnx.data"))
    secret = own_bundle.path.parent / "aa.onnx.data"
    secret.write_bytes(data.read_bytes())
    elsewhere = graph.read_bytes().replace(b"model.onnx.data", b"../aa.onnx.data")
    with pytest.raises(LlamaExportError, match=r"'\.\./aa\.onnx\.data'.* but a bundle keeps its weights in"):
        load(own_bundle, elsewhere)
    data.unlink()
    with pytest.raises(LlamaExportError, match=r"does not fit its shape .* or the 0 bytes"):
        load(own_bundle, graph.read_bytes())
    data.symlink_to(secret)
    with pytest.raises(LlamaExportError, match="link that leads out of the bundle"):
        load(own_bundle, graph.read_bytes())


def test_a_graph_that_cannot_be_read(own_bundle: Bundle) -> None:
    with own_bundle.file("model.onnx").open("r+b") as file:
        file.truncate(257 << 20)
    with pytest.raises(LlamaExportError, match="larger than any graph"):
        OnnxRuntimeBackend(own_bundle)
    own_bundle.file("model.onnx").unlink()
    with pytest.raises(LlamaExportError, match=r"model\.onnx cannot be read: No such file"):
        OnnxRuntimeBackend(own_bundle)


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
def test_a_graph_that_does_not_fit_its_manifest(
    bundle: Bundle, load: Callable[[Bundle, bytes], object], changes: dict[str, int], message: str
) -> None:
    changed = with_manifest(bundle, shape=dataclasses.replace(bundle.manifest.shape, **changes))
    with pytest.raises(LlamaExportError, match=message):
        load(changed, bundle.file("model.onnx").read_bytes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minimum": {"python": "9.9"}}, r"needs Python 9\.9 or newer"),
        ({"minimum": {"onnxruntime": "99.1"}}, r"needs onnxruntime 99\.1 or newer, but here is .*; upgrade"),
        ({"providers": ("CUDAExecutionProvider",)}, r"needs CUDAExecutionProvider.*llama-export\[gpu\]"),
        ({"providers": ("MagicExecutionProvider",)}, "asks for MagicExecutionProvider, but only CPU"),
    ],
)
def test_what_cannot_run_here_says_so_before_it_is_loaded(
    bundle: Bundle, load: Callable[[Bundle, bytes], object], changes: dict[str, Any], message: str
) -> None:
    if "CUDA" in message:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(LlamaExportError, match=message):
        load(with_manifest(bundle, **changes), b"no graph")


def test_without_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(LlamaExportError, match=r'pip install "llama-export\[cpu\]"'):
        OnnxRuntimeBackend(bundle)


def test_a_broken_onnxruntime_sends_to_the_doctor(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(LlamaExportError, match=r"does not work \(AttributeError: .*`llama-export doctor`"):
        OnnxRuntimeBackend(bundle)


@pytest.mark.parametrize("graph", [b"", b"not a graph", b"\x08\x0a"])
def test_a_graph_that_is_none(bundle: Bundle, graph: bytes) -> None:
    with pytest.raises(LlamaExportError, match=r"cannot load the model|model\.onnx is damaged") as caught:
        OnnxRuntimeBackend(bundle, model=graph)
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


def test_a_kernel_without_huge_pages_is_not_told_to_avoid_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("llama_export.runtime.cache.mmap.mmap", Memory)
    monkeypatch.setattr(mmap, "MADV_NOHUGEPAGE", 15, raising=False)
    assert lazy_zeros((3, 5), np.float32).shape == (3, 5)


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
