"""What all methods have in common: codes of a few bits, one scale and zero point for each group of columns; and how
that becomes the blocks that kernels compute with.

    weight[row, column] = scales[row, g] * (codes[row, column] - zeros[row, g]),  g the group of the column

MatMulNBits has codes of 4 and 8 bits and blocks of 16 to 256 consecutive columns. Fewer bits become 4, more become 8,
codes and zero points moved by the same number; larger groups become several blocks with the same scale; groups that do
not lie together do so once the columns are sorted. All of it is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...errors import LlamaExportError
from ...optimize.formats import BLOCK, BLOCKS, EMBEDDING, Format, int_format
from ...optimize.quantise import dequantise
from ...optimize.tensors import Blocks, Float32, Int64, SourceTensor, UInt8


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of a matrix as its quantiser stored them.

    codes: uint8 [rows, columns], in [0, 2**bits); scales: float32 [rows, groups]; zeros: uint8 [rows, groups], None
    where all are 2**(bits - 1).
    """

    codes: UInt8
    scales: Float32
    zeros: UInt8 | None


@dataclass(frozen=True, eq=False)
class GroupedMatrix:
    """A quantised matrix under the name of the weight that it stands for.

    method: for people, GPTQ and the like. group: consecutive columns of a scale, after sorting by `order` (int64
    [columns]) where there is one. zeros: whether the quantiser stored zero points other than the middle. rows: reads
    rows [start, stop).
    """

    name: str
    shape: tuple[int, int]
    method: str
    bits: int
    group: int
    zeros: bool
    rows: Callable[[int, int], Groups]
    order: Int64 | None = None

    def tensor(self) -> SourceTensor:
        """The matrix as the rest of the project sees it.

        Raises LlamaExportError for groups that no block divides, and for an embedding with columns in another order.
        """
        embedding = self.name == EMBEDDING
        if embedding and self.order is not None:
            raise LlamaExportError(
                f"{self.method} has sorted the columns of {self.name}, which no kernel gathers; take another "
                "quantisation, or the unquantised checkpoint."
            )
        wide = 4 if self.bits <= 4 else 8
        # A gathered row has no integer zero points; scale * (middle - zero) added to a block is the same, exactly.
        format = int_format(wide, self._block(), zeros=self.zeros and not embedding, offsets=self.zeros and embedding)
        blocks = _Blocks(self, format)
        return SourceTensor(self.name, self.shape, self.method, format, blocks.values, blocks.read, self.order)

    def _block(self) -> int:
        columns = self.shape[1]
        whole = min(self.group, columns)
        fitting = [block for block in BLOCKS if whole % block == 0]
        if fitting:
            return fitting[-1]
        if whole == columns and self.name != EMBEDDING:  # one scale a row: any block will do, the last is padded
            return BLOCK
        raise LlamaExportError(
            f"{self.name} is quantised in groups of {self.group} columns, but groups of a multiple of {BLOCKS[0]} are "
            "read; take another quantisation, or the unquantised checkpoint."
        )


@dataclass(frozen=True, eq=False)
class _Blocks:
    matrix: GroupedMatrix
    format: Format

    def read(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop) as `SourceTensor.blocks` gives them."""
        matrix, format = self.matrix, self.format
        found = matrix.rows(start, stop)
        codes, zeros, columns = found.codes, found.zeros, matrix.shape[1]
        if matrix.order is not None:
            codes = np.take(codes, matrix.order, axis=1)
        middle = 2 ** (format.bits - 1)
        shift = np.uint8(middle - 2 ** (matrix.bits - 1))
        if shift:
            codes = codes + shift
            zeros = None if zeros is None else zeros + shift
        if padding := -columns % format.block:
            codes = np.pad(codes, ((0, 0), (0, padding)), constant_values=middle)
        group = np.arange(format.blocks(columns)) * format.block // matrix.group
        scales = found.scales[:, group]
        points = None if zeros is None else zeros[:, group]
        if not format.offsets:
            return Blocks(format, codes, scales, points)
        assert points is not None
        exact = scales.astype(np.float64) * (np.float64(middle) - points)
        offsets = exact.astype(np.float32)
        return Blocks(format, codes, scales, None, offsets, int(np.count_nonzero(offsets != exact)))

    def values(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) as `SourceTensor.read` gives them."""
        values = dequantise(self.read(start, stop), self.matrix.shape[1])
        order = self.matrix.order
        return values if order is None else values[:, np.argsort(order)]
