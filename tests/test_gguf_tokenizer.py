"""Tokenizers made out of GGUF metadata give the ids of the tokenizers that the metadata came from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from llama_export.errors import LlamaExportError
from llama_export.export.gguf.file import read_gguf
from llama_export.export.gguf.tokenizer import tokenizer_files
from support.gguf_models import sentencepiece, write_llama_gguf
from support.hf_models import CHAT_TEMPLATE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HARD = [
    "",
    " ",
    "Hello, world!",
    " two  leading   runs ",
    "   12345 6.7８９ ½ ² Ⅷ",
    "日本語テキスト 한국어 中文",
    "🙂🏽‍♂️ family",
    "I'll don't WE'VE they'Re",
    "\tx\r\n\n y\n",
    "naïve Größe e\u0301 ﬁ",
    "def f(x):\n\treturn x[1:]  # ok\n\n\nclass A: pass",
    "<|begin|>user: hi<|end|> <|turn|>",
    "<|begin>|end|>",
    "\x00\x7f\xa0\u2003z",
    "a" * 70 + " " * 70 + "=" * 70,
]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
ORIGINALS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), BYTES]),
}
"""What Hugging Face's tokenizer.json of GPT-2, SmolLM2 and Llama 3 have."""


def converted(path: Path, **options: Any) -> Tokenizer:
    files = tokenizer_files(read_gguf(write_llama_gguf(path / "model.gguf", **options)))
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def random_texts(alphabet: str, count: int, longest: int = 40) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(alphabet, k=generator.randrange(longest))) for _ in range(count)]


def trained(words: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[
            AddedToken(text, special=True, normalized=False) for text in ("<|begin|>", "<|end|>", "<|turn|>")
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*HARD, "I'll say they're here: 1998, 12, 365. " * 3, "naïve Größe 日本語 🙂" * 3], trainer
    )
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """Return the metadata that llama.cpp's converter would write for a byte-level BPE with three special tokens."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_tokenizers_give_the_ids_of_the_original(tmp_path: Path, pre: str) -> None:
    original = trained(ORIGINALS[pre])
    ours = converted(tmp_path, vocab=600, metadata=metadata_of(original, pre))
    assert ours.get_vocab() == original.get_vocab()
    for text in [*HARD, *random_texts("abI'l 12\n\r\té漢🙂.,-_<|end|>", 300)]:
        encoded = ours.encode(text)
        assert encoded.tokens == original.encode(text).tokens, text
        assert ours.decode(encoded.ids, skip_special_tokens=False) == text


SAMPLE = "I'LL go2 12345 HTTPServer's\n\n  (x)!!\n $9 aaBb"
WORDS = {
    "gpt-2": "I|'|LL| go|2| 12345| HTTPServer|'s|\n\n | (|x|)!!|\n| $|9| aaBb",
    "mellum": "I|'|LL| go|2| 12345| HTTPServer|'s|\n\n | (|x|)!!|\n| $|9| aaBb",
    "smollm": "I|'|LL| go|2| |1|2|3|4|5| HTTPServer|'s|\n\n | (|x|)!!|\n| $|9| aaBb",
    "llama-bpe": "I|'LL| go|2| |123|45| HTTPServer|'s|\n\n| | (|x|)!!\n| $|9| aaBb",
    "qwen2": "I|'LL| go|2| |1|2|3|4|5| HTTPServer|'s|\n\n| | (|x|)!!\n| $|9| aaBb",
    "tekken": "I|'LL| go|2| |1|2|3|4|5| HTTPServer|'s|\n\n| | (|x|)!!\n| $|9| aa|Bb",
    "seed-coder": "I|'LL| go|2| |1|2|3|4|5| HTTPServer|'s|\n\n| | (|x|)!!|\n| $|9| aaBb",
    "deepseek-coder": "I|'|LL| go|2| |1|2|3|4|5| HTTPServer|'|s|\n|\n| | (|x|)!!|\n| $|9| aaBb",
    "default": "I|'|LL| go|2| |123|45| HTTPServer|'|s|\n\n  |(|x|)!!|\n |$|9| aaBb",
}
"""Checked against llama.cpp, whose names they are."""

SAME = {
    "smollm": ("starcoder", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "smaug-bpe"),
    "qwen2": ("deepseek-r1-qwen", "megrez", "stablelm2"),
}


@pytest.mark.parametrize(
    ("pre", "words"), [*WORDS.items(), *((name, WORDS[like]) for like, names in SAME.items() for name in names)]
)
def test_words_of_each_pre_tokenizer(tmp_path: Path, pre: str, words: str) -> None:
    tokenizer = converted(tmp_path, metadata={"tokenizer.ggml.pre": pre})
    pieces = [SAMPLE[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(SAMPLE)]
    assert pieces == words.split("|")


def test_no_pre_tokenizer_means_the_default_one(tmp_path: Path) -> None:
    absent = converted(tmp_path, metadata={"tokenizer.ggml.pre": None}).to_str()
    assert absent == converted(tmp_path, metadata={"tokenizer.ggml.pre": "default"}).to_str()


@pytest.mark.parametrize(("pre", "ids"), [("llama-bpe", [4]), ("smaug-bpe", [0, 1, 2])])
def test_words_that_no_merge_makes(tmp_path: Path, pre: str, ids: list[int]) -> None:
    metadata = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b", "c", "bb", "abc"],
        "tokenizer.ggml.token_type": [1] * 5,
        "tokenizer.ggml.merges": ["b b"],
        "tokenizer.ggml.eot_token_id": None,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert converted(tmp_path, vocab=97, metadata=metadata).encode("abc").ids == ids


def greedy(text: str, scores: dict[str, float]) -> list[str]:
    """Sentencepiece's BPE by definition: join the neighbours that make the best token, the leftmost of equals."""
    pieces = list(text)
    while True:
        joined = [pieces[at] + pieces[at + 1] for at in range(len(pieces) - 1)]
        candidates = [(-scores[text], at) for at, text in enumerate(joined) if text in scores]
        if not candidates:
            return pieces
        _, at = min(candidates)
        pieces[at : at + 2] = [joined[at]]


def by_bytes(pieces: list[str], scores: dict[str, float]) -> list[str]:
    return [
        token
        for piece in pieces
        for token in ([piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()])
    ]


@pytest.mark.parametrize("seed", range(4))
def test_sentencepiece_merges_follow_the_scores(tmp_path: Path, seed: int) -> None:
    metadata = sentencepiece(500)
    pieces = metadata["tokenizer.ggml.tokens"][259:]
    ranks = random.Random(seed).sample(range(len(pieces)), len(pieces)) if seed else range(len(pieces))
    metadata["tokenizer.ggml.scores"][259:] = [-float(rank) for rank in ranks]
    scores = dict(zip(pieces, metadata["tokenizer.ggml.scores"][259:], strict=True))
    tokenizer = converted(
        tmp_path, tokenizer="llama", vocab=500, metadata={**metadata, "tokenizer.ggml.add_bos_token": False}
    )
    for text in ["the capital of the whale", *HARD[1:11], *random_texts("the of ain12 é🙂,", 200)]:
        expected = by_bytes(greedy("▁" + text.replace(" ", "▁"), scores), scores) if text else []
        encoded = tokenizer.encode(text)
        assert encoded.tokens == expected, text
        assert tokenizer.decode(encoded.ids) == text


def test_sentencepiece_tokens_of_one_score_merge_in_the_order_of_their_ids(tmp_path: Path) -> None:
    metadata = sentencepiece(500)
    ordered = converted(tmp_path, tokenizer="llama", vocab=500, metadata=metadata)
    equal = {**metadata, "tokenizer.ggml.scores": [-1000.0] * len(metadata["tokenizer.ggml.tokens"])}
    assert converted(tmp_path, tokenizer="llama", vocab=500, metadata=equal).to_str() == ordered.to_str()


def test_sentencepiece_runs_of_spaces_merge_last_among_equals(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁▁", "▁a", "▁", "a"],
        "tokenizer.ggml.scores": [0.0] * 7,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = converted(tmp_path, tokenizer="llama", vocab=400, metadata=metadata)
    assert tokenizer.encode(" a").tokens == ["▁", "▁a"]


def test_sentencepiece_without_bytes_or_prefix(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "aa"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = converted(tmp_path, tokenizer="llama", vocab=400, metadata=metadata)
    assert tokenizer.encode("aaa xyaa").tokens == ["<s>", "aa", "a", "▁", "<unk>", "aa"]
    assert tokenizer.decode([3, 5, 3]) == " aa "


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("gpt2", {"add_bos_token": True}, [0, "x"]),
        ("gpt2", {"add_bos_token": False}, ["x"]),
        ("gpt2", {"add_bos_token": None}, ["x"]),
        ("gpt2", {"add_bos_token": None, "pre": "llama-bpe"}, [0, "x"]),
        ("gpt2", {"add_bos_token": None, "pre": "llama-bpe", "bos_token_id": None}, ["x"]),
        ("gpt2", {"add_bos_token": False, "add_eos_token": True}, ["x", 1]),
        ("gpt2", {"add_bos_token": True, "add_eos_token": True}, [0, "x", 1]),
        ("gpt2", {"add_bos_token": True, "add_eos_token": True, "eos_token_id": 0}, [0, "x", 0]),
        ("llama", {"add_bos_token": None, "bos_token_id": None, "eos_token_id": None}, [1, "x"]),
        ("llama", {"add_bos_token": False}, ["x"]),
    ],
)
def test_bos_and_eos_around_a_text(tmp_path: Path, kind: str, flags: dict[str, Any], expected: list[Any]) -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    tokenizer = converted(tmp_path, tokenizer=kind, vocab=400, metadata=metadata)

    def filled(text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return [item for part in expected for item in (ids if part == "x" else [part])]

    assert tokenizer.encode("the whale").ids == filled("the whale")
    assert tokenizer.encode("the", "whale").ids == filled("the") + filled("whale")


def test_bos_with_the_characters_of_template_syntax(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<$a:0>", "<:b>", "$A", "a", "b", "ab"],
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
    }
    assert converted(tmp_path, vocab=97, metadata=metadata).encode("aab").ids == [0, 3, 5, 1]


def test_user_defined_tokens_are_found_in_text_and_kept_by_decoding(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<|x|>", "a", "b", "ab", "  ", "Ġ"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 4, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = converted(tmp_path, vocab=97, metadata=metadata)
    ids = tokenizer.encode("ab  a b<|x|>").ids
    assert ids == [5, 6, 3, 7, 4, 2]
    assert tokenizer.decode(ids) == "ab  a b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "ab  a b<|x|>"


def test_empty_tokens_keep_their_ids(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<s>", "", "", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [3, 5, 5, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": False,
    }
    assert converted(tmp_path, vocab=97, metadata=metadata).encode("aab").ids == [3, 5]


def test_settings_and_chat_template(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.unknown_token_id": 5, "tokenizer.ggml.padding_token_id": 1}
    files = tokenizer_files(read_gguf(write_llama_gguf(tmp_path / "model.gguf", metadata=metadata)))
    tokens = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert json.loads(files["tokenizer_config.json"]) == {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "unk_token": tokens.id_to_token(5),
        "pad_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    assert files["chat_template.jinja"].decode() == CHAT_TEMPLATE


def test_no_chat_template(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "model.gguf", metadata={"tokenizer.chat_template": None})
    files = tokenizer_files(read_gguf(path))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_loads_the_files(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    files = tokenizer_files(read_gguf(write_llama_gguf(tmp_path / "model.gguf", tokenizer=kind, vocab=420)))
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in [*HARD, "<s>the</s> whale"]:
        assert theirs(text).input_ids == ours.encode(text).ids
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False).endswith("user: hi<|turn|>")


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"model": "bert"}, "kind 'bert', and only gpt2, llama"),
        ({"model": [1, 2]}, r"kind \(1, 2\), and only gpt2, llama"),
        ({"model": None}, "kind None, and only gpt2, llama"),
        ({"pre": "llama-bp"}, r"pre-tokenizer 'llama-bp', and only .*smollm.* Did you mean 'llama-bpe'\?"),
        ({"pre": 3}, "pre-tokenizer 3, and only"),
        ({"pre": ["gpt-2"]}, r"pre-tokenizer \('gpt-2',\), and only"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is not a list"),
        ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens is not a list"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens is not a list"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is not a list"),
        ({"merges": ["a b", "nospace"]}, "merge of 'a' and 'b'|merge of 'nospace' and ''"),
        ({"merges": ["Ġ ŀŀŀ"]}, "merge of 'Ġ' and 'ŀŀŀ' is not made of tokens"),
        ({"token_type": [1, 2]}, r"token_type must have one number for each of the 320 tokens"),
        ({"token_type": "x"}, "token_type must have one number"),
        ({"add_bos_token": "yes"}, r"add_bos_token is 'yes' instead of true or false"),
        ({"bos_token_id": 999}, r"bos_token_id is 999"),
        ({"unknown_token_id": 999}, r"unknown_token_id is 999"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, metadata: dict[str, Any], why: str) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    file = read_gguf(write_llama_gguf(tmp_path / "model.gguf", metadata=keys))
    with pytest.raises(LlamaExportError, match=why) as caught:
        tokenizer_files(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokens": ["a", "b", "a"]}, "a token appears twice"),
        ({"tokens": [str(index) for index in range(98)]}, r"98 tokens, but token_embd\.weight has only 97 rows"),
    ],
)
def test_vocabularies_that_cannot_be(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    file = read_gguf(write_llama_gguf(tmp_path / "model.gguf", vocab=97, metadata=metadata))
    with pytest.raises(LlamaExportError, match=why):
        tokenizer_files(file)


@pytest.mark.parametrize("scores", [None, [0.0, 1.0], "x", ["x"] * 400])
def test_sentencepiece_needs_scores(tmp_path: Path, scores: object) -> None:
    metadata = {"tokenizer.ggml.scores": scores}
    with pytest.raises(LlamaExportError, match="scores must have one number for each"):
        converted(tmp_path, tokenizer="llama", vocab=400, metadata=metadata)


def test_a_sentencepiece_token_without_bounds_is_refused(tmp_path: Path) -> None:
    """Each of its splits is looked at: a token as long as a header may be would take days."""
    metadata = {
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b" * 2000],
        "tokenizer.ggml.scores": [0.0] * 5,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1],
    }
    with pytest.raises(LlamaExportError, match="a token has 2000 characters"):
        converted(tmp_path, tokenizer="llama", vocab=400, metadata=metadata)


SMOLLM2_IDS = [
    ("", []),
    ("Hello, world!", [19556, 28, 905, 17]),
    (" two  leading   runs ", [827, 216, 2899, 256, 7313, 216]),
    ("12345 6.7８９ ½", [33, 34, 35, 36, 37, 216, 38, 30, 39, 8083, 242, 8083, 243, 216, 16738]),
    ("日本語 한국어", [23274, 115, 40993, 179, 120, 248, 216, 33085, 246, 181, 130, 251, 183, 240, 129]),
    ("🙂🏽\u200d♂️", [10813, 38887, 10813, 233, 138, 321, 231, 34625, 220, 31752]),
    ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
    ("I'll don't WE'VE", [57, 3060, 1326, 982, 26587, 23, 18525]),
    ("\tx\r\n\n y", [197, 104, 201, 1116, 329]),
    ("naïve Größe", [3546, 46494, 9171, 7466, 34878, 85]),
    ("<|im_start>|im_end|>", [44, 108, 306, 79, 3738, 46, 108, 306, 79, 486, 108, 46]),
]
"""By the tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct."""


@pytest.mark.smollm2
def test_smollm2_gives_the_ids_of_its_own_tokenizer(smollm2_gguf: Path) -> None:
    files = tokenizer_files(read_gguf(smollm2_gguf))
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text, ids in SMOLLM2_IDS:
        encoded = tokenizer.encode(text)
        assert encoded.ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
