"""Adapters laid on a checkpoint: do they fit it, and what its weights are with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...errors import LlamaExportError, did_you_mean
from ...optimize.formats import EMBEDDING, HEAD, Format, int_format
from ...optimize.tensors import Float32, SourceTensor
from ..loss import MERGED
from ..safetensors_file import StoredTensor
from .peft_folder import Adapter, LowRank

_ROWS = 4096


def fitted(adapter: Adapter, model_id: str, tensors: Mapping[str, SourceTensor]) -> Adapter:
    """The adapter as far as it changes the model: whole weights that are the model's own are left out.

    Raises LlamaExportError, naming adapter and module, where it changes a weight that the model does not have, or has
    in another shape.
    """
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) == 2 and name != EMBEDDING}
    for name, part in adapter.parts.items():
        _check_fit(adapter, model_id, name, (part.b.shape[0], part.a.shape[1]), matrices)
    for name, tensor in adapter.whole.items():
        _check_fit(adapter, model_id, name, tensor.shape, tensors)
    whole = {name: tensor for name, tensor in adapter.whole.items() if not _equal(tensor, tensors[name])}
    if whole and adapter.weight != 1:
        raise LlamaExportError(
            f"The adapter {adapter.name} brings {next(iter(whole))} along as a whole, which cannot be weighed by "
            f"{adapter.weight:g}; leave the weight out."
        )
    return replace(adapter, whole=whole)


def _check_fit(
    adapter: Adapter, model_id: str, name: str, shape: tuple[int, ...], tensors: Mapping[str, SourceTensor]
) -> None:
    module = name.removesuffix(".weight")
    advice = "take the model that it was trained on" + (f", {adapter.base}" if adapter.base else "")
    if name == HEAD and name not in tensors:
        raise LlamaExportError(
            f"The adapter {adapter.name} changes lm_head, but the head of {model_id} is its embedding (tied), of which "
            "adapters are not supported; merge it with peft's merge_and_unload first."
        )
    if name not in tensors:
        raise LlamaExportError(
            f"The adapter {adapter.name} changes {module}, which is no projection of {model_id}; {advice}."
            + did_you_mean(name, tensors)
        )
    if shape != tensors[name].shape:
        sizes, expected = (" x ".join(map(str, one)) for one in (shape, tensors[name].shape))
        raise LlamaExportError(
            f"The adapter {adapter.name} is for a {module} of {sizes} numbers, which has {expected} in {model_id}; "
            f"{advice}."
        )


def _equal(stored: StoredTensor, tensor: SourceTensor) -> bool:
    rows = stored.shape[0]
    pieces = ((start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
    return all(np.array_equal(stored.floats(start, stop), tensor.read(start, stop)) for start, stop in pieces)


def base_mismatch(adapter: Adapter, model_id: str) -> str | None:
    """A sentence when the adapter names another base than the model, as far as names tell; None when they agree.

    Shapes that fit do not prove the base: an adapter of the chat model fits the plain one.
    """
    if adapter.base is None or _last_part(adapter.base) == _last_part(model_id):
        return None
    return f"The adapter {adapter.name} names {adapter.base} as its base, and this model is called {model_id}"


def merged(tensors: Mapping[str, SourceTensor], adapters: Sequence[Adapter]) -> dict[str, SourceTensor]:
    """The model's tensors with what the adapters add, which is computed with the rows that are read.

    A weight that came in blocks has none afterwards: it is rounded anew, to as many bits.
    """
    added: dict[str, list[tuple[str, LowRank]]] = defaultdict(list)
    whole: dict[str, StoredTensor] = {}
    for adapter in adapters:
        for name, part in adapter.parts.items():
            added[name].append((adapter.name, part))
        for name, tensor in adapter.whole.items():
            if name in whole:
                raise LlamaExportError(f"Two adapters bring {name} along as a whole; leave one of them out.")
            whole[name] = tensor
    return {
        name: _merged(tensor, added[name], whole.get(name)) if name in added or name in whole else tensor
        for name, tensor in tensors.items()
    }


def _merged(tensor: SourceTensor, parts: Sequence[tuple[str, LowRank]], whole: StoredTensor | None) -> SourceTensor:
    base = tensor.read if whole is None else whole.floats

    def read(start: int, stop: int) -> Float32:
        rows = base(start, stop)
        for adapter, part in parts:
            added = part.delta(start, stop)
            if not np.isfinite(added).all():
                raise LlamaExportError(
                    f"The adapter {adapter} adds NaN or infinite values to {tensor.name}; its file is damaged or its "
                    "training diverged."
                )
            rows = rows + added
        return rows

    dtype, format = tensor.dtype + MERGED, _symmetric(tensor.format)
    return replace(tensor, dtype=dtype, format=format, read=read, blocks=None, order=None)


def _symmetric(format: Format) -> Format:
    return int_format(format.bits, format.block) if format.quantised else format


def _last_part(name: str) -> str:
    """The last part of an id or a path, as names are compared."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
