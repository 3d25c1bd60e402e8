"""Safetensors files, one or several, read row by row with `pread`.

The format: https://huggingface.co/docs/safetensors, eight bytes of header length, a JSON header, then the data. Never
mapped into memory, because file-mapped pages count as resident and a streamed build would seem, and on small machines
be, as large as its checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LlamaExportError
from ..optimize.formats import FLOATS
from ..optimize.tensors import Float32, SourceTensor
from ..tables import size
from .json_object import parse_object, read_object
from .positioned import read_into

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_MOST_JSON = 25_000_000
"""Bytes of a header or index that are parsed; real ones have some hundred thousand."""
_CHUNK = 1 << 18
"""Elements converted at a time, so that 16-bit rows need no second buffer of their size."""

_DTYPES: Mapping[str, npt.DTypeLike] = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"},
}
"""Of the format, and how NumPy reads them; it has no bfloat16 and no float8, whose bits are given."""
_PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.ckpt")


def open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the safetensors files of a checkpoint folder, checked as far as headers allow.

    `model.safetensors`, or the shards of `model.safetensors.index.json`, or shards without an index, or the only
    safetensors file there is. Files stay open as long as a tensor of theirs lives.
    Raises LlamaExportError that names the file when there are none, one is missing, truncated or broken.
    """
    index = folder / INDEX
    if not (folder / _SINGLE).is_file() and index.is_file():
        return _indexed(folder, _read_index(index))
    tensors: dict[str, StoredTensor] = {}
    for path in _unindexed_files(folder):
        found = open_file(path)
        if doubles := sorted(tensors.keys() & found.keys()):
            raise LlamaExportError(
                f"The tensor {doubles[0]} is in {path} and in another safetensors file of that folder; keep one "
                f"checkpoint in the folder, or add its {INDEX}."
            )
        tensors.update(found)
    return tensors


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file.

    Raises LlamaExportError when the file is truncated, or its header is not one of this format.
    """
    file = _File(path)
    return {
        name: StoredTensor(name, entry.dtype, entry.shape, file, entry.offset)
        for name, entry in _read_header(file).items()
    }


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a safetensors file, nothing of it read yet. dtype: the format's name of it, such as BF16.

    Its methods may be called from several threads at once, and hold little more memory than what they return.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: _File
    offset: int

    def array(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of the first axis as stored; bfloat16 and float8 as their bits, unsigned."""
        rows = np.empty((stop - start, *self.shape[1:]), _DTYPES[self.dtype])
        self.file.read_into(rows.reshape(-1), self.offset + start * (rows.nbytes // max(1, stop - start)))
        return rows

    def columns(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Columns [start, stop) of a matrix as stored: [rows, stop - start], one read a row."""
        rows, width = self.shape
        if (start, stop) == (0, width):
            return self.array(0, rows)
        part = np.empty((rows, stop - start), _DTYPES[self.dtype])
        self.file.read_rows_into(part, self.offset + start * part.itemsize, width * part.itemsize)
        return part

    def floats(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) of the first axis as float32; F32, F16 and BF16 only."""
        row = math.prod(self.shape[1:])
        rows = np.empty((stop - start, *self.shape[1:]), dtype=np.float32)
        flat = rows.reshape(-1)
        stored = np.dtype(_DTYPES[self.dtype])
        offset = self.offset + start * row * stored.itemsize
        if self.dtype == "F32":
            self.file.read_into(flat, offset)
            return rows
        buffer = np.empty(min(_CHUNK, flat.size), dtype=stored)
        for first in range(0, flat.size, _CHUNK):
            target = flat[first : first + _CHUNK]
            part = buffer[: target.size]
            self.file.read_into(part, offset + first * stored.itemsize)
            _widen(part, target, self.dtype)
        return rows


def to_floats(stored: npt.NDArray[Any], dtype: str) -> Float32:
    """What `StoredTensor.array` or `columns` gave of an F32, F16 or BF16 tensor, as float32."""
    values = np.empty(stored.shape, np.float32)
    _widen(stored, values, dtype)
    return values


def _widen(part: npt.NDArray[Any], target: Float32, dtype: str) -> None:
    if dtype == "BF16":  # the upper half of a float32
        bits = target.view(np.uint32)
        bits[:] = part
        bits <<= 16
    else:
        target[:] = part


def plain_tensor(stored: StoredTensor) -> SourceTensor:
    """A tensor of floating-point numbers as the rest of the project sees it.

    Raises LlamaExportError for other types.
    """
    if stored.dtype not in FLOATS:
        raise LlamaExportError(
            f"The tensor {stored.name} in {stored.file.path} is stored as {stored.dtype}, but {', '.join(FLOATS)} are "
            "read; take the unquantised checkpoint."
        )
    return SourceTensor(stored.name, stored.shape, stored.dtype, FLOATS[stored.dtype], stored.floats)


@dataclass(frozen=True)
class _Entry:
    """One tensor in a file: `offset` is that of its first byte from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class _File:
    """A file open for positioned reads from any thread; closed when the last tensor of it goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise LlamaExportError(f"{path} is not a plain file; copy or download the checkpoint again.")
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LlamaExportError(
                f"Cannot read {path}: {error.strerror}; check the file and its permissions."
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, values: npt.NDArray[Any], offset: int) -> None:
        """Fill a contiguous one-dimensional array with the bytes from `offset`."""
        with self._explained():
            read_into(self._descriptor, values.view(np.uint8).data, offset)

    def read_rows_into(self, values: npt.NDArray[Any], offset: int, stride: int) -> None:
        """Fill each row of a contiguous matrix with the bytes from `offset`, `stride` further for each."""
        data, row = values.reshape(-1).view(np.uint8).data, values[:1].nbytes
        with self._explained():
            for index in range(len(values)):
                read_into(self._descriptor, data[index * row : (index + 1) * row], offset + index * stride)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LlamaExportError(f"Reading {self.path} failed: {error.strerror}; check the disk.") from error
        except EOFError as error:
            raise LlamaExportError(
                f"{self.path} ended at byte {error} while it was being read; nothing may change it during a build."
            ) from error


def _read_header(file: _File) -> dict[str, _Entry]:
    if file.size < 8:
        raise _truncated(file, 8)
    length = np.empty(1, dtype="<u8")
    file.read_into(length, 0)
    data = 8 + int(length[0])
    if data - 8 > _MOST_JSON:
        raise _broken(file, f"its header would have {size(data - 8)}")
    if data > file.size:
        raise _truncated(file, data)
    text = np.empty(data - 8, dtype=np.uint8)
    file.read_into(text, 8)
    header = parse_object(text.tobytes(), f"The header of {file.path}", unique=True)
    entries = {name: _entry(file, name, value, data) for name, value in header.items() if name != "__metadata__"}
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            raise _broken(file, f"the data of {name} does not follow the tensor before it")
        end += entry.size
    if end > file.size:
        raise _truncated(file, end)
    if end < file.size:
        raise _broken(file, f"it has {file.size} bytes where its header describes {end}")
    return entries


def _entry(file: _File, name: str, value: Any, data: int) -> _Entry:
    if not isinstance(value, Mapping):
        raise _broken(file, f"its header describes {name} wrongly")
    dtype, shape, offsets = value.get("dtype"), _counts(value.get("shape")), _counts(value.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _broken(file, f"its header describes {name} wrongly")
    if dtype not in _DTYPES:
        raise LlamaExportError(
            f"The tensor {name} in {file.path} is stored as {dtype[:40]!r}, which is no type of safetensors that this "
            "version knows; take the checkpoint in bfloat16."
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise _broken(file, f"{name} has {end - begin} bytes, which is not {dtype} of shape {list(shape)}")
    return _Entry(dtype, shape, data + begin, end - begin)


def _counts(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > 8:
        return None
    return tuple(value) if all(type(item) is int and 0 <= item < 2**63 for item in value) else None


def _indexed(folder: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    index = folder / INDEX
    files = sorted(set(weight_map.values()))
    for file in files:
        if file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise LlamaExportError(f"{index} names the file {file!r}, but only files of its own folder are read.")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise LlamaExportError(f"{folder} lacks {_list(missing)}, which {INDEX} names; copy or download all files.")
    found = {file: open_file(folder / file) for file in files}
    for name, file in weight_map.items():
        if name not in found[file]:
            raise LlamaExportError(
                f"{index} says that {name} is in {file}, but it is not; index and files are of different checkpoints."
            )
    return {name: found[file][name] for name, file in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path, most=_MOST_JSON, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise LlamaExportError(f"{path} has no weight_map from tensors to files; download it again.")
    return weight_map


def _unindexed_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if shards:
        stem, count = shards[0]["stem"], int(shards[0]["count"])
        wanted = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        if missing := [name for name in wanted if name not in names]:
            raise LlamaExportError(f"{folder} lacks {_list(missing)}; copy or download all files of the checkpoint.")
        return [folder / name for name in wanted]
    if len(names) == 1:
        return [folder / names[0]]
    if names:
        raise LlamaExportError(
            f"{folder} holds several safetensors files ({_list(names)}) but no {INDEX}; add the index or leave one."
        )
    raise LlamaExportError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    if (folder / "manifest.json").is_file() and (folder / "model.onnx").is_file():
        return f"{folder} is a bundle, not a checkpoint; name the model that it was built from."
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code and is not read; convert them to "
            "safetensors first, with save_pretrained of transformers."
        )
    if (folder / "adapter_model.safetensors").is_file():
        return f"{folder} holds a LoRA adapter and no model; name the model that the adapter was trained on."
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files and no safetensors; name the file, such as {ggufs[0]}."
    return f"{folder} holds no weights; expected {_SINGLE}, or {INDEX} and the files that it names."


def _truncated(file: _File, expected: int) -> LlamaExportError:
    return LlamaExportError(
        f"{file.path} is truncated: expected at least {expected} bytes, found {file.size}; copy or download it again."
    )


def _broken(file: _File, reason: str) -> LlamaExportError:
    return LlamaExportError(f"{file.path} is broken: {reason}; copy or download the file again.")


def _list(names: Iterable[str]) -> str:
    first, *more = names
    return f"{first} and {len(more)} more" if len(more) > 1 else " and ".join([first, *more])
