"""The methods that a build knows, by the name that `--method` takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...optimize.equivalence import Seam
from ...optimize.formats import Format
from ...optimize.quantisers.equalise import Sizes, column_sizes, equalised, read_sizes
from ...optimize.quantisers.gptq import CORRECTION, DAMPING, ROUNDS, correction, gptq, inputs_of
from ...optimize.quantisers.search import search
from ...optimize.tensors import Blocks, Float32
from .method import DataFree, Method
from .statistics import Channels, Statistics


def _solve(weight: torch.Tensor, statistics: Statistics, format: Format) -> Blocks:
    width = format.padded(weight.shape[1])
    if statistics.cross is not None:
        cross = statistics.cross  # whose memory the correction takes: no other is told of it
        weight = weight @ statistics.once("correction", lambda: cross.copy_(correction(statistics.hessian, cross)))
    inputs = statistics.once(f"inputs {width}", lambda: inputs_of(statistics.hessian, width))
    return gptq(weight, inputs, format)


def _equalised(
    seams: tuple[Seam, ...],
    weights: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Channels],
    formats: Mapping[str, Format],
) -> dict[Seam, Float32]:
    found = {}
    for seam in seams:
        first, formats_of_seam = inputs[seam.consumers[0]], [formats[name] for name in seam.consumers]
        sizes = Sizes(column_sizes(seam, weights).cpu(), read_sizes(seam, first.mean_square))
        found[seam] = equalised(sizes, formats_of_seam)
    return found


GPTQ = Method(
    "gptq",
    version=1,
    told="GPTQ by llama-export",
    solve=_solve,
    cross=True,
    scales=_equalised,
    settings={"damping": DAMPING, "rounds": ROUNDS, "correction": CORRECTION},
)


def searching(importances: Mapping[str, Float32]) -> DataFree:
    """Search with what each column counts for, by name of the matrix; those without are searched as if all counted the
    same.
    """

    def rows(name: str, values: Float32, format: Format) -> Blocks:
        return search(values, format, importances.get(name))

    return DataFree("search", 1, rows)
