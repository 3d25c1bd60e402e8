"""tokenizer.json, tokenizer_config.json and chat_template.jinja out of a GGUF file's metadata.

Metadata keys: ggml's docs/gguf.md. What each pre-tokenizer name and each default means is llama.cpp's
(src/llama-vocab.cpp), which gave the names their meaning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...errors import LlamaExportError, did_you_mean
from .config import GGUF_EMBEDDING, count, token_id
from .file import GgufFile

_PREFIX = "tokenizer.ggml."
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Token of tokenizer_config.json -> token of the metadata."""

_SPACE = "▁"  # what sentencepiece writes for a space
_LONGEST = 1024
"""Characters of a sentencepiece token, whose every split is looked at; training makes 16 at most by default."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


class _Type(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Pre:
    """How a byte-level BPE splits text into words.

    splits: regular expressions, each applied to the pieces that the one before left.
    whole_words: a word that is a token is taken as it is, whatever the merges would make of it.
    adds_bos: whether a text begins with the BOS token where the file does not say.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


_LLAMA3_PRE = _Pre((_LLAMA3,), whole_words=True, adds_bos=True)
_DIGITS_PRE = _Pre((r"\p{N}", _GPT2))
_QWEN2_PRE = _Pre((_QWEN2,))
_PRE_TOKENIZERS = {
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Pre((_GPT2,)),
    "mellum": _Pre((_GPT2,)),
    "smollm": _DIGITS_PRE,
    "starcoder": _DIGITS_PRE,
    "minerva-7b": _DIGITS_PRE,
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "falcon3": _LLAMA3_PRE,
    "smaug-bpe": _Pre((_LLAMA3,)),
    "tekken": _Pre((_TEKKEN,), whole_words=True, adds_bos=True),
    "qwen2": _QWEN2_PRE,
    "deepseek-r1-qwen": _QWEN2_PRE,
    "megrez": _QWEN2_PRE,
    "stablelm2": _QWEN2_PRE,
    "seed-coder": _Pre((_SEED_CODER,)),
    "deepseek-coder": _Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}
"""Of the byte-level BPE tokenizers that come with models of the llama architecture."""


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by id, each once; types: values of _Type, one a token."""

    file: GgufFile
    tokens: Sequence[str]
    types: Sequence[int]

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def of_type(self, *kinds: _Type) -> list[int]:
        return [index for index, kind in enumerate(self.types) if kind in kinds]


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """Return tokenizer.json, tokenizer_config.json and, where the file has a template, chat_template.jinja.

    Raises LlamaExportError when the metadata hold no tokenizer, one of a kind that is not supported, or a damaged one.
    """
    kind = file.metadata.get(_PREFIX + "model")
    if kind not in _BUILDERS:
        raise LlamaExportError(
            f"The GGUF file {file.path} has a tokenizer of the kind {kind!r}, and only {', '.join(_BUILDERS)} are "
            "supported; choose another conversion of the model."
        )
    vocabulary = _vocabulary(file)
    tokenizer, adds_bos = _BUILDERS[kind](vocabulary)
    _add_special_tokens(tokenizer, vocabulary)
    _add_template(tokenizer, vocabulary, adds_bos)
    config = _tokenizer_config(vocabulary)
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
        config["chat_template"] = template  # where readers older than chat_template.jinja look
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files


def _bad(file: GgufFile, why: str) -> LlamaExportError:
    return LlamaExportError(
        f"The GGUF file {file.path} has a damaged tokenizer: {why}; fetch the file again or choose another conversion."
    )


def _vocabulary(file: GgufFile) -> _Vocabulary:
    # llama.cpp's name for an empty token, which no vocabulary could hold twice.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(_strings(file, "tokens"))]
    if len(set(tokens)) != len(tokens):
        raise _bad(file, "a token appears twice")
    rows = file.tensors[GGUF_EMBEDDING].shape[0]
    if len(tokens) > rows:
        raise _bad(file, f"it has {len(tokens)} tokens, but {GGUF_EMBEDDING} has only {rows} rows")
    types = (_Type.NORMAL,) * len(tokens)
    if _PREFIX + "token_type" in file.metadata:
        types = _numbers(file, "token_type", len(tokens))
    return _Vocabulary(file, tokens, types)


def _strings(file: GgufFile, name: str) -> tuple[str, ...]:
    value = file.metadata.get(_PREFIX + name)
    if not isinstance(value, tuple) or not value or not isinstance(value[0], str):
        raise _bad(file, f"{_PREFIX}{name} is not a list of strings")
    return value


def _numbers(file: GgufFile, name: str, tokens: int) -> tuple[Any, ...]:
    value = file.metadata.get(_PREFIX + name)
    if not isinstance(value, tuple) or len(value) != tokens or not isinstance(value[0], (int, float)):
        raise _bad(file, f"{_PREFIX}{name} must have one number for each of the {tokens} tokens")
    return value


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Build a byte-level BPE (`gpt2`) from tokens and merges; returns it and whether it adds BOS by default."""
    file = vocabulary.file
    name = file.metadata.get(_PREFIX + "pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise LlamaExportError(
            f"The GGUF file {file.path} has the pre-tokenizer {name!r}, and only {', '.join(_PRE_TOKENIZERS)} are "
            "supported; choose another conversion of the model." + did_you_mean(str(name), _PRE_TOKENIZERS)
        )
    pre = _PRE_TOKENIZERS[name]
    model = _bpe(file, vocabulary.ids, _merges(file), ignore_merges=pre.whole_words)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.adds_bos


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(file, "merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return merges


def _bpe(file: GgufFile, ids: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise _bad(file, f"the merge of {left!r} and {right!r} is not made of tokens")
    return models.BPE(ids, merges, **options)


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Build sentencepiece's BPE (`llama`), the way Hugging Face's tokenizer.json of Llama 2 does.

    Text is one word in which a space is "▁"; characters that are no tokens become tokens of their UTF-8 bytes.
    """
    file = vocabulary.file
    ids = vocabulary.ids
    unknown = vocabulary.of_type(_Type.UNKNOWN)
    model = _bpe(
        file,
        ids,
        _merges(file) if _PREFIX + "merges" in file.metadata else _merges_from_scores(vocabulary),
        unk_token=vocabulary.tokens[unknown[0]] if unknown else None,
        fuse_unk=True,
        byte_fallback=bool(vocabulary.of_type(_Type.BYTE)),
    )
    tokenizer = Tokenizer(model)
    prefix = _flag(file, "add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return the merges that sentencepiece's BPE makes with its scores, the first to make first.

    Sentencepiece joins, anywhere in the text, the two neighbours that make the token with the highest score. So every
    split of a token into two tokens is a merge with that token's rank. Tokens of equal scores (some converters write
    the same for all) rank by id, the order in which training made them; runs of spaces, which it did not make, last.
    """
    scores = _numbers(vocabulary.file, "scores", len(vocabulary.tokens))
    normal = vocabulary.of_type(_Type.NORMAL)
    known = {vocabulary.tokens[index] for index in normal}
    order = sorted(normal, key=lambda index: (-scores[index], not vocabulary.tokens[index].strip(_SPACE), index))
    merges: list[tuple[str, str]] = []
    for token in (vocabulary.tokens[index] for index in order):
        if len(token) > _LONGEST:
            raise _bad(vocabulary.file, f"a token has {len(token)} characters, more than any that is trained")
        splits = ((token[:at], token[at:]) for at in range(len(token) - 1, 0, -1))
        merges.extend((left, right) for left, right in splits if left in known and right in known)
    return merges


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Declare the tokens that are found in text before anything splits it; ids stay those of the vocabulary."""

    def added(index: int, special: bool) -> AddedToken:
        return AddedToken(vocabulary.tokens[index], normalized=False, special=special)

    tokenizer.add_special_tokens([added(index, True) for index in vocabulary.of_type(_Type.CONTROL, _Type.UNKNOWN)])
    tokenizer.add_tokens([added(index, False) for index in vocabulary.of_type(_Type.USER_DEFINED)])


def _add_template(tokenizer: Tokenizer, vocabulary: _Vocabulary, adds_bos: bool) -> None:
    """Make the tokenizer put BOS before and EOS after a text, as the metadata say."""
    adds = {
        "bos": _flag(vocabulary.file, "add_bos_token", adds_bos),
        "eos": _flag(vocabulary.file, "add_eos_token", False),
    }
    added = {role: token for role in adds if adds[role] and (token := _special(vocabulary, role)) is not None}
    if not added:
        return
    # The template's syntax reserves ":" and "$"; a token with one of them goes by its role.
    names = {role: role if ":" in token or "$" in token else token for role, token in added.items()}
    first, second = (
        [f"{part}:{text}" for part in (names.get("bos"), sequence, names.get("eos")) if part is not None]
        for text, sequence in enumerate(("$A", "$B"))
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=first,
        pair=first + second,
        special_tokens=[
            {"id": names[role], "ids": [vocabulary.tokens.index(token)], "tokens": [token]}
            for role, token in added.items()
        ],
    )


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    value = file.metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise _bad(file, f"{_PREFIX}{name} is {value!r} instead of true or false")
    return value


def _special(vocabulary: _Vocabulary, role: str) -> str | None:
    """Return the text of the token that the metadata call bos, eos, unknown or padding; None when there is none."""
    index = token_id(vocabulary.file, role)
    return None if index is None else vocabulary.tokens[index]


def _tokenizer_config(vocabulary: _Vocabulary) -> dict[str, Any]:
    specials = {f"{name}_token": _special(vocabulary, role) for name, role in _ROLES.items()}
    return {
        **{name: token for name, token in specials.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": count(vocabulary.file, "llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
