"""The header of a GGUF file (versions 2 and 3, little-endian), and the bytes of its tensors' rows.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader maps the file (mapped
pages count as resident memory) and takes seconds for a vocabulary; this one reads with pread and keeps only the header.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ... import tables
from ...errors import LlamaExportError
from ...optimize.tensors import UInt8
from ..positioned import read_into
from .blocks import FORMATS

MAX_HEADER = 1 << 25
"""Bytes of metadata and tensor table that are read at most; Llama 3's vocabulary with its merges takes 8 MB."""

_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_FIRST_READ = 1 << 21
_SMALLEST_ENTRY = 8 + 4 + 1  # name length, value type, one byte of value
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # name length, dimension count, one dimension, type, offset
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table.

    shape: rows first, that is ggml's dimensions reversed: (rows, columns) or (columns,).
    type: a key of FORMATS. offset: from the start of the file, bytes. size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return self.size // self.shape[0]


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header. Strings are str, numbers int, float or bool, arrays tuples of one of these."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of the GGUF file at `path`: its metadata and its tensor table, no tensor data.

    Every count and length is checked against the size of the file before anything is allocated for it.
    Raises LlamaExportError, with one sentence, for anything that is not a complete GGUF file of supported types.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return _Header(path, file.fileno(), size).read()
    except OSError as error:
        raise _bad(path, f"the file cannot be opened ({error.strerror}); give a readable GGUF file") from error


def read_rows(path: Path, tensor: GgufTensor, start: int, stop: int) -> UInt8:
    """Return the stored bytes of rows [start, stop) of the first axis: uint8 [stop - start, row_bytes].

    Safe to call from several threads. Raises LlamaExportError when the file has become shorter or cannot be read.
    """
    if not 0 <= start <= stop <= tensor.shape[0]:
        raise IndexError(f"{tensor.name} has rows 0 to {tensor.shape[0]}, not {start} to {stop}")
    rows = np.empty((stop - start, tensor.row_bytes), np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            read_into(file.fileno(), rows.reshape(-1).data, tensor.offset + start * tensor.row_bytes)
    except OSError as error:
        raise _bad(path, f"reading tensor {tensor.name!r} failed ({error.strerror})") from error
    except EOFError as error:
        raise _bad(path, f"the file ended inside tensor {tensor.name!r}; it has changed since it was opened") from error
    return rows


def _bad(path: Path, why: str) -> LlamaExportError:
    return LlamaExportError(f"Cannot read the GGUF file {path}: {why}.")


@dataclass
class _Header:
    """A cursor over the first bytes of the file, which are read as they are needed."""

    path: Path
    descriptor: int
    file_size: int
    data: bytes = b""
    position: int = 0
    what: str = field(default="header")

    def read(self) -> GgufFile:
        tensor_count, entry_count = self._preamble()
        metadata = self._metadata(entry_count)
        if metadata.get("split.count", 0) not in (0, 1):
            raise self._bad(
                f"it is one of {metadata['split.count']} parts of a split model; "
                "merge them with `llama-gguf-split --merge` and give the merged file"
            )
        alignment = self._alignment(metadata)
        entries = self._tensor_table(tensor_count)
        start = -(-self.position // alignment) * alignment
        tensors = {name: self._tensor(name, dims, kind, start + at) for name, (dims, kind, at) in entries.items()}
        return GgufFile(self.path, metadata, tensors)

    def _preamble(self) -> tuple[int, int]:
        if self.file_size < 4 or self._take(4) != b"GGUF":
            raise self._bad("it does not begin with the letters GGUF, so it is not a GGUF file")
        version = int(self._scalar("<u4"))
        if version in (2 << 24, 3 << 24):
            raise self._bad("it is big-endian, and only little-endian files are supported; convert it with gguf-py")
        if version not in (2, 3):
            raise self._bad(f"its version is {version}, and only versions 2 and 3 are supported; convert it anew")
        tensor_count, entry_count = int(self._scalar("<u8")), int(self._scalar("<u8"))
        self._check_room(tensor_count, _SMALLEST_TENSOR, "tensors")
        self._check_room(entry_count, _SMALLEST_ENTRY, "metadata entries")
        return tensor_count, entry_count

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            self.what = f"metadata entry {index}"
            key = self._string()
            self.what = f"metadata entry {key!r}"
            if key in metadata:
                raise self._bad(f"metadata entry {key!r} appears twice")
            metadata[key] = self._value(self._value_type())
        return metadata

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._bad(f"general.alignment must be a power of two, not {alignment!r}")
        return alignment

    def _tensor_table(self, count: int) -> dict[str, tuple[list[int], int, int]]:
        entries: dict[str, tuple[list[int], int, int]] = {}
        for index in range(count):
            self.what = f"entry {index} of the tensor table"
            name = self._string()
            self.what = f"tensor {name!r}"
            if name in entries:
                raise self._bad(f"tensor {name!r} appears twice")
            rank = int(self._scalar("<u4"))
            if not 1 <= rank <= _MAX_DIMENSIONS:
                raise self._bad(f"tensor {name!r} has {rank} dimensions instead of 1 to {_MAX_DIMENSIONS}")
            dims = [int(self._scalar("<u8")) for _ in range(rank)]
            entries[name] = (dims, int(self._scalar("<u4")), int(self._scalar("<u8")))
        return entries

    def _tensor(self, name: str, dims: list[int], kind: int, offset: int) -> GgufTensor:
        """Check one entry of the table; `dims` are ggml's, fastest axis first."""
        known = kind in GGMLQuantizationType.__members__.values()
        type_name = GGMLQuantizationType(kind).name if known else f"number {kind}"
        if type_name not in FORMATS:
            raise self._bad(
                f"tensor {name!r} has the type {type_name}, and only {', '.join(FORMATS)} are supported; quantise the "
                "model to one of them (llama-quantize)"
            )
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if 0 in dims or dims[0] % block:
            raise self._bad(f"tensor {name!r} has {dims[0]} columns, which is not a positive multiple of {block}")
        if block > 1 and len(dims) == 1:
            raise self._bad(f"tensor {name!r} is a vector of type {type_name}; vectors must be F16, BF16 or F32")
        size = math.prod(dims) // block * block_bytes
        if offset + size > self.file_size:
            raise self._bad(
                f"tensor {name!r} ends at byte {offset + size} but the file has only {self.file_size} bytes; "
                "it is truncated, fetch it again"
            )
        return GgufTensor(name, tuple(reversed(dims)), type_name, offset, size)

    def _value_type(self) -> GGUFValueType:
        number = int(self._scalar("<u4"))
        if number not in GGUFValueType.__members__.values():
            raise self._bad(f"{self.what} has the unknown value type {number}")
        return GGUFValueType(number)

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind == GGUFValueType.ARRAY:
            return self._array(self._value_type(), int(self._scalar("<u8")))
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: GGUFValueType, count: int) -> Any:
        if kind == GGUFValueType.ARRAY:
            raise self._bad(f"{self.what} is an array of arrays, which no model of a supported architecture needs")
        if kind == GGUFValueType.STRING:
            self._check_room(count, 8, f"strings in {self.what}")
            return tuple(self._strings(count))
        dtype = np.dtype(_SCALARS[kind])
        self._check_room(count, dtype.itemsize, f"values in {self.what}")
        return tuple(np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist())

    def _scalar(self, dtype: str) -> Any:
        """One number; its exact Python type is int, float or bool."""
        kind = np.dtype(dtype)
        return np.frombuffer(self._take(kind.itemsize), kind)[0].item()

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        """`count` strings, each a 64-bit length and its UTF-8 bytes; written for vocabularies of 10**5 entries."""
        strings = []
        length_at = struct.Struct("<Q").unpack_from
        data, position, available = self.data, self.position, len(self.data)
        for _ in range(count):
            if position + 8 > available:
                data, available = self._grow(position + 8)
            begin = position + 8
            position = begin + length_at(data, position)[0]
            if position > available:
                data, available = self._grow(position)
            try:
                strings.append(data[begin:position].decode())
            except UnicodeDecodeError as error:
                raise self._bad(f"{self.what} holds a string that is not UTF-8") from error
        self.position = position
        return strings

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            self._grow(end)
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def _check_room(self, count: int, each: int, of_what: str) -> None:
        """Refuse a count that cannot be true before anything is allocated for it."""
        if self.position + count * each > min(self.file_size, MAX_HEADER):
            raise self._bad(f"it claims {count} {of_what}, more than the file can hold; it is damaged")

    def _grow(self, end: int) -> tuple[bytes, int]:
        """Have at least the first `end` bytes in `data`; at least doubles what is there."""
        if end > self.file_size:
            raise self._bad(f"{self.what} goes beyond the end of the file; it is truncated or damaged, fetch it again")
        if end > MAX_HEADER:
            raise self._bad(
                f"{self.what} goes beyond the first {tables.size(MAX_HEADER)}, where no header should reach"
            )
        size = min(max(end, 2 * len(self.data), _FIRST_READ), self.file_size, MAX_HEADER)
        data = bytearray(size)
        data[: len(self.data)] = self.data
        try:
            read_into(self.descriptor, memoryview(data)[len(self.data) :], len(self.data))
        except EOFError as error:
            raise self._bad(f"the file ended inside {self.what}; it is being written or truncated") from error
        self.data = bytes(data)
        return self.data, size

    def _bad(self, why: str) -> LlamaExportError:
        return _bad(self.path, why)
