"""What PyTorch computed, as it travels in a bundle: `reference/reference.json` and `reference/logits.npz`.

Of each position's logits the file keeps the top 64 with exact values, the log of the sum of exponentials, and a fixed
random set of 256 vocabulary entries, which catches errors in the tail. So hundreds of positions stay below 2 MB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LlamaExportError
from .arrays import Float32, Float64, Int32
from .bundle import REFERENCE_FILES, reference_folder
from .decode_json import decode
from .npz import read_array

SCHEMA_VERSION = 1
ORDER = "order"
"""The role of the initializer that says which column each stored column is, and the format of such initializers."""
INDEX = "index"
"""The format of tables that hold 0, 1, 2, ...: the positions that a mask compares."""
GLOBAL = "global"
"""The role of the one number by which the scales of a tensor are multiplied."""
TOP = 64
SAMPLES = 256
_INDEX, _LOGITS = REFERENCE_FILES
_MAX_BYTES = 64 << 20
"""Of each file, and of its arrays when they are unpacked."""
_MAX_VOCAB = 1 << 24
_MAX_RANK, _MAX_SIZE = 4, 1 << 31
"""Of a weight, or of a table that a graph has."""
_ROW_BYTES = 8 * TOP + 8 + 4 * SAMPLES
"""What is kept of one position."""


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
    """One tensor as PyTorch used it, and where the bundle stores it.

    format: name of the stored format. initializers: by role: values; or codes, scales, zeros, offsets, and `global`
    where one number scales the whole tensor; and `order` where the columns are stored in another order. row: of its
    first row in them; transposed: rows are columns there. shape: of the tensor. sha256: of its dequantised float32
    values, row by row, columns in place. norm: square root of the sum of their squares. A tensor that is stored in two
    layouts has two records.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    row: int
    initializers: Mapping[str, str]
    sha256: str
    norm: float
    transposed: bool = False


@dataclass(frozen=True)
class Index:
    """reference.json. vocab: size of the logits; weights: the checkpoint's tensors; tables: cos and sin of the rotary
    embedding; tools: versions of what computed them.
    """

    schema_version: int
    model_id: str
    revision: str | None
    vocab: int
    prompts: tuple[Prompt, ...]
    weights: tuple[WeightRecord, ...]
    tables: tuple[WeightRecord, ...]
    tools: Mapping[str, str]


@dataclass(frozen=True)
class Logits:
    """Of every position of every prompt, in order: top_ids, top_logits [n, 64]; logsumexp [n]; and sampled [n, 256],
    the logits of the vocabulary entries sample_ids [256]. Fewer columns where the vocabulary is smaller.
    """

    top_ids: Int32
    top_logits: Float32
    logsumexp: Float64
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


def logsumexp(logits: Float32) -> Float64:
    """log(sum(exp(logits))) of each row, in float64: what the top leaves of the whole is a difference of nearly equal
    numbers.
    """
    largest = logits.max(axis=1).astype(np.float64)
    total = np.array([np.exp(row - top).sum() for row, top in zip(logits, largest, strict=True)])
    result: Float64 = largest + np.log(total)
    return result


class Fingerprint:
    """Made of float32 rows as they pass by, in order."""

    def __init__(self) -> None:
        self._digest, self._squares = hashlib.sha256(), 0.0

    def add(self, rows: Float32) -> None:
        flat = np.ascontiguousarray(rows, dtype="<f4").reshape(-1)
        self._digest.update(flat.data)
        with np.errstate(over="ignore", invalid="ignore"):
            self._squares += float(np.dot(flat, flat))

    @property
    def value(self) -> tuple[str, float]:
        """sha256 over the rows so far, little-endian, and the root of the sum of their squares."""
        return self._digest.hexdigest(), self._squares**0.5


def fingerprint(rows: Iterator[Float32]) -> tuple[str, float]:
    """The `Fingerprint` of all these rows."""
    whole = Fingerprint()
    for part in rows:
        whole.add(part)
    return whole.value


def save_reference(reference: Reference, bundle: Path, adapter: str | None = None) -> None:
    """Write the reference into the folder of a bundle that is being made. adapter: whose it is."""
    folder = bundle / reference_folder(adapter)
    folder.mkdir(parents=True)
    index = json.dumps(dataclasses.asdict(reference.index), indent=1, ensure_ascii=False)
    (folder / _INDEX).write_text(index + "\n", encoding="utf-8")
    np.savez_compressed(folder / _LOGITS, **dataclasses.asdict(reference.logits))


def load_reference(bundle: Path, adapter: str | None = None) -> Reference:
    """Read and check the reference of a bundle, or of one of its adapters.

    Raises LlamaExportError when there is none or it is damaged.
    """
    index = load_index(bundle, adapter)
    folder = bundle / reference_folder(adapter)
    with _damage_as_one_sentence(folder):
        return Reference(index, _read_logits(folder / _LOGITS, index))


def load_index(bundle: Path, adapter: str | None = None) -> Index:
    """Read and check the index alone; LlamaExportError when there is none or it is damaged."""
    folder = bundle / reference_folder(adapter)
    if not (folder / _INDEX).is_file():
        raise LlamaExportError(
            f"The bundle {bundle} has no reference to compare with, it was built with --no-reference; build it without."
        )
    with _damage_as_one_sentence(folder):
        return _read_index(folder / _INDEX)


@contextlib.contextmanager
def _damage_as_one_sentence(folder: Path) -> Iterator[None]:
    try:
        yield
    except LlamaExportError:
        raise
    except Exception as error:  # json, zipfile, zlib and NumPy each have kinds of their own for what is damaged
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LlamaExportError(f"The reference in {folder} is damaged ({reason}); build the bundle again.") from error


def _refuse_endless(path: Path) -> None:
    if path.stat().st_size > _MAX_BYTES:
        raise LlamaExportError(f"{path} is larger than any reference; build the bundle again.")


def _read_index(path: Path) -> Index:
    _refuse_endless(path)
    value = json.loads(path.read_bytes())
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise LlamaExportError(
            f"The reference has schema version {version!r}, but this llama-export reads {SCHEMA_VERSION}; upgrade it "
            "or build the bundle again."
        )
    index = decode(Index, value, _INDEX)
    for problem in _problems(index):
        raise LlamaExportError(f"{path} has {problem}; build the bundle again.")
    return index


def _problems(index: Index) -> Iterator[str]:
    if not 0 < index.vocab <= _MAX_VOCAB:
        yield f"a vocabulary of {index.vocab}, which is out of range"
    if len({(prompt.prompt_tokens, len(prompt.ids)) for prompt in index.prompts}) != 1:
        yield "no prompts of one length"
    for prompt in index.prompts:
        if not 0 < prompt.prompt_tokens <= len(prompt.ids) or not all(0 <= token < index.vocab for token in prompt.ids):
            yield f"a prompt {prompt.name!r} out of range"
    if not index.weights:
        yield "no weights"
    for weight in (*index.weights, *index.tables):
        if not 1 <= len(weight.shape) <= _MAX_RANK or not all(1 <= size <= _MAX_SIZE for size in weight.shape):
            yield f"a weight {weight.name!r} of an impossible shape"
        if not 0 <= weight.row <= _MAX_SIZE:
            yield f"a weight {weight.name!r} out of range"
    if _positions(index) * _ROW_BYTES > _MAX_BYTES:
        yield "more tokens than any reference"


def _positions(index: Index) -> int:
    return sum(len(prompt.ids) for prompt in index.prompts)


def _read_logits(path: Path, index: Index) -> Logits:
    """The arrays, each read only when it is of the type and shape that the index says: no pickle is, and no bomb."""
    _refuse_endless(path)
    rows, top, samples = _positions(index), min(TOP, index.vocab), min(SAMPLES, index.vocab)
    expected = {
        "top_ids": (np.int32, (rows, top)),
        "top_logits": (np.float32, (rows, top)),
        "logsumexp": (np.float64, (rows,)),
        "sample_ids": (np.int32, (samples,)),
        "sampled": (np.float32, (rows, samples)),
    }
    with zipfile.ZipFile(path) as archive:
        arrays = {name: read_array(archive, name, kind, shape, _MAX_BYTES) for name, (kind, shape) in expected.items()}
    for name, array in arrays.items():
        if array.dtype == np.int32 and not 0 <= array.min() <= array.max() < index.vocab:
            raise LlamaExportError(f"{path} names tokens outside of the vocabulary; build the bundle again.")
        if array.dtype != np.int32 and not np.isfinite(array).all():
            raise LlamaExportError(f"{path} holds {name} that are not finite; build the bundle again.")
    return Logits(**arrays)
