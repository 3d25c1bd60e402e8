"""Which references a bundle is compared with: its own, or those that the user gives, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import LlamaExportError, UsageError, did_you_mean
from ..bundle import Bundle, reference_file
from ..text import Tokenizer
from .reference import EXACT, KINDS, ORIGINAL, Index, Prompt, Reference
from .reference_file import BUILD_AGAIN, load, load_of_bundle
from .ways import Text

_TOKENIZER = "tokenizer.json"
_NO_OTHER = ", and an exact reference is of one bundle's weights, whatever --any-model says"


@dataclass(frozen=True)
class Proof:
    """References with the same token ids, of the model or of one adapter; either may be missing. other_ids: they are
    the original one's alone, as the exact one has others and is a proof of its own.
    """

    exact: Reference | None
    original: Reference | None
    other_ids: bool = False

    @property
    def main(self) -> Reference:
        """Whose prompts are replayed."""
        found = self.exact or self.original
        assert found is not None
        return found

    @property
    def adapter(self) -> str | None:
        return self.main.index.adapter

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.main.index.prompts

    @property
    def texts(self) -> tuple[Text, ...]:
        return tuple(Text(prompt.ids, prompt.prompt_tokens) for prompt in self.prompts)


@dataclass(frozen=True)
class _Given:
    """A reference, and where it is from: a user's file, or None for the bundle."""

    reference: Reference
    path: Path | None


def proofs_of(bundle: Bundle, files: Sequence[Path] = (), *, any_model: bool = False) -> tuple[Proof, ...]:
    """What the bundle is compared with: the model first, then each adapter that it has beside the weights.

    files: references in place of the bundle's own of the same kind and adapter. any_model: they may be of another
    checkpoint with the same tokenizer and vocabulary. Raises UsageError when a file is none for this bundle,
    LlamaExportError when a reference is damaged, or there is none of the model.
    """
    given = [_Given(load(path), path) for path in files]
    for one in given:
        _refuse_stranger(bundle, one, any_model)
    by_place: dict[tuple[str, str | None], _Given] = {}
    for one in given:
        place = (one.reference.index.kind, one.reference.index.adapter)
        if place in by_place:
            raise UsageError(
                f"{by_place[place].path} and {one.path} are both {place[0]} references of the same model; give one."
            )
        by_place[place] = one
    names = [None, *(adapter.name for adapter in bundle.manifest.choices)]
    for kind in KINDS:
        for name in names:
            if (kind, name) not in by_place and reference_file(kind, name) in bundle.manifest.files:
                own = _Given(load(bundle.path / reference_file(kind, name), BUILD_AGAIN), None)
                _refuse_stranger(bundle, own, any_model=False)
                by_place[kind, name] = own
    found = [proof for name in names for proof in _proofs(*(by_place.get((kind, name)) for kind in KINDS))]
    if not found:
        load_of_bundle(bundle.path, EXACT)  # raises, as there is none
    return tuple(found)


def unproven(bundle: Bundle, proofs: Sequence[Proof]) -> Iterator[str]:
    """What of the bundle no reference is about, sentences for people."""
    proven = {proof.adapter for proof in proofs}
    if None not in proven:
        yield "There is no reference of the model without an adapter, so nothing computed so is compared."
    for adapter in bundle.manifest.choices:
        if adapter.name not in proven:
            yield f"There is no reference of the adapter {adapter.name}, so nothing computed with it is compared."


def _proofs(exact: _Given | None, original: _Given | None) -> Iterator[Proof]:
    first, second = (one.reference if one is not None else None for one in (exact, original))
    if first is not None and second is not None and _ids(first.index) != _ids(second.index):
        yield Proof(first, None)
        yield Proof(None, second, other_ids=True)
    elif first is not None or second is not None:
        yield Proof(first, second)


def _ids(index: Index) -> tuple[tuple[int, ...], ...]:
    return tuple(prompt.ids for prompt in index.prompts)


def _refuse_stranger(bundle: Bundle, given: _Given, any_model: bool) -> None:
    """Raise unless the reference is one of this bundle."""
    for problem in _problems(bundle, given.reference.index, any_model):
        if given.path is None:
            raise LlamaExportError(f"The reference inside {bundle.path} {problem}; build the bundle again.")
        raise UsageError(
            f"{given.path} {problem}; make one with `llama-export reference -m MODEL --bundle {bundle.path} -o FILE`."
        )


def _problems(bundle: Bundle, index: Index, any_model: bool) -> Iterator[str]:
    """What is wrong, as the end of a sentence, with what costs least to find out first."""
    identity, shape, model = index.identity, bundle.manifest.shape, bundle.manifest.model
    if identity.vocab != shape.vocab:
        yield f"is of a vocabulary of {identity.vocab} entries, and {bundle.path} has {shape.vocab}"
    names = {adapter.name for adapter in bundle.manifest.choices}
    if index.adapter is not None and index.adapter not in names:
        told = did_you_mean(index.adapter, names).rstrip("?")
        yield f"is of the adapter {index.adapter!r}, which {bundle.path} does not have to choose{told and f' ({told})'}"
    if not (any_model and index.kind == ORIGINAL):
        if model.sha256 is not None and identity.model_sha256 != model.sha256:
            yield (
                f"is of another model, {index.model_id}, by its weights (SHA-256 {identity.model_sha256[:12]}..., "
                f"{model.id} has {model.sha256[:12]}...)"
                + (_NO_OTHER if index.kind == EXACT else "; --any-model allows another one with the same tokenizer")
            )
        for what in ("layers", "hidden", "heads", "kv_heads"):
            if getattr(identity, what) != getattr(shape, what):
                here = getattr(shape, what)
                yield f"is of a model with {what} {getattr(identity, what)}, and {bundle.path} has {here}"
        if identity.head_dim > shape.head_dim:
            yield f"is of a model with heads of {identity.head_dim}, and {bundle.path} has {shape.head_dim}"
    if index.precision not in (None, bundle.manifest.precision):
        yield f"is an exact reference for {index.precision}, and {bundle.path} is {bundle.manifest.precision}"
    for prompt in index.prompts:
        if len(prompt.ids) > bundle.manifest.limits.context:
            yield (
                f"has {len(prompt.ids)} tokens in {prompt.name!r}, and {bundle.path} has a context of "
                f"{bundle.manifest.limits.context}"
            )
    yield from _tokenizer_problems(bundle, index)


def _tokenizer_problems(bundle: Bundle, index: Index) -> Iterator[str]:
    """Another tokenizer.json will do where it gives the very tokens: some tools write the file anew."""
    record = bundle.manifest.files.get(_TOKENIZER)
    if record is None or record.sha256 == index.identity.tokenizer_sha256:
        return
    tokenizer = Tokenizer.load(bundle.file(_TOKENIZER), bundle.manifest.tokens)
    for prompt in index.prompts:
        wanted = list(prompt.ids[: prompt.prompt_tokens])
        found = (tokenizer.encode(prompt.text, special=special)[: len(wanted)] for special in (True, False))
        if wanted not in found:
            yield f"has another tokenizer than {bundle.path}, which gives other tokens for {prompt.name!r}"
            return
