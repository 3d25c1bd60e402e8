"""The reference inside a bundle: the exported model proposes greedy text, one PyTorch pass proves each token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from ..errors import LlamaExportError
from ..optimize.formats import Format
from ..optimize.graph import ORDER as ORDER_PREFIX
from ..optimize.graph import ROTARY_TABLES
from ..optimize.plan import column_orders
from ..optimize.quantise import dense_format
from ..optimize.shared.order_inputs import order_name
from ..optimize.tensors import Float32
from ..progress import Progress
from ..runtime.batch import BatchReplay
from ..runtime.bundle import GRAPH_FILE, Bundle, Manifest
from ..runtime.onnx_file import with_accuracy_level
from ..runtime.reference import (
    INDEX,
    ORDER,
    SCHEMA_VERSION,
    Index,
    Logits,
    Prompt,
    Reference,
    WeightRecord,
    compress,
    fingerprint,
)
from ..runtime.threads import physical_cores
from .config import transformers_config
from .lora.peft_folder import Adapter
from .reference import ExactModel
from .rotary import rotary_tables
from .source import Source
from .write import Placement

CONTINUATION = 32
"""Tokens after each prompt that are decoded one by one."""

_LONGEST = 48
"""Tokens of a prompt, so that the file stays small."""

PROMPTS: Mapping[str, str] = {
    "prose": "The old lighthouse keeper climbed the stairs every evening at dusk with a lantern and a book of maps.",
    "question": "Question: What is the capital of France, and on which river does it lie? Answer briefly.\nAnswer:",
    "code": 'def fibonacci(n: int) -> int:\n    """Return the n-th number."""\n    if n < 2:\n        return n\n',
    "scripts": "Привет, мир! こんにちは世界。 مرحبا بالعالم 🌍 naïve façade ½ ≠ 1234567890",
    "repeated": "one two three one two three one two three one two three one two three one two three one two three",
}

_ADAPTER_PROMPTS = 2
"""Recorded of an adapter: its graph is the model's, which has been through all prompts."""


def record_reference(
    source: Source,
    placements: Mapping[str, Placement],
    tables: Mapping[str, npt.NDArray[np.generic]],
    folder: Path,
    manifest: Manifest,
    tools: Mapping[str, str],
    progress: Progress,
) -> Reference:
    """Make the reference of the bundle in `folder`, whose graph and weights are there and whose manifest is not yet.

    placements: where each checkpoint tensor is stored, see `write.placements`. tables: the constants beside them in the
    data file, see `write.tables_of`.
    """
    formats = {name: placement.format for name, placement in placements.items()}
    model = _exact_model(source, formats, manifest)
    prompts, logits = _recorded(model, _prompts(source, manifest), folder, manifest, progress)
    weights = tuple(record for name in source.tensors for record in _weights(name, source, placements[name], model))
    constants = (*_tables(tables, model.config, manifest.limits.context), *_orders(source, formats))
    index = Index(
        SCHEMA_VERSION, source.model_id, source.revision, manifest.shape.vocab, prompts, weights, constants, tools
    )
    return Reference(index, logits)


def record_adapter(
    source: Source,
    adapter: Adapter,
    matrices: Sequence[WeightRecord],
    formats: Mapping[str, Format],
    folder: Path,
    manifest: Manifest,
    tools: Mapping[str, str],
    progress: Progress,
) -> Reference:
    """Make the reference of an adapter that lies in the bundle beside the weights: transformers' layers on the stored
    weights with what the adapter adds. matrices: what `write_adapter` recorded.
    """
    model = replace(_exact_model(source, formats, manifest), added=adapter.parts)
    kept = dict(list(_prompts(source, manifest).items())[:_ADAPTER_PROMPTS])
    prompts, logits = _recorded(model, kept, folder, manifest, progress, adapter.name)
    vocab = manifest.shape.vocab
    index = Index(SCHEMA_VERSION, source.model_id, source.revision, vocab, prompts, tuple(matrices), (), tools)
    return Reference(index, logits)


def _exact_model(source: Source, formats: Mapping[str, Format], manifest: Manifest) -> ExactModel:
    scales, context = np.dtype(manifest.shape.cache_dtype), manifest.limits.context
    return ExactModel(transformers_config(source.config), source.tensors, formats, scales, context)


def _recorded(
    model: ExactModel,
    prompts: Mapping[str, Sequence[int]],
    folder: Path,
    manifest: Manifest,
    progress: Progress,
    adapter: str | None = None,
) -> tuple[tuple[Prompt, ...], Logits]:
    """The prompts with their greedy continuations, and what PyTorch computes for them."""
    continued = _propose(prompts, folder, manifest, adapter)
    logits = model.logits(list(continued.values()), progress)
    pairs = zip(continued.items(), logits, strict=True)
    proven = tuple(_proven(name, prompts[name], ids, rows) for (name, ids), rows in pairs)
    return proven, Logits.joined([compress(rows) for rows in logits])


def _prompts(source: Source, manifest: Manifest) -> dict[str, list[int]]:
    """The built-in prompts as token ids, all cut to the length of the shortest, so that they are replayed as one batch.

    Prompts in a script whose tokens lie outside of the model's vocabulary are left out.
    """
    tokenizer = Tokenizer.from_str(source.content("tokenizer.json").decode())
    encoded = {name: tokenizer.encode(text).ids for name, text in PROMPTS.items()}
    found = {name: ids for name, ids in encoded.items() if ids and max(ids) < manifest.shape.vocab}
    if not found:
        raise LlamaExportError(
            f"The tokenizer of {source.model_id} gives no token of the model's {manifest.shape.vocab} for "
            "any text, so they do not belong together; take the model's own tokenizer.json, or use --no-reference."
        )
    room = max(1, manifest.limits.context // 2)
    length = min(room, _LONGEST, *(len(ids) for ids in found.values()))
    return {name: ids[:length] for name, ids in found.items()}


def _propose(
    prompts: Mapping[str, Sequence[int]], folder: Path, manifest: Manifest, adapter: str | None
) -> dict[str, list[int]]:
    """Each prompt with the greedy continuation that the exported graph gives in full precision."""
    graph = with_accuracy_level((folder / GRAPH_FILE).read_bytes(), 0)
    bundle = Bundle(folder, manifest, manifest_sha256="")
    replay = BatchReplay(bundle, len(prompts), model=graph, threads=physical_cores(), adapter=adapter)
    ids = np.array(list(prompts.values()), np.int64)
    steps = min(CONTINUATION, manifest.limits.context - ids.shape[1])
    new, tokens = ids, [ids]
    for _ in range(steps):
        new = replay.extend(new)[:, -1:].argmax(axis=-1)
        tokens.append(new)
    return dict(zip(prompts, np.concatenate(tokens, axis=1).tolist(), strict=True))


def _proven(name: str, prompt: Sequence[int], ids: Sequence[int], logits: Float32) -> Prompt:
    chosen = logits[len(prompt) - 1 : -1].argmax(axis=1)
    proven = int((chosen == np.asarray(ids[len(prompt) :])).sum())
    return Prompt(name, PROMPTS[name], tuple(ids), len(prompt), proven)


def _weights(name: str, source: Source, placement: Placement, model: ExactModel) -> Iterator[WeightRecord]:
    """A record of each place in which the tensor is stored."""
    sha256, norm = model.fingerprints[name]
    shape = source.tensors[name].shape
    for place in (placement, *placement.copies):
        names = place.initializers
        yield WeightRecord(name, place.format.name, shape, place.row, names, sha256, norm, place.transposed)


def _tables(
    tables: Mapping[str, npt.NDArray[np.generic]], config: PreTrainedConfig, context: int
) -> Iterator[WeightRecord]:
    """What no prompt reaches the end of: the rotary tables, computed anew, and the indices of positions."""
    rotary = dict(zip(ROTARY_TABLES, rotary_tables(config, context), strict=True))
    for name, table in tables.items():
        if name.startswith(ORDER_PREFIX):
            continue  # recorded by `_orders`
        stored = rotary[name].astype(table.dtype) if name in rotary else np.arange(context).reshape(table.shape)
        format = dense_format(str(table.dtype)).name if name in rotary else INDEX
        sha256, norm = fingerprint(iter([stored.astype(np.float32)]))
        yield WeightRecord(name, format, table.shape, 0, {"values": name}, sha256, norm)


def _orders(source: Source, formats: Mapping[str, Format]) -> Iterator[WeightRecord]:
    """The orders of columns, each once."""
    orders = column_orders(source.tensors, formats).values()
    for name, order in {order_name(order): order for order in orders}.items():
        sha256, norm = fingerprint(iter([order.astype(np.float32)]))
        yield WeightRecord(name, ORDER, order.shape, 0, {"values": name}, sha256, norm)
