"""What PyTorch computed, as it travels in a bundle: `reference/reference.json` and `reference/logits.npz`.

Of each position's logits the file keeps the top 64 with exact values, the log of the sum of exponentials, and a fixed
random set of 256 vocabulary entries, which catches errors in the tail. So hundreds of positions stay below 2 MB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LlamaExportError
from .decode_json import decode

FOLDER = "reference"
SCHEMA_VERSION = 1
TOP = 64
SAMPLES = 256
_INDEX, _LOGITS = "reference.json", "logits.npz"
_MAX_BYTES = 64 << 20

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Prompt:
    """ids: the prompt's tokens and then the greedy continuation; the first `prompt_tokens` are the prompt. Both lengths
    are the same for all prompts of a reference, which are replayed as one batch.

    proven: continuation tokens that are also the argmax of PyTorch's logits.
    """

    name: str
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    proven: int


@dataclass(frozen=True)
class WeightRecord:
    """One checkpoint tensor as PyTorch used it, and where the bundle stores it.

    format: name of the stored format. initializers: by role (values; or codes, scales, offsets). row: of its first row
    in them. shape: of the tensor. sha256: of its dequantised float32 values, row by row. norm: square root of the sum
    of their squares.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    row: int
    initializers: Mapping[str, str]
    sha256: str
    norm: float


@dataclass(frozen=True)
class Index:
    """reference.json. vocab: size of the logits; tools: versions of what computed them."""

    schema_version: int
    model_id: str
    revision: str | None
    vocab: int
    prompts: tuple[Prompt, ...]
    weights: tuple[WeightRecord, ...]
    tools: Mapping[str, str]


@dataclass(frozen=True)
class Logits:
    """Of every position of every prompt, in order: top_ids, top_logits [n, 64]; logsumexp [n]; and sampled [n, 256],
    the logits of the vocabulary entries sample_ids [256]. Fewer columns where the vocabulary is smaller.
    """

    top_ids: Int32
    top_logits: Float32
    logsumexp: Float32
    sample_ids: Int32
    sampled: Float32

    def rows(self, start: int, stop: int) -> Logits:
        """The same of the positions [start, stop)."""
        part = slice(start, stop)
        return Logits(
            self.top_ids[part], self.top_logits[part], self.logsumexp[part], self.sample_ids, self.sampled[part]
        )

    @staticmethod
    def joined(parts: Sequence[Logits]) -> Logits:
        """The positions of all parts, in order."""

        def stack(name: str) -> npt.NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        ids = parts[0].sample_ids
        return Logits(stack("top_ids"), stack("top_logits"), stack("logsumexp"), ids, stack("sampled"))


@dataclass(frozen=True)
class Reference:
    index: Index
    logits: Logits


def sample_ids(vocab: int) -> Int32:
    """The fixed random vocabulary entries whose logits are kept, in order."""
    chosen = np.random.default_rng(0).choice(vocab, size=min(SAMPLES, vocab), replace=False)
    return np.sort(chosen).astype(np.int32)


def compress(logits: Float32) -> Logits:
    """Keep of full logits [n, vocab] what the reference file keeps."""
    vocab = logits.shape[1]
    count = min(TOP, vocab)
    top = np.argpartition(logits, vocab - count, axis=1)[:, vocab - count :]
    order = np.argsort(np.take_along_axis(logits, top, axis=1), axis=1)[:, ::-1]
    top = np.take_along_axis(top, order, axis=1)
    ids = sample_ids(vocab)
    return Logits(top.astype(np.int32), np.take_along_axis(logits, top, axis=1), logsumexp(logits), ids, logits[:, ids])


def logsumexp(logits: Float32) -> Float32:
    """log(sum(exp(logits))) of each row, summed in float64."""
    largest = logits.max(axis=1)
    total = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
    result: Float32 = (largest + np.log(total)).astype(np.float32)
    return result


def fingerprint(rows: Iterator[Float32]) -> tuple[str, float]:
    """sha256 over float32 rows in order, little-endian, and the root of the sum of their squares."""
    digest, squares = hashlib.sha256(), 0.0
    for part in rows:
        flat = np.ascontiguousarray(part, dtype="<f4").reshape(-1)
        digest.update(flat.data)
        with np.errstate(over="ignore", invalid="ignore"):
            squares += float(np.dot(flat, flat))
    return digest.hexdigest(), squares**0.5


def save_reference(reference: Reference, bundle: Path) -> None:
    """Write the reference into the folder of a bundle that is being made."""
    folder = bundle / FOLDER
    folder.mkdir()
    index = json.dumps(dataclasses.asdict(reference.index), indent=1, ensure_ascii=False)
    (folder / _INDEX).write_text(index + "\n", encoding="utf-8")
    np.savez_compressed(folder / _LOGITS, **dataclasses.asdict(reference.logits))


def load_reference(bundle: Path) -> Reference:
    """Read and check the reference of a bundle; LlamaExportError when there is none or it is damaged."""
    folder = bundle / FOLDER
    if not (folder / _INDEX).is_file():
        raise LlamaExportError(
            f"The bundle {bundle} has no reference to compare with, it was built with --no-reference; build it without."
        )
    for name in (_INDEX, _LOGITS):
        if (folder / name).stat().st_size > _MAX_BYTES:
            raise LlamaExportError(f"{folder / name} is larger than any reference; build the bundle again.")
    try:
        value = json.loads((folder / _INDEX).read_bytes())
        version = value.get("schema_version")
        if version != SCHEMA_VERSION:
            raise LlamaExportError(
                f"The reference has schema version {version!r}, but this llama-export reads {SCHEMA_VERSION}; upgrade "
                "it or build the bundle again."
            )
        index = decode(Index, value, _INDEX)
        with np.load(folder / _LOGITS, allow_pickle=False) as arrays:
            logits = Logits(**{field.name: arrays[field.name] for field in dataclasses.fields(Logits)})
    except (ValueError, KeyError, OSError, AttributeError, EOFError) as error:
        raise LlamaExportError(f"The reference in {folder} is damaged ({error}); build the bundle again.") from error
    _check(index, logits, folder)
    return Reference(index, logits)


def _check(index: Index, logits: Logits, folder: Path) -> None:
    positions = sum(len(prompt.ids) for prompt in index.prompts)
    top, samples = min(TOP, index.vocab), min(SAMPLES, index.vocab)
    expected = {
        "top_ids": (positions, top),
        "top_logits": (positions, top),
        "logsumexp": (positions,),
        "sample_ids": (samples,),
        "sampled": (positions, samples),
    }
    for name, shape in expected.items():
        array = getattr(logits, name)
        if array.shape != shape or array.dtype != (np.int32 if name.endswith("ids") else np.float32):
            raise LlamaExportError(
                f"{folder / _LOGITS} holds {name} as {array.dtype} {list(array.shape)}, but {list(shape)} is expected; "
                "build the bundle again."
            )
        if name.endswith("ids") and array.size and not 0 <= array.min() <= array.max() < index.vocab:
            raise LlamaExportError(
                f"{folder / _LOGITS} names tokens outside of the vocabulary; build the bundle again."
            )
    if len({(prompt.prompt_tokens, len(prompt.ids)) for prompt in index.prompts}) != 1:
        raise LlamaExportError(f"{folder / _INDEX} has no prompts of one length; build the bundle again.")
    for prompt in index.prompts:
        if not 0 < prompt.prompt_tokens <= len(prompt.ids) or not all(0 <= token < index.vocab for token in prompt.ids):
            raise LlamaExportError(
                f"{folder / _INDEX} has a prompt {prompt.name!r} out of range; build the bundle again."
            )
