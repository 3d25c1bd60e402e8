"""Writing texts: how they end, what is streamed, what is computed again, and whole models from a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime import GenerationOptions, Model, SamplingOptions, load
from llama_export.runtime.generate import Stream, TokenCache
from llama_export.runtime.text import Tokenizer
from support.fake_backend import FakeBackend
from support.tiny_bundle import BOS, EOS, TURN_END, byte_tokenizer, random_llama, write_bundle

TOKENIZER = Tokenizer(byte_tokenizer())


def tokens(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=False)


def stream(backend: FakeBackend, prompt: Sequence[int] = (1, 2, 3), **options: Any) -> Stream:
    return Stream(TokenCache(backend), TOKENIZER, prompt, GenerationOptions(**options), eos=(EOS, TURN_END))


def test_pieces_and_result() -> None:
    writing = stream(FakeBackend(3, [*tokens("Hé!"), TURN_END]))
    pieces = [(piece.text, len(piece.tokens)) for piece in writing]
    assert pieces == [("H", 1), ("é", 2), ("!", 1)]
    result = writing.result
    assert result.text == "Hé!"
    assert result.token_ids == (*tokens("Hé!"), TURN_END)
    assert (result.finish_reason, result.prompt_tokens, result.new_tokens, result.reused_tokens) == ("stop", 3, 5, 0)
    assert result.first_token_seconds is not None
    assert result.prefill_tokens_per_second == pytest.approx(3 / result.first_token_seconds)
    assert result.decode_tokens_per_second is not None
    assert result.decode_tokens_per_second > 0
    assert list(result.to_json())[:3] == ["text", "token_ids", "finish_reason"]


def finish(writing: Stream) -> tuple[str, str]:
    text = "".join(piece.text for piece in writing)
    assert text == writing.result.text
    return text, writing.result.finish_reason


def test_ends() -> None:
    assert finish(stream(FakeBackend(3, tokens("abcdef")), max_new_tokens=4)) == ("abcd", "length")
    assert finish(stream(FakeBackend(3, tokens("abcdef"), capacity=5))) == ("abc", "context")
    assert finish(stream(FakeBackend(3, tokens("abcdef"), capacity=3))) == ("a", "context")
    assert finish(stream(FakeBackend(3, tokens("abcdef")), stop=("cd",))) == ("ab", "stop_string")
    assert finish(stream(FakeBackend(3, tokens("abcdef")), max_new_tokens=3, stop=("cd",))) == ("abc", "length")
    assert finish(stream(FakeBackend(3, [*tokens("ab"), EOS, *tokens("c")]), max_new_tokens=4, ignore_eos=True)) == (
        "abc",
        "length",
    )
    assert finish(stream(FakeBackend(3, [EOS]))) == ("", "stop")
    assert finish(stream(FakeBackend(3, tokens("é")), max_new_tokens=1)) == ("�", "length")


def test_one_token_has_no_decode_rate() -> None:
    writing = stream(FakeBackend(3, [EOS]))
    finish(writing)
    assert writing.result.decode_tokens_per_second is None


def test_time_between_pieces_is_the_callers() -> None:
    import time

    writing = stream(FakeBackend(3, tokens("abcdefgh")), max_new_tokens=8)
    for _ in writing:
        time.sleep(0.01)
    rate = writing.result.decode_tokens_per_second
    assert rate is not None
    assert rate > 500, "eight pauses of 10 ms would leave less than 100 a second"


def test_stopping_early() -> None:
    writing = stream(FakeBackend(3, tokens("abcdef")))
    assert [next(writing).text, next(writing).text] == ["a", "b"]
    with pytest.raises(LlamaExportError, match="still being written"):
        _ = writing.result
    result = writing.stop()
    assert (result.text, result.finish_reason, result.new_tokens) == ("ab", "interrupted", 2)
    assert list(writing) == []
    assert writing.stop() == result
    untouched = stream(FakeBackend(3, []))
    assert untouched.stop().new_tokens == 0


def test_a_finished_text_keeps_its_reason() -> None:
    writing = stream(FakeBackend(3, [EOS]))
    finish(writing)
    assert writing.stop().finish_reason == "stop"


def test_an_interrupt_inside_a_step_leaves_cache_and_text_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(3, tokens("abcdef"))
    cache = TokenCache(backend)
    writing = Stream(cache, TOKENIZER, [1, 2, 3], GenerationOptions(), eos=())
    next(writing)

    def interrupted(token: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(writing)
    monkeypatch.undo()
    assert writing.stop().text == "a"
    again = Stream(cache, TOKENIZER, [1, 2, 3, *tokens("ab")], GenerationOptions(max_new_tokens=1), eos=(), reuse=True)
    assert finish(again) == ("c", "length")
    assert again.result.reused_tokens == 3
    assert backend.computed == [3, 2]


def test_an_interrupt_inside_the_second_token_leaves_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    writing = stream(FakeBackend(3, tokens("abcdef")))
    next(writing)

    def interrupted(text: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing._stops, "push", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(writing)
    result = writing.stop()
    assert (result.text, result.new_tokens, result.decode_tokens_per_second) == ("a", 2, None)


def test_what_is_reused() -> None:
    backend = FakeBackend(5, tokens("xyz"))
    cache = TokenCache(backend)

    def ask(prompt: Sequence[int], *, reuse: bool) -> int:
        backend.prompt = len(prompt)
        writing = Stream(cache, TOKENIZER, prompt, GenerationOptions(max_new_tokens=3), eos=(), reuse=reuse)
        assert finish(writing) == ("xyz", "length")
        return writing.result.reused_tokens

    assert ask([1, 2, 3, 4, 5], reuse=True) == 0
    assert ask([1, 2, 3, 4, 5], reuse=True) == 4, "the last token is computed again, for its logits"
    assert ask([1, 2, 3, 4, 5, *tokens("xy"), 6, 7], reuse=True) == 7, "the answer's first two tokens are in the cache"
    assert ask([1, 2, 9], reuse=True) == 2
    assert ask([1, 2, 9], reuse=False) == 0
    assert backend.computed == [5, 1, 2, 1, 3]


def test_an_older_text_cannot_go_on() -> None:
    backend = FakeBackend(3, tokens("abc"))
    cache = TokenCache(backend)
    first, second = (Stream(cache, TOKENIZER, [1, 2, 3], GenerationOptions(), eos=()) for _ in range(2))
    next(first)
    next(second)
    with pytest.raises(LlamaExportError, match="begun another one"):
        next(first)
    assert next(second).text == "b"


def test_prompts_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        stream(FakeBackend(0, []), prompt=())
    with pytest.raises(UsageError, match=r"has 65 tokens, but the context of this bundle is 64; .*--context"):
        stream(FakeBackend(0, []), prompt=[1] * 65)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"stop": "ab"}, {"stop": ("",)}, {"stop": ("x",) * 65}, {"stop": ("x" * 1025,)}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        GenerationOptions(**options)


LLAMA = random_llama(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("generate") / "bundle", LLAMA).path


@pytest.fixture
def model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    pytest.importorskip("onnxruntime", reason="a bundle needs ONNX Runtime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return load(folder, threads=1)


def greedy(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(LLAMA.logits(ids)[-1])))
    return ids[len(prompt) :]


def test_a_bundle_writes_what_its_model_says(model: Model) -> None:
    prompt = [BOS, *tokens("Once upon a time")]
    result = model.generate("Once upon a time", GenerationOptions(max_new_tokens=12, ignore_eos=True))
    assert list(result.token_ids) == greedy(prompt, 12)
    assert result.prompt_tokens == len(prompt)
    assert model.generate(prompt, GenerationOptions(max_new_tokens=12, ignore_eos=True)).text == result.text
    assert result.load_seconds > 0


def test_a_seed_repeats_a_text(model: Model) -> None:
    options = GenerationOptions(20, SamplingOptions(temperature=1.5, top_k=40, seed=3), ignore_eos=True)
    first = model.generate("abc", options)
    assert model.generate("abc", options).token_ids == first.token_ids
    other = GenerationOptions(20, SamplingOptions(temperature=1.5, top_k=40, seed=4), ignore_eos=True)
    assert model.generate("abc", other).token_ids != first.token_ids


def test_ids_outside_the_vocabulary(model: Model) -> None:
    with pytest.raises(UsageError, match="from 0 to 260; the prompt has others"):
        model.stream([5, 261])


def test_a_conversation_computes_only_what_is_new_and_says_the_same(model: Model) -> None:
    options = GenerationOptions(max_new_tokens=5)
    talk = model.conversation("Be odd.")
    first = "".join(piece.text for piece in talk.say("a", options))
    second = talk.say("b", options)
    answer = "".join(piece.text for piece in second)
    assert second.result.reused_tokens > 10
    history = [
        {"role": "system", "content": "Be odd."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "b"},
    ]
    assert list(talk.end_turn()) == [*history, {"role": "assistant", "content": answer}]
    fresh = model.chat(history, options)
    assert fresh.reused_tokens == 0
    assert fresh.text == answer
    rendered = model.chat_template.render(history)
    assert rendered.startswith("<s>[system]Be odd.<|end|>[user]a<|end|>")
    assert fresh.prompt_tokens == len(tokens(rendered)), "the template has written BOS: it is not added again"


def test_a_conversation_keeps_an_unfinished_answer_and_survives_errors(model: Model) -> None:
    talk = model.conversation()
    next(talk.say("a", GenerationOptions(ignore_eos=True)))
    messages = talk.end_turn()
    assert [message["role"] for message in messages] == ["user", "assistant"]
    with pytest.raises(UsageError, match="context"):
        talk.say("x" * 100)
    assert talk.end_turn() == messages
    talk.say("b")
    talk.reset()
    assert talk.end_turn() == ()


def test_a_model_tells_what_it_runs_on(model: Model) -> None:
    assert model.backend_name.startswith("onnxruntime ")
    assert (model.threads, model.capacity, model.vocab) == (1, 64, LLAMA.vocab)


def test_loading_reports_damage_and_old_python(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = write_bundle(tmp_path / "a", LLAMA, minimum={"python": "9.9"})
    with pytest.raises(LlamaExportError, match=r"needs Python 9\.9 or newer"):
        load(bundle.path)
    bundle = write_bundle(tmp_path / "b", LLAMA)
    data = bytearray((tmp_path / "b" / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / "model.onnx.data").write_bytes(data)
    with pytest.raises(LlamaExportError, match=r"model\.onnx\.data is damaged"):
        load(bundle.path)


def test_errors_of_the_backend_and_of_the_tokenizer_reach_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="threads must be"):
        load(write_bundle(tmp_path / "a", LLAMA).path, threads=-1)
    broken = write_bundle(tmp_path / "b", LLAMA, extra={"tokenizer.json": b"{}"})
    with pytest.raises(LlamaExportError, match="not a tokenizer"):
        load(broken.path, threads=1)
