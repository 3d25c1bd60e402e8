"""Where a calibrated method computes: on a GPU that PyTorch has and that is large enough, else on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ...runtime.threads import physical_cores

_SQUARES = 6
"""Square matrices in float32 that are there together at most: sums of products, and what a solver makes of them."""

_BESIDE = 1 << 30
"""Bytes for PyTorch itself, a sequence's activations, and what the solver holds of a matrix."""


def device_for(layer_bytes: int, widest: int) -> torch.device:
    """The device to compute on. layer_bytes: of a decoder layer in float32, or of what is solved of the head at a time
    where that is more; widest: columns of the widest matrix.
    """
    need = 3 * layer_bytes + _SQUARES * widest * widest * 4 + _BESIDE
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > need:
        return torch.device("cuda")
    return torch.device("cpu")


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute without gradients in float32 as it is, no TF32, on one thread for each physical core; the same numbers
    every time on one machine.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(physical_cores())
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
