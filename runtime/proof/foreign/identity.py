"""Is a reference of the model that another tool exported? By sizes, and by what the tokenizer does: a tool that writes
tokenizer.json again changes its hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ....errors import LlamaExportError
from ...text import Tokenizer
from ..reference import Identity, Prompt
from .folder import ForeignFolder

_MOST_TOKENIZER_BYTES = 100_000_000
_TOLD = 12


def check_reference(
    folder: ForeignFolder, identity: Identity, prompts: Sequence[Prompt], model_id: str
) -> tuple[str, ...]:
    """Raise LlamaExportError, one sentence that names what differs, unless a reference of these facts can be of this
    model. identity, prompts, model_id: see `Index`.

    Returns what could not be compared, sentences for people. No graph runs.
    """
    for what, found, expected in _sizes(folder, identity):
        raise LlamaExportError(
            f"{folder.path} is of another model than {model_id}, which has {expected} {what} where it has "
            f"{found}; make a reference of the model that was exported with `llama-export reference -m MODEL -o FILE`."
        )
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest > folder.context:
        raise LlamaExportError(
            f"The reference has a text of {longest} tokens, but {folder.path} has a context of {folder.context}; make "
            f"one with --context {folder.context}."
        )
    if folder.tokenizer is None:
        return ("There is no tokenizer.json, so only the sizes tell that the reference is of this model.",)
    tokenizer = _load(folder.tokenizer)
    for prompt in prompts:
        _same_tokens(folder.tokenizer, tokenizer, prompt, model_id)
    return ()


def _sizes(folder: ForeignFolder, identity: Identity) -> Iterator[tuple[str, int, int]]:
    """The sizes that differ: their names, the folder's and the reference's."""
    pairs = (
        ("layers", folder.layers, identity.layers),
        ("heads of the cache", folder.kv_heads, identity.kv_heads),
        ("numbers in a head", folder.head_dim, identity.head_dim),
        ("vocabulary entries", folder.vocab, identity.vocab),
        ("heads", folder.heads, identity.heads),
        ("numbers in a hidden state", folder.hidden, identity.hidden),
    )
    for what, found, expected in pairs:
        if found is not None and found != expected:
            yield what, found, expected


def _load(path: Path) -> Tokenizer:
    size = path.stat().st_size
    if size > _MOST_TOKENIZER_BYTES:
        raise LlamaExportError(f"{path} has {size} bytes, more than any tokenizer needs; export it again.")
    return Tokenizer.from_file(path)


def _same_tokens(path: Path, tokenizer: Tokenizer, prompt: Prompt, model: str) -> None:
    """Raise LlamaExportError unless the tokenizer makes a prompt's tokens of its text.

    A template writes BOS out and the tokenizer may put it there too, or only one side does; prompts may be cut.
    """
    if not prompt.text:
        return
    want = list(prompt.ids[: prompt.prompt_tokens])
    special, plain = (tokenizer.encode(prompt.text, special=special) for special in (True, False))
    found = [special, plain, want[:1] + plain, special[1:]]
    if want not in [one[: len(want)] for one in found]:
        at = next((i for i, (one, other) in enumerate(zip(special, want, strict=False)) if one != other), len(special))
        raise LlamaExportError(
            f"{model} has another tokenizer than {path}: of {prompt.name!r} it makes {want[at : at + _TOLD]} from "
            f"token {at} on, where that makes {special[at : at + _TOLD]}; take the model that was exported."
        )
