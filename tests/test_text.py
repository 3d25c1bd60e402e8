"""Tokens to text and back: streamed pieces equal the whole, characters stay whole, stop strings stay hidden."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime.bundle import Tokens
from llama_export.runtime.text import StopStrings, StreamDecoder, Tokenizer
from support.tiny_bundle import BOS, SPECIAL, byte_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Inner

NATURAL = "Größe 東京 Привет 🙂👩‍👩‍👧 नमस्ते  two spaces\n\ttab � end"


def sentencepiece_like(*, metaspace: bool = False) -> Tokenizer:
    """A tokenizer with byte fallback and ▁ for spaces, as Llama 2's; `metaspace`: with the other decoder in use."""
    words = ["▁", "▁He", "llo", "▁▁", "a", "▁a", "東", "o", "\n", "▁🙂"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocab |= {word: len(vocab) + index for index, word in enumerate(words)}
    inner = Inner(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    other: list[Any] = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(other if metaspace else plain)
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return Tokenizer(inner)


TOKENIZERS = {
    "byte level": lambda: Tokenizer(byte_tokenizer()),
    "byte fallback": sentencepiece_like,
    "metaspace": lambda: sentencepiece_like(metaspace=True),
}


def pieces(tokenizer: Tokenizer, ids: list[int], context: tuple[int, ...] = ()) -> list[str]:
    decoder = StreamDecoder(tokenizer, context)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_text_equal_the_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(NATURAL, special=False)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids) == NATURAL
    assert sum(map(bool, parts)) > 10, "text must come out on the way, not only at the end"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(60))
def test_pieces_of_any_tokens_equal_the_whole(name: str, seed: int) -> None:
    tokenizer = TOKENIZERS[name]()
    rng = random.Random(seed)
    size = tokenizer._inner.get_vocab_size()
    ids = [
        rng.randrange(size) if rng.random() < 0.7 else size - 1 - rng.randrange(10) for _ in range(rng.randrange(60))
    ]
    ids = [rng.choice(tokenizer.encode(NATURAL)) if rng.random() < 0.5 else token for token in ids]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_piece_is_whole_characters(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = "a🙂b東c👩‍👩‍👧é"
    assert not any("�" in piece for piece in pieces(tokenizer, tokenizer.encode(text, special=False)))


def test_an_unfinished_character_comes_at_the_end() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    ids = tokenizer.encode("a🙂", special=False)[:-1]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "�"]


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = sentencepiece_like()
    prompt, answer = tokenizer.encode("Hello"), tokenizer.encode("a")
    assert "".join(pieces(tokenizer, answer)) == "a"
    assert "".join(pieces(tokenizer, answer, tuple(prompt))) == " a"


def test_a_context_that_ends_inside_a_character() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    ids = tokenizer.encode("ab🙂c", special=False)
    assert "".join(pieces(tokenizer, ids[4:], tuple(ids[:4]))) == "🙂c"


def test_bos_comes_from_the_file_and_special_text_is_recognised() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    assert tokenizer.encode("</s>") == [BOS, BOS + 1]
    assert tokenizer.encode("</s>", special=False) == [BOS + 1]
    assert tokenizer.decode([BOS, *tokenizer.encode("x", special=False), BOS + 1]) == "x"


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    inner = byte_tokenizer(bos=False)
    inner.enable_truncation(3)
    inner.enable_padding(length=9, pad_token=SPECIAL[1])
    assert len(Tokenizer(inner).encode("hello")) == 5


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        Tokenizer(byte_tokenizer()).encode("a\udce9")


def test_loading_checks_bos_against_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer(bos=True).save(str(path))
    assert Tokenizer.load(path, Tokens(BOS, (), None, add_bos=True)).encode("") == [BOS]
    with pytest.raises(LlamaExportError, match=r"do not begin with the BOS token, but tokenizer\.json does put"):
        Tokenizer.load(path, Tokens(BOS, (), None, add_bos=False))
    byte_tokenizer(bos=False).save(str(path))
    with pytest.raises(LlamaExportError, match=r"do begin with the BOS token, but tokenizer\.json does not put"):
        Tokenizer.load(path, Tokens(BOS, (), None, add_bos=True))


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(LlamaExportError, match="not a tokenizer that can be read"):
        Tokenizer.load(tmp_path / "tokenizer.json", Tokens(None, (), None, add_bos=False))


def test_stop_string_over_several_pieces() -> None:
    stops = StopStrings(["###", "\nUser:"])
    assert [stops.push(text) for text in ("Hi #", "# th", "ere\nUs", "er", ": x", "more")] == [
        "Hi ",
        "## th",
        "ere",
        "",
        "",
        "",
    ]
    assert stops.found == "\nUser:"


def test_the_earliest_stop_string_counts() -> None:
    stops = StopStrings(["later", "er"])
    assert stops.push("go on later") == "go on "
    assert stops.found == "later"


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    stops = StopStrings(["abcd"])
    assert stops.push("xabc") == "x"
    assert stops.push("ab") == "abc"
    assert stops.flush() == "ab"
    assert stops.found is None


@pytest.mark.parametrize("seed", range(30))
def test_any_cutting_finds_the_same_stop(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(40))
    stop = "".join(rng.choice("ab") for _ in range(5))
    finder, shown, at = StopStrings([stop]), "", 0
    while at < len(text):
        size = rng.randrange(1, 4)
        shown += finder.push(text[at : at + size])
        at += size
    shown += finder.flush()
    assert shown == text.split(stop)[0]
    assert (finder.found is not None) == (stop in text)


def test_no_stop_strings_let_everything_through() -> None:
    stops = StopStrings([])
    assert stops.push("anything") == "anything"
    assert stops.flush() == ""
