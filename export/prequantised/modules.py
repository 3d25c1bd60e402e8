"""The parts that stand for one weight in a quantised checkpoint, and their checks against config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import LlamaExportError
from ...optimize.formats import FLOATS
from ...optimize.tensors import Int64
from ..safetensors_file import StoredTensor

WHOLE = ("I32",)
"""The type that packed numbers are stored as."""
FLOATING = tuple(FLOATS)


@dataclass(frozen=True, eq=False)
class Module:
    """A quantised projection.

    name: without `.weight`. shape: outputs and inputs, as config.json calls for. parts: what the files hold of it, by
    the last part of the name. method: for people.
    """

    name: str
    shape: tuple[int, int]
    parts: Mapping[str, StoredTensor]
    method: str

    def part(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> StoredTensor:
        """The part of this name. Raises LlamaExportError when it is absent, of another type or shape."""
        found = self.parts.get(name)
        if found is None:
            raise LlamaExportError(
                f"The checkpoint has no tensor {self.name}.{name}, which {self.method} needs beside "
                f"{next(iter(self.parts.values())).name}; take the checkpoint again, all its files."
            )
        if found.dtype not in dtypes:
            raise LlamaExportError(
                f"The checkpoint's tensor {found.name} is stored as {found.dtype}, but {self.method} stores it as "
                f"{' or '.join(dtypes)}; take the checkpoint again."
            )
        if shape is not None and found.shape != shape:
            raise self.misshapen(found, f"{list(shape)}")
        return found

    def misshapen(self, found: StoredTensor, expected: str) -> LlamaExportError:
        """The error for a part of another shape than `expected` says."""
        return LlamaExportError(
            f"The checkpoint's tensor {found.name} has the shape {list(found.shape)}, but {self.method} stores a "
            f"weight of {list(self.shape)}, which config.json expects, with {expected}; the two do not belong "
            "together, take the checkpoint again."
        )

    def group_of(self, part: StoredTensor, groups: int, sizes: tuple[int, ...]) -> int:
        """Columns of each of so many groups: one of `sizes`, which config.json names, or an equal share.

        Raises LlamaExportError when neither gives that many groups.
        """
        columns = self.shape[1]
        if groups == 1:
            return columns
        for size in sizes:
            if size > 0 and -(-columns // size) == groups:
                return size
        if groups < 1 or columns % groups:
            raise self.misshapen(part, f"scales of groups of {' or '.join(map(str, sizes)) or 'equal'} columns")
        return columns // groups

    def order_of(self, part: StoredTensor, group: int) -> Int64 | None:
        """The order that brings the columns of each group together; None where they are so already.

        part: int32 [columns], the group of each column. Raises LlamaExportError when groups are not of `group` columns.
        """
        columns = self.shape[1]
        index = part.array(0, columns).astype(np.int64)
        whole = np.arange(columns) // group
        if np.array_equal(index, whole):
            return None
        order = np.argsort(index, kind="stable")
        if not np.array_equal(index[order], whole):
            raise LlamaExportError(
                f"The checkpoint's tensor {part.name} does not put {group} columns into each group, which "
                f"{self.method} does; it is damaged, or of a variant that is not read."
            )
        return order
