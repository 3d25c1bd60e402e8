"""PyTorch's side of an evaluation: the checkpoint that a bundle was made of, one layer in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from ..errors import LlamaExportError, UsageError
from ..optimize.plan import head_of
from ..optimize.tensors import Float32
from ..runtime.bundle import Manifest
from ..runtime.hashing import sha256_of
from .config import transformers_config
from .identity import model_sha256
from .layerwise import Layerwise, Parts, cuts
from .lora.merge import fitted, merged
from .lora.peft_folder import WEIGHTS, Adapter, read_adapter
from .source import Source

HEAD_BYTES = 512 << 20
"""A head of up to this many bytes in float32 stays in memory; a larger one is read again for each slice of logits."""


class OriginalModel:
    """transformers' layers in float32 on the checkpoint's own weights; an `evaluate.scoring.Original`.

    Beside one decoder layer it holds what the last layer left of the windows that were read, and the head where that
    is small (`HEAD_BYTES`).
    """

    def __init__(self, source: Source, context: int) -> None:
        """context: of the bundle, for which the frequencies of the dynamic rope type are fixed."""
        self._source = source
        self._model = Layerwise(transformers_config(source.config), source.tensors, context, self._parts)
        self._normed: list[torch.Tensor] = []
        self._head_parts: Sequence[tuple[int, torch.Tensor]] = ()

    def read(self, windows: Sequence[Sequence[int]], told: Callable[[float], None]) -> None:
        """See `Original.read`."""
        self._normed = []
        layers = self._source.shape.layers
        hidden = self._model.decoded(windows, lambda index, _: told(index / layers))
        self._normed = [self._model.normed(state[0]) for state in hidden]
        told(1.0)

    @torch.no_grad()
    def logits(self, window: int, start: int, stop: int) -> Float32:
        """See `Original.logits`."""
        rows = self._normed[window][start:stop]
        logits = np.empty((len(rows), self._source.shape.vocab), np.float32)
        for first, part in self._head():
            logits[:, first : first + len(part)] = (rows @ part.T).numpy()
        return logits

    def _head(self) -> Iterable[tuple[int, torch.Tensor]]:
        """The head's rows, a few at a time, each time with the number of the first."""
        name = head_of(self._source.tensors)
        parts = ((first, torch.from_numpy(np.ascontiguousarray(part))) for first, part in self._parts(name))
        if int(np.prod(self._source.tensors[name].shape)) * 4 > HEAD_BYTES:
            return parts
        if not self._head_parts:
            self._head_parts = tuple(parts)
        return self._head_parts

    def _parts(self, name: str) -> Parts:
        tensor = self._source.tensors[name]
        for start, stop in cuts(tensor):
            yield start, tensor.read(start, stop)


def open_original(
    source: Source, texts: Sequence[str], manifest: Manifest, chosen: str | None, *, any_model: bool
) -> tuple[OriginalModel, str]:
    """The checkpoint that a bundle was made of, with LoRA adapters merged into its weights, and its `model_sha256`.

    texts: the adapters' folders, each with `:weight` or without. chosen: the adapter beside the bundle's weights that
    is evaluated. any_model: take another model or other adapters, as long as the vocabulary is as large.
    Raises UsageError when the adapters are not those that the bundle computes with, LlamaExportError when the model is
    another one or an adapter cannot be read or does not fit.
    """
    _check_sizes(source, manifest, ("vocab",) if any_model else _SIZES)
    adapters: Sequence[Adapter] = [fitted(read_adapter(text), source.model_id, source.tensors) for text in texts]
    if not any_model:
        adapters = _checked_adapters(adapters, manifest, chosen)
        _check_identity(source, adapters, manifest)
    sha256 = model_sha256(source, adapters)
    return OriginalModel(source.with_other(tensors=merged(source.tensors, adapters)), manifest.limits.context), sha256


_SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")


def _check_sizes(source: Source, manifest: Manifest, names: Sequence[str]) -> None:
    """What the hash of the model would tell as well, in words that say more."""
    for name in names:
        found, recorded = getattr(source.shape, name), getattr(manifest.shape, name)
        if found != recorded:
            raise LlamaExportError(
                f"{source.model_id} is not what the bundle was made of, {manifest.model.id}: its {name} is {found}, "
                f"the bundle's {recorded}; name the bundle's own model."
            )


def _checked_adapters(adapters: Sequence[Adapter], manifest: Manifest, chosen: str | None) -> Sequence[Adapter]:
    """The adapters in the order of the bundle's, if they are the same."""
    wanted = [record for record in manifest.adapters if record.file is None or record.name == chosen]
    given = {(sha256_of(adapter.path / WEIGHTS), adapter.weight): adapter for adapter in adapters}
    keys = [(record.sha256, record.weight) for record in wanted]
    if len(adapters) == len(keys) and given.keys() == set(keys):
        return [given[key] for key in keys]
    if not wanted:
        raise UsageError("The bundle computes without adapters; leave out --original-adapter, or add --any-model.")
    told = ", ".join(f"{record.name}:{record.weight:g}" for record in wanted)
    raise UsageError(
        f"The bundle computes with the adapters {told}, and the original must too: give the folder and weight of each "
        "with --original-adapter, or add --any-model."
    )


def _check_identity(source: Source, adapters: Sequence[Adapter], manifest: Manifest) -> None:
    """Compare hashes, where the bundle has one: of the model with the adapters that are merged into its weights."""
    inside = {record.sha256 for record in manifest.adapters if record.file is None}
    merged_in = [adapter for adapter in adapters if sha256_of(adapter.path / WEIGHTS) in inside]
    if manifest.model.sha256 not in (None, model_sha256(source, merged_in)):
        raise LlamaExportError(
            f"{source.model_id} is not what the bundle was made of, {manifest.model.id}: its weights or its config "
            "differ; name the bundle's own model, or add --any-model."
        )
