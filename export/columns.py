"""Matrices that are stored transposed: many rows of the checkpoint are many columns there, written as one panel.

A column is a byte or less in each row of the file, so that single ones would touch every page of it. A panel holds
enough of them that each write is long, and is small beside the matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..optimize.formats import Format
from ..optimize.stored import Role
from .encode import Part, Written
from .region import Region, in_complement, pack_rows, transposed, write_at

_PANEL = 1 << 23
"""Codes of a panel, one byte each while they are collected."""


def panel_rows(columns: int) -> int:
    """Rows of the checkpoint that make a panel: an even number, as two may share a byte."""
    return max(2, _PANEL // columns // 64 * 64)


def panels(parts: Iterable[tuple[int, Part]], regions: Mapping[Role, Region], file: int) -> Iterator[Panel]:
    """Panels of `panel_rows` each, the last one of what is left. parts: each with its first row in the whole."""
    for _, group in itertools.groupby(parts, lambda item: item[0] // panel_rows(item[1].tensor.shape[1])):
        rows, together = zip(*group, strict=True)
        yield Panel(together, regions, rows[0], file)


@dataclass(frozen=True)
class Panel:
    """Columns from `start` on of a transposed matrix: the rows of `parts`, one after another."""

    parts: Sequence[Part]
    regions: Mapping[Role, Region]
    start: int
    file: int

    def run(self) -> Written:
        """Write the panel."""
        collected: dict[Role, npt.NDArray[np.generic]] = {}
        losses, row, size = [], 0, 0
        for part in self.parts:
            arrays, loss = part.encoded()
            losses += [loss] if loss is not None else []
            for role, array in arrays.items():
                if role == "global":
                    write_at(self.file, array.tobytes(), self.regions[role].offset)
                    size += array.nbytes
                    continue
                if role not in collected:
                    collected[role] = self._empty(role, array)
                collected[role][row : row + len(array)] = array
            row += part.stop - part.start
        return size + sum(self._put(role, array) for role, array in collected.items()), losses

    @property
    def _format(self) -> Format:
        return self.parts[0].format

    def _empty(self, role: Role, like: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Where the rows of all parts are collected; an odd one of 4 bits, the matrix's last, has zeros beside it."""
        format, rows = self._format, sum(part.stop - part.start for part in self.parts)
        odd = rows % 2 if format.bits == 4 else 0
        whole = np.empty((rows + odd, like.shape[1]), self.regions[role].dtype)
        zero = 2 ** (format.bits - 1) if format.coding == "int" else 0
        whole[rows:] = {"codes": zero, "scales": 1, "offsets": 0}[role]
        return whole

    def _put(self, role: Role, rows: npt.NDArray[np.generic]) -> int:
        region, format = self.regions[role], self._format
        bits = format.bits if role == "codes" else region.dtype.itemsize * 8
        if role == "codes":
            rows = in_complement(pack_rows(rows.astype(np.uint8, copy=False), bits), format, region)
        lines = transposed(rows).view(np.uint8)
        at = region.offset + self.start * bits // 8
        if lines.shape[1] == region.row_bytes:
            write_at(self.file, lines.data, at)
        else:
            for index, line in enumerate(lines):
                write_at(self.file, line.data, at + index * region.row_bytes)
        return lines.nbytes
