"""What references record: the built-in texts in any context, and a user's own file with whatever may be wrong in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_export.errors import LlamaExportError
from llama_export.export.prompts import Asked, built_in_prompts, prompts_of_file, texts_of_file
from llama_export.export.source import Source, open_source
from support.hf_models import BOS, TURN, write_llama_folder
from tokenizers import Tokenizer

NAMES = ["short", "prose", "scripts", "code", "repeated", "chat", "long"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(write_llama_folder(tmp_path_factory.mktemp("model") / "llama")))


def test_the_built_in_set_covers_what_graphs_get_wrong(source: Source) -> None:
    found = {one.name: one for one in built_in_prompts(source, 4096)}
    assert list(found) == NAMES
    assert len(found["long"].ids) == 520  # beyond a prefill chunk of 512
    assert len(found["short"].ids) < 8
    assert all(len(found[name].ids) <= 32 for name in NAMES[:5])
    assert len(found["chat"].ids) <= 48
    assert found["chat"].text.startswith(f"{BOS}user: ")
    assert found["chat"].text.endswith(f"{TURN}assistant: ")
    assert {one.continuation for one in found.values()} == {16, 4}
    assert sum(len(one.ids) + one.continuation for one in found.values()) < 830
    tokenizer = Tokenizer.from_str(source.content("tokenizer.json").decode())
    assert tokenizer.encode(found["prose"].text).ids[:32] == list(found["prose"].ids)


def test_the_long_text_is_long_for_any_tokenizer(source: Source) -> None:
    (text,) = [one.text for one in built_in_prompts(source, 4096) if one.name == "long"]
    assert len(text) > 520 * 5  # tokens of large vocabularies have some four characters
    assert text.isascii()


@pytest.mark.parametrize("context", [1, 2, 3, 5, 8, 20, 33, 64, 300])
def test_small_contexts_are_respected(source: Source, context: int) -> None:
    found = built_in_prompts(source, context)
    assert found
    for one in found:
        assert len(one.ids) >= 1
        assert len(one.ids) + one.continuation <= context
        assert one.continuation or context == 1
    assert len({one.ids for one in found}) == len(found)


def test_a_wish_for_more_greedy_text_is_heard(source: Source) -> None:
    assert {one.continuation for one in built_in_prompts(source, 256, 40)} == {40}


def test_without_a_chat_template_there_is_no_conversation(source: Source) -> None:
    files = {name: file for name, file in source.files.items() if name != "chat_template.jinja"}
    plain = source.with_other(files={**files, "tokenizer_config.json": b"{}"})
    assert [one.name for one in built_in_prompts(plain, 4096)] == [name for name in NAMES if name != "chat"]
    broken = source.with_other(files={**source.files, "chat_template.jinja": b"{{ raise_exception('no') }}"})
    assert "chat" not in [one.name for one in built_in_prompts(broken, 4096)]


def test_tokens_outside_of_the_vocabulary(source: Source) -> None:
    small = source.with_other(config={**source.config, "vocab_size": 5})
    del small.__dict__["shape"]
    with pytest.raises(LlamaExportError, match="do not belong together"):
        built_in_prompts(small, 64)


def of_file(
    source: Source, path: Path, content: str | bytes, name: str = "prompts.txt", context: int = 64
) -> list[Asked]:
    file = path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(prompts_of_file(source, file, context))


def test_a_prompt_on_each_line(source: Source, tmp_path: Path) -> None:
    one, other = of_file(source, tmp_path, "\ufeffOnce upon a time\r\nПривет 🙂")
    assert (one.name, one.text, one.continuation) == ("line 1", "Once upon a time", 16)
    assert (other.name, other.text) == ("line 2", "Привет 🙂")
    tokenizer = Tokenizer.from_str(source.content("tokenizer.json").decode())
    assert list(one.ids) == tokenizer.encode("Once upon a time").ids


def test_objects_on_each_line(source: Source, tmp_path: Path) -> None:
    lines = [{"name": "first", "text": "a\nb"}, {"messages": [{"role": "user", "content": "hello"}]}]
    content = "\n\n".join(map(json.dumps, lines))
    one, other = of_file(source, tmp_path, content, "prompts.JSONL")
    assert (one.name, one.text) == ("first", "a\nb")
    assert (other.name, other.text) == ("line 3", f"{BOS}user: hello{TURN}assistant: ")
    assert other.ids.count(0) == 1  # not another BOS before the template's


def test_a_prompt_may_fill_the_context(source: Source, tmp_path: Path) -> None:
    (asked,) = of_file(source, tmp_path, "a b c d e f g h")
    length = len(asked.ids)
    (full,) = of_file(source, tmp_path, "a b c d e f g h", context=length)
    assert (len(full.ids), full.continuation) == (length, 0)
    with pytest.raises(LlamaExportError, match=rf"{length} tokens, more than the context of {length - 1}"):
        of_file(source, tmp_path, "a b c d e f g h", context=length - 1)


WRONG: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("p.txt", "", "is empty"),
    "only space": ("p.jsonl", " \n\n", "is empty"),
    "an empty line": ("p.txt", "a\n\nb\n", "Line 2 of .* is an empty prompt"),
    "not UTF-8": ("p.txt", b"caf\xe9", "no UTF-8 text .byte 3"),
    "no JSON": ("p.jsonl", '{"text": "a"}\n{', "Line 2 of .* is no JSON"),
    "too deep": ("p.jsonl", "[" * 100_000, "Line 1 of .* is no JSON"),
    "a list": ("p.jsonl", "[1]", "must be an object"),
    "another key": ("p.jsonl", '{"prompt": "a"}', "must be an object with `text` or `messages`"),
    "neither": ("p.jsonl", '{"name": "a"}', "must have either"),
    "both": ("p.jsonl", '{"text": "a", "messages": []}', "must have either"),
    "an empty text": ("p.jsonl", '{"text": " "}', "empty prompt"),
    "a number": ("p.jsonl", '{"text": 5}', "empty prompt"),
    "a name that is none": ("p.jsonl", '{"text": "a", "name": 5}', "has the name 5"),
    "no messages": ("p.jsonl", '{"messages": []}', "no list of objects"),
    "messages that are texts": ("p.jsonl", '{"messages": ["a"]}', "no list of objects"),
    "half of a pair": ("p.jsonl", '{"text": "\\ud800"}', "surrogate pair"),
    "half of a pair in a name": ("p.jsonl", '{"text": "a", "name": "\\ud800"}', "surrogate pair"),
    "a name twice": ("p.jsonl", '{"text": "a", "name": "x"}\n{"text": "b", "name": "x"}', "two prompts 'x'"),
    "a message that the template refuses": ("p.jsonl", '{"messages": [{"role": "user"}]}', "chat template"),
    "too long": ("p.txt", "word " * 100, "more than the context of 64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_a_prompt_is_told(case: str, source: Source, tmp_path: Path) -> None:
    name, content, message = WRONG[case]
    with pytest.raises(LlamaExportError, match=message) as caught:
        of_file(source, tmp_path, content, name)
    assert "\n" not in str(caught.value)


def test_a_conversation_needs_a_template(source: Source, tmp_path: Path) -> None:
    files = {name: file for name, file in source.files.items() if name != "chat_template.jinja"}
    plain = source.with_other(files={**files, "tokenizer_config.json": b"{}"})
    with pytest.raises(LlamaExportError, match="no chat template"):
        of_file(plain, tmp_path, '{"messages": [{"role": "user", "content": "a"}]}', "p.jsonl")


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(LlamaExportError, match="--prompts takes a file") as caught:
        texts_of_file(tmp_path / name)
    assert caught.value.exit_code == 2


def test_a_file_larger_than_any(tmp_path: Path) -> None:
    with (tmp_path / "p.txt").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(LlamaExportError, match="more than 16 MB"):
        texts_of_file(tmp_path / "p.txt")
