"""How many tokens fit: hand-counted sizes, the limits that decide, and the sentences that say so."""

import re
from dataclasses import dataclass, replace

import pytest
from llama_export.errors import UsageError
from llama_export.optimize.formats import format_named, stored_bytes
from llama_export.targets.context import (
    RUNTIME_BYTES,
    Load,
    bytes_per_token,
    choose_context,
    default_context,
    needed_bytes,
    workspace_bytes,
)
from llama_export.targets.devices import GB, Target, load_target


@dataclass(frozen=True)
class Shape:
    layers: int = 3
    hidden: int = 20
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 5
    ffn: int = 28
    vocab: int = 101


LLAMA_1B = Shape(layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab=128256)


def load_1b(**changes: object) -> Load:
    return replace(Load(LLAMA_1B, {"int4": 806_000_000}, "float32", on_cpu=True), **changes)


def with_memory(usable_gb: float) -> Target:
    return replace(load_target("cpu"), memory_gb=usable_gb + 2, reserve_gb=2)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 240), ("float16", 120)])
def test_a_token_leaves_keys_and_values_in_every_layer(dtype: str, expected: int) -> None:
    assert bytes_per_token(Shape(), dtype) == expected  # 2 * 3 layers * 2 KV heads * 5 * itemsize


def test_workspace_counts_the_chunk_and_on_the_cpu_the_scores() -> None:
    on_gpu = Load(Shape(), {}, "float16", on_cpu=False, batch=2, prefill_chunk=16)
    width = 3 * 28 + 4 * 20 + (6 + 4) * 5
    logits = 4 * 2 * 101
    assert workspace_bytes(on_gpu, 100) == 2 * 16 * width * 2 + logits
    on_cpu = replace(on_gpu, on_cpu=True)
    assert workspace_bytes(on_cpu, 100) - workspace_bytes(on_gpu, 100) == 2 * 6 * 16 * 100 * 4
    assert workspace_bytes(on_gpu, 7) == 2 * 7 * width * 2 + logits, "a context below the chunk has no larger chunks"


def test_weights_count_more_on_the_cpu_than_in_their_file() -> None:
    cpu, cuda = (needed_bytes(load_1b(on_cpu=on_cpu), 0) - RUNTIME_BYTES for on_cpu in (True, False))
    assert 1_276e6 < cpu < 1_300e6, "measured: 1,276 MB resident for 806 MB"
    assert 806e6 <= cuda < 807e6


def test_plain_weights_are_float32_in_memory_on_the_cpu() -> None:
    def weights(load: Load) -> int:
        return needed_bytes(load, 0) - needed_bytes(replace(load, weight_bytes={}), 0)

    halves = {"fp16": 1_000_000, "bf16": 500_000}
    assert weights(load_1b(weight_bytes=halves)) >= 2 * 1_500_000
    assert weights(load_1b(weight_bytes={**halves, "int8": 100_000})) == weights(load_1b(weight_bytes=halves)) + 160_000
    assert weights(load_1b(weight_bytes=halves, on_cpu=False)) == 1_500_000


def test_scales_in_float16_are_float32_in_memory_on_the_cpu() -> None:
    """The same weights take the same, however their scales are stored."""

    def weights(name: str) -> int:
        format = format_named(name)
        assert format is not None
        load = load_1b(weight_bytes={name: stored_bytes((1000, 2048), format)})
        return needed_bytes(load, 0) - needed_bytes(replace(load, weight_bytes={}), 0)

    for name in ("int4", "int4-zeros", "int8-b64", "int4-b16-offset"):
        assert weights(f"{name}-f16") == pytest.approx(weights(name), rel=1e-6)


def test_the_whole_context_is_chosen_where_it_fits_even_if_odd() -> None:
    choice = default_context(with_memory(2), Load(Shape(), {"fp32": 1000}, "float32", on_cpu=True), 1001)
    assert (choice.context, choice.warning) == (1001, None)
    assert "Context 1,001 tokens: all that the model knows" in choice.reason


def test_memory_bounds_the_context_to_a_multiple_of_256() -> None:
    target = with_memory(3)
    choice = default_context(target, load_1b(), 131_072)
    assert choice.context % 256 == 0
    assert needed_bytes(load_1b(), choice.context) <= 3 * GB < needed_bytes(load_1b(), choice.context + 256)
    assert re.search(r"Context [\d,]+ tokens of the model's 131,072: more does not fit the 3\.0 GB", choice.reason)
    assert choice.reason.endswith(".")


@pytest.mark.parametrize("change", [{"batch": 4}, {"weight_bytes": {"int4": 1_200_000_000}}])
def test_what_takes_more_leaves_fewer_tokens(change: dict[str, object]) -> None:
    target = with_memory(3)
    assert (
        default_context(target, load_1b(**change), 131_072).context
        < default_context(target, load_1b(), 131_072).context
    )


def test_a_float16_cache_on_a_gpu_holds_more_tokens() -> None:
    target = with_memory(3)
    on_gpu = load_1b(cache_dtype="float16", on_cpu=False)
    assert default_context(target, on_gpu, 131_072).context > 3 * default_context(target, load_1b(), 131_072).context


def test_a_requested_context_is_taken_as_it_is() -> None:
    choice = choose_context(with_memory(3), load_1b(), 131_072, 1000)
    assert (choice.context, choice.reason, choice.warning) == (1000, "Context 1,000 tokens, as asked for.", None)


def test_a_requested_context_beyond_memory_is_built_with_a_warning() -> None:
    choice = choose_context(with_memory(3), load_1b(), 131_072, 100_000)
    assert choice.context == 100_000
    assert choice.warning is not None
    assert re.search(r"100,000 tokens takes about 14\.\d GB, which is above the 3\.0 GB", choice.warning)


def test_a_requested_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--context 2049 .* 2,048 tokens .* give 2048 or less"):
        choose_context(with_memory(30), load_1b(), 2048, 2049)


def test_a_context_may_be_stretched_where_asked_for() -> None:
    target = with_memory(30)
    assert choose_context(target, load_1b(), 2048, 5000, 8192).context == 5000
    assert choose_context(target, load_1b(), 2048, None, 8192).context == 2048
    with pytest.raises(UsageError, match=r"--context 8193 is above the 8,192 tokens"):
        choose_context(target, load_1b(), 2048, 8193, 8192)


def test_an_assumed_memory_is_called_so() -> None:
    assert "(an assumption)" in default_context(load_target("cpu"), load_1b(), 131_072).reason
    assert "assumption" not in default_context(load_target("jetson-orin-nano-8gb"), load_1b(), 131_072).reason
