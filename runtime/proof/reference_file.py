"""References on disk: one `.npz` each, the same bytes for the same reference, and read as something nobody vouches for.

The archive holds `reference.json`, which is the `Index`, and one `.npy` for each array. Numbers of 4 and 8 bytes are
stored as planes of bytes, uint8 [itemsize, ...] with the lowest byte first, which deflates a fifth better: the high
bytes of neighbours are alike. `full` alone is stored as it is and not deflated, so that it is mapped instead of read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import LlamaExportError
from ..arrays import Float32
from ..bundle import reference_file
from ..decode_json import decode
from ..files import written_whole
from ..npz import read_array
from .reference import SCHEMA_VERSION, TOP, Index, Layers, Logits, Reference, chosen_channels, sample_ids
from .reference_checks import MOST_POSITIONS, index_problems, number_problems

BUILD_AGAIN = "build the bundle again"
MAKE_AGAIN = "make it again with `llama-export reference`"
"""What to do about a reference that cannot be used: one inside a bundle, and a user's own."""

_INDEX, _FULL = "reference.json", "full"
_MOST_INDEX = 16 << 20
"""Bytes of reference.json."""
_MOST_ARRAY = MOST_POSITIONS * 4 * 256
"""Bytes of an array that is read into memory."""
_STEP = 1 << 24
"""Bytes of full logits that are written or checked at a time."""
_LEVEL = 9
_DATE = (1980, 1, 1, 0, 0, 0)
_LOCAL = struct.Struct("<26xHH")
"""Of a local file header (PKWARE's APPNOTE, 4.3.7): the lengths of the name and of the extra field, which follow."""

_Expected = Mapping[str, tuple[npt.DTypeLike, tuple[int, ...]]]


def save(reference: Reference, path: Path) -> None:
    """Write `path`, whole or not at all; its folders are made.

    Full logits are copied a few at a time, so that they may be a mapped file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file, zipfile.ZipFile(file, "w") as archive:
        _write(archive, reference)


def load(path: Path, remedy: str = MAKE_AGAIN) -> Reference:
    """Read and check a reference; full logits are mapped, and stay so while they are used.

    remedy: what the user is told to do about a file that cannot be used. Raises LlamaExportError, with one sentence,
    when there is none, it is damaged or of another schema version, or what it says cannot be.
    """
    with _opened(path, remedy) as archive:
        index = _read_index(archive, path, remedy)
        expected = _expected(index)
        _refuse_others(archive, expected, index)
        arrays = {name: _read(archive, name, *wanted) for name, wanted in expected.items()}
        full = _mapped(archive, path, (index.positions, index.vocab)) if index.full else None
        logits = Logits(full=full, **{name: arrays[name] for name in arrays if name in _LOGITS})
        layers = Layers(**{name: arrays[name] for name in arrays if name in _LAYERS}) if index.layers else None
        reference = Reference(index, logits, layers)
        _refuse(number_problems(reference), path, remedy)
    return reference


def load_index(path: Path, remedy: str = MAKE_AGAIN) -> Index:
    """Read and check the index alone, as `load` does."""
    with _opened(path, remedy) as archive:
        return _read_index(archive, path, remedy)


def load_of_bundle(folder: Path, kind: str, adapter: str | None = None) -> Reference:
    """The reference of this kind of the bundle in `folder`, or of one of its adapters; errors as those of `load`."""
    return load(_in_bundle(folder, kind, adapter), BUILD_AGAIN)


def load_index_of_bundle(folder: Path, kind: str, adapter: str | None = None) -> Index:
    """The index of the reference of this kind of the bundle in `folder`, or of one of its adapters."""
    return load_index(_in_bundle(folder, kind, adapter), BUILD_AGAIN)


def _in_bundle(folder: Path, kind: str, adapter: str | None) -> Path:
    path = folder / reference_file(kind, adapter)
    if not path.is_file():
        raise LlamaExportError(
            f"The bundle {folder} has no {kind} reference to compare with, it was built with --no-reference; build it "
            "without."
        )
    return path


@contextlib.contextmanager
def _opened(path: Path, remedy: str) -> Iterator[zipfile.ZipFile]:
    """The archive, and whatever goes wrong inside it as one sentence."""
    if not path.is_file():
        raise LlamaExportError(f"There is no reference {path}; {remedy}.")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except LlamaExportError:
        raise
    except Exception as error:  # json, zipfile, zlib and NumPy each have kinds of their own for what is damaged
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LlamaExportError(f"The reference {path} is damaged ({reason}); {remedy}.") from error


def _refuse(problems: Iterator[str], path: Path, remedy: str) -> None:
    for problem in problems:
        raise LlamaExportError(f"The reference {path} has {problem}; {remedy}.")


def _read_index(archive: zipfile.ZipFile, path: Path, remedy: str) -> Index:
    with archive.open(_INDEX) as file:
        text = file.read(_MOST_INDEX + 1)
        if len(text) > _MOST_INDEX:
            raise ValueError(f"{_INDEX} is larger than that of any reference")
    value = json.loads(text)
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise LlamaExportError(
            f"The reference {path} has schema version {version!r}, but this llama-export reads {SCHEMA_VERSION}; "
            f"{remedy}."
        )
    try:
        index = decode(Index, value, _INDEX)
    except LlamaExportError as error:
        raise ValueError(str(error).rstrip(".")) from error
    _refuse(index_problems(index), path, remedy)
    return index


_LOGITS = ("top_ids", "top_logits", "logsumexp", "sample_ids", "sampled")
_LAYERS = ("hidden_ids", "cache_ids", "hidden", "keys", "values")


def _expected(index: Index) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
    """Dtype and shape of each array that is not mapped."""
    rows, samples = index.positions, len(sample_ids(index.vocab))
    top = min(TOP, index.vocab)
    logits: _Expected = {
        "top_ids": (np.int32, (rows, top)),
        "top_logits": (np.float32, (rows, top)),
        "logsumexp": (np.float64, (rows,)),
        "sample_ids": (np.int32, (samples,)),
        "sampled": (np.float32, (rows, samples)),
    }
    if not index.layers:
        return dict(logits)
    marks = sum(len(marks) for marks in index.marks)
    hidden, cache = chosen_channels(index.identity)
    sizes = (len(index.layers), marks)
    return {
        **logits,
        "hidden_ids": (np.int32, (len(hidden),)),
        "cache_ids": (np.int32, (len(cache),)),
        "hidden": (np.float32, (*sizes, len(hidden))),
        "keys": (np.float32, (*sizes, len(cache))),
        "values": (np.float32, (*sizes, len(cache))),
    }


def _refuse_others(archive: zipfile.ZipFile, expected: _Expected, index: Index) -> None:
    wanted = sorted([_INDEX, *(f"{name}.npy" for name in (*expected, *([_FULL] if index.full else [])))])
    if sorted(archive.namelist()) != wanted:
        raise ValueError(f"it holds {len(archive.namelist())} files, and not the {len(wanted)} that it should")


def _read(archive: zipfile.ZipFile, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An array out of its planes, only when it is of the size that the index says: no pickle, and no bomb."""
    kind = np.dtype(dtype)
    planes = read_array(archive, name, np.uint8, (kind.itemsize, *shape), _MOST_ARRAY)
    return np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(kind.newbyteorder("<")).reshape(shape).astype(kind)


def _mapped(archive: zipfile.ZipFile, path: Path, shape: tuple[int, int]) -> Float32:
    """Full logits, mapped once all of them have been read: finite, and with the archive's checksum."""
    info = archive.getinfo(f"{_FULL}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{_FULL} is deflated")
    with archive.open(info) as file:
        np.lib.format.read_magic(file)
        found, by_columns, kind = np.lib.format.read_array_header_1_0(file)
        if found != shape or by_columns or kind != np.dtype("<f4"):
            raise ValueError(f"{_FULL} is {kind} {list(found)}, but float32 {list(shape)} is expected")
        header, size = file.tell(), 0
        while data := file.read(_STEP):
            size += len(data)
            if not np.isfinite(np.frombuffer(data, "<f4")).all():
                raise ValueError(f"{_FULL} holds logits that are not finite")
    if size != 4 * shape[0] * shape[1]:
        raise ValueError(f"{_FULL} has another size than its header says")
    with path.open("rb") as whole:
        whole.seek(info.header_offset)
        lengths = _LOCAL.unpack(whole.read(_LOCAL.size))
    offset = info.header_offset + _LOCAL.size + sum(lengths) + header
    return np.memmap(path, np.dtype("<f4"), "r", offset, shape)


def _write(archive: zipfile.ZipFile, reference: Reference) -> None:
    index = json.dumps(dataclasses.asdict(reference.index), indent=1, ensure_ascii=False, allow_nan=False)
    with archive.open(_member(_INDEX), "w") as file:
        file.write(f"{index}\n".encode())
    arrays = {name: getattr(reference.logits, name) for name in _LOGITS}
    if reference.layers is not None:
        arrays |= {name: getattr(reference.layers, name) for name in _LAYERS}
    for name, array in arrays.items():
        with archive.open(_member(f"{name}.npy"), "w") as file:
            np.lib.format.write_array(file, _planes(array), version=(1, 0), allow_pickle=False)
    if reference.logits.full is not None:
        _write_full(archive, reference.logits.full)


def _write_full(archive: zipfile.ZipFile, full: Float32) -> None:
    with archive.open(_member(f"{_FULL}.npy", zipfile.ZIP_STORED), "w", force_zip64=True) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": full.shape}
        np.lib.format.write_array_header_1_0(file, header)
        step = max(1, _STEP // (4 * full.shape[1]))
        for start in range(0, len(full), step):
            file.write(np.ascontiguousarray(full[start : start + step], "<f4").data)


def _member(name: str, compression: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    """The same for the same name on every machine and at every time."""
    info = zipfile.ZipInfo(name, _DATE)
    info.compress_type, info.create_system = compression, 3
    info.external_attr = 0o644 << 16
    if compression == zipfile.ZIP_DEFLATED:
        info._compresslevel = _LEVEL  # type: ignore[attr-defined]  # public only from Python 3.13 on
    return info


def _planes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    flat = little.view(np.uint8).reshape(*array.shape, array.dtype.itemsize)
    return np.ascontiguousarray(np.moveaxis(flat, -1, 0))
