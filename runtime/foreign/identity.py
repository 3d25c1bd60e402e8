"""Is a reference of the model that another tool exported? By sizes, and by what the tokenizer does: a tool that writes
tokenizer.json again changes its hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import LlamaExportError
from ..reference import Identity, Index, Prompt
from ..text import Tokenizer
from .folder import ForeignFolder

_MOST_TOKENIZER_BYTES = 100_000_000
_TOLD = 12


def check_reference(folder: ForeignFolder, index: Index) -> tuple[str, ...]:
    """Raise LlamaExportError, one sentence that names what differs, unless the reference can be of this model.

    Returns what could not be compared, sentences for people. No graph runs.
    """
    for what, found, expected in _sizes(folder, index.identity):
        raise LlamaExportError(
            f"The reference is of another model than {folder.path}: {index.model_id} has {expected} {what}, this "
            f"one has {found}; make one with `llama-export reference -m MODEL -o FILE`."
        )
    longest = max(len(prompt.ids) for prompt in index.prompts)
    if longest > folder.context:
        raise LlamaExportError(
            f"The reference has a text of {longest} tokens, but {folder.path} has a context of {folder.context}; make "
            f"one with --context {folder.context}."
        )
    if folder.tokenizer is None:
        return ("There is no tokenizer.json, so only the sizes tell that the reference is of this model.",)
    tokenizer = _load(folder.tokenizer)
    for prompt in index.prompts:
        _same_tokens(folder.tokenizer, tokenizer, prompt, index.model_id)
    return ()


def check_model(folder: ForeignFolder, identity: Identity, model_id: str) -> None:
    """Raise LlamaExportError where a checkpoint cannot be the one that was exported, as its sizes differ."""
    for what, found, expected in _sizes(folder, identity):
        raise LlamaExportError(
            f"{folder.path} was exported from another model than {model_id}, which has {expected} {what} where this "
            f"one has {found}; name the model that was exported."
        )


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
            f"The reference has another tokenizer than {path}: of {prompt.name!r} that makes "
            f"{special[at : at + _TOLD]} from token {at} on, {model}'s makes {want[at : at + _TOLD]}; make a reference "
            "of the model that was exported."
        )
