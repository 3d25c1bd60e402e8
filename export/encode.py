"""Rows of a checkpoint tensor as the numbers that are stored, and what its own quantisation loses by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import LlamaExportError
from ..optimize.formats import FP32, Format
from ..optimize.quantise import blocks_of, round_scales, stored_values, to_dense
from ..optimize.stored import Role
from ..optimize.tensors import Blocks, SourceTensor
from .loss import Loss

Arrays = Mapping[Role, npt.NDArray[np.generic]]
"""By role: values [n, columns]; or codes uint8 [n, padded columns], one a byte, as in `tensors.Blocks`, and scales,
zeros and offsets [n, blocks], and with a tensor's first rows `global` [1].
"""

Written = tuple[int, list[Loss]]
"""Of a step: how many bytes it wrote, and what the checkpoint's own quantisation lost in it."""


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a checkpoint tensor, to be stored in `format`.

    activations: the dtype that the graph computes in, to which stored values are cast.
    """

    tensor: SourceTensor
    format: Format
    activations: np.dtype[np.generic]
    start: int
    stop: int

    def encoded(self) -> tuple[Arrays, Loss | None]:
        """What is stored, and what the checkpoint's own quantisation lost if it did.

        Raises LlamaExportError for NaN and infinity, and for numbers too large for the type that computes.
        """
        return self._blocks() if self.format.quantised else (self._values(), None)

    def _values(self) -> Arrays:
        rows = self.tensor.read(self.start, self.stop)
        self._check_finite(rows)
        values = to_dense(rows, self.format)
        if self.format != FP32 or self.activations != np.float32:
            self._check_fits(values)
        return {"values": values}

    def _blocks(self) -> tuple[Arrays, Loss | None]:
        read = blocks_of(self.tensor, self.format)(self.start, self.stop)
        stored = round_scales(read, self.activations)
        arrays: dict[Role, npt.NDArray[np.generic]] = {"codes": stored.codes, "scales": stored.scales}
        if stored.zeros is not None:
            arrays["zeros"] = stored.zeros
        if stored.offsets is not None:
            arrays["offsets"] = stored.offsets
        if self.format.tensor_scale and self.start == 0:
            arrays["global"] = np.array([stored.unit], np.float32)
        for before, after in ((read.scales, stored.scales), (read.offsets, stored.offsets)):
            if before is not None and after is not None:
                self._check_finite(before)
                self._check_fits(after)
        return arrays, self._loss(read, stored)

    def _loss(self, read: Blocks, stored: Blocks) -> Loss | None:
        """What the checkpoint's own quantisation loses here; weights that came unquantised have nothing to lose."""
        if not self.format.takes_codes_of(self.tensor.format):
            return None
        changed = read.scales.size if self.tensor.blocks is None else read.rounded + _changed(read, stored)
        if not changed:
            return None
        values = self.tensor.read(self.start, self.stop).astype(np.float64)
        kept = stored_values(self.tensor, self.format, self.start, self.stop, self.activations)
        return Loss(
            self.tensor.name,
            self.tensor.dtype,
            self.format.name,
            changed,
            float(np.square(values - kept).sum()),
            float(np.square(values).sum()),
        )

    def _check_finite(self, values: npt.NDArray[np.generic]) -> None:
        if not np.isfinite(values).all():
            raise LlamaExportError(
                f"The checkpoint's tensor {self.tensor.name} holds NaN or infinite values in rows {self.start} to "
                f"{self.stop - 1}, read as {self.tensor.dtype}; a model's weights are finite, so the file is damaged "
                "or its training diverged."
            )

    def _check_fits(self, stored: npt.NDArray[np.generic]) -> None:
        """Look for numbers that became infinite where they were stored, or will where the graph reads them."""
        with np.errstate(over="ignore"):
            if np.isfinite(stored if self.activations == np.float32 else stored.astype(self.activations)).all():
                return
        raise LlamaExportError(
            f"The checkpoint's tensor {self.tensor.name} holds numbers in rows {self.start} to {self.stop - 1} that do "
            "not fit float16, which ends at 65504; use --precision fp32 with -t cpu, which computes in float32."
        )


def _changed(read: Blocks, stored: Blocks) -> int:
    """Blocks whose scale or offset is another once it is stored."""
    changed = stored.scales != read.scales
    if read.offsets is not None and stored.offsets is not None:
        changed |= stored.offsets != read.offsets
    return int(np.count_nonzero(changed))
