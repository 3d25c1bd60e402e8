"""Which token ids begin, end and pad a text, out of the several files that say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..errors import LlamaExportError

if TYPE_CHECKING:
    from .source import Source


@dataclass(frozen=True)
class TokenIds:
    """bos: put before a text; eos: each of these ends one, the main one first; pad: None when there is none.

    add_bos: whether tokenizer.json puts bos before a text. It alone decides, as in transformers, which ignores the key
    add_bos_token of tokenizer_config.json when there is a tokenizer.json.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    add_bos: bool


def token_ids(source: Source) -> TokenIds:
    """Return the token ids of a checkpoint.

    generation_config.json counts more than config.json, as in transformers. The tokenizer's own eos ends a text too:
    many fine-tuned chat models name their end of turn only there. Padding that lies outside of the vocabulary (-1 in
    early Llamas) counts as none.
    Raises LlamaExportError when a file cannot be read or names an id that the vocabulary lacks.
    """
    tokenizer = _tokenizer(source)
    settings = source.json("tokenizer_config.json")
    vocab = int(source.config["vocab_size"])
    special = {key: _special_id(tokenizer, settings, key, vocab) for key in ("bos_token", "eos_token", "pad_token")}
    files = {"generation_config.json": source.json("generation_config.json"), "config.json": source.config}
    bos = (
        special["bos_token"]
        if special["bos_token"] is not None
        else next(iter(_ids(files, "bos_token_id", vocab)), None)
    )
    eos = [*_ids(files, "eos_token_id", vocab), *([] if special["eos_token"] is None else [special["eos_token"]])]
    pads = [special["pad_token"], *(values.get("pad_token_id") for values in files.values())]
    return TokenIds(
        bos=bos,
        eos=tuple(dict.fromkeys(eos)),
        pad=next((pad for pad in pads if type(pad) is int and 0 <= pad < vocab), None),
        add_bos=bos is not None and tokenizer.encode("a").ids[:1] == [bos],
    )


def _tokenizer(source: Source) -> Tokenizer:
    if "tokenizer.json" not in source.files:
        raise LlamaExportError(f"{source.model_id} has no tokenizer.json, which the bundle needs.")
    try:
        return Tokenizer.from_str(source.content("tokenizer.json").decode())
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise LlamaExportError(
            f"The tokenizer.json of {source.model_id} cannot be read ({reason}); copy or download it again."
        ) from error


def _special_id(tokenizer: Tokenizer, settings: Mapping[str, Any], key: str, vocab: int) -> int | None:
    token = settings.get(key)
    if isinstance(token, Mapping):  # a saved AddedToken
        token = token.get("content")
    if not isinstance(token, str) or token.encode(errors="ignore").decode() != token:  # JSON allows half characters
        return None
    found = tokenizer.token_to_id(token)
    return found if found is not None and found < vocab else None


def _ids(files: Mapping[str, Mapping[str, Any]], key: str, vocab: int) -> list[int]:
    """Return the id or ids of `key` in the first file that has them."""
    for file, values in files.items():
        value = values.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for item in ids:
            if type(item) is not int or not 0 <= item < vocab:
                raise LlamaExportError(
                    f"{file} says {key} is {json.dumps(value)}, but ids below vocab_size ({vocab}) are expected; "
                    "correct the file."
                )
        return ids
    return []
