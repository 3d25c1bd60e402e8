"""LoRA adapters that lie beside the weights of a bundle, one file each, to be chosen when it runs.

A file holds two thin matrices for each adapted product of the graph, `NAME.lora_A.weight` [inputs, rank] and
`NAME.lora_B.weight` [rank, outputs] with the scale in it, which are inputs of the graph. Without any they have rank 0,
and the graph gives the model itself.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LlamaExportError, UsageError, did_you_mean
from .bundle import AdapterRecord, Bundle
from .npz import read_array

SUFFIXES = (".lora_A.weight", ".lora_B.weight")
"""How the names of the graph's inputs for adapters end."""

Matrices = dict[str, npt.NDArray[Any]]
Inputs = Mapping[str, tuple[int | None, ...]]


def adapter_named(bundle: Bundle, name: str) -> AdapterRecord:
    """The record of an adapter that can be chosen. Raises UsageError naming those that can be."""
    found = {record.name: record for record in bundle.manifest.choices}
    if name in found:
        return found[name]
    merged = any(record.name == name for record in bundle.manifest.adapters)
    if merged:
        raise UsageError(f"The adapter {name!r} is merged into the weights of {bundle.path}; leave --adapter out.")
    has = f"it has {', '.join(found)}" if found else "it has none to choose; build with --adapter-mode runtime"
    raise UsageError(f"The bundle {bundle.path} has no adapter {name!r}; {has}.{did_you_mean(name, found)}")


def adapter_inputs(session: Any) -> dict[str, tuple[int | None, ...]]:
    """The inputs for adapters of a session's graph, each with its shape, None for the rank, whatever it says there."""
    found = {
        value.name: [size if isinstance(size, int) else None for size in value.shape]
        for value in session.get_overridable_initializers()
    }
    return {
        name: (shape[0], None) if name.endswith(SUFFIXES[0]) else (None, shape[1])
        for name, shape in found.items()
        if name.endswith(SUFFIXES) and len(shape) == 2
    }


def no_adapter(inputs: Inputs, dtype: npt.DTypeLike) -> Matrices:
    """What stands for no adapter: matrices of rank 0."""
    return {name: np.zeros(tuple(size or 0 for size in shape), dtype) for name, shape in inputs.items()}


def load_adapter(bundle: Bundle, name: str, inputs: Inputs) -> Matrices:
    """The matrices of an adapter of the bundle, for each of the graph's inputs.

    Raises UsageError as `adapter_named` does, LlamaExportError when the file is damaged or does not fit the graph.
    """
    record = adapter_named(bundle, name)
    path = bundle.path / str(record.file)
    dtype = np.dtype(bundle.manifest.shape.activations)
    try:
        with zipfile.ZipFile(path) as archive:
            matrices = _read(archive, inputs, dtype, path.stat().st_size)
    except Exception as error:  # zipfile, zlib and NumPy each have kinds of their own for what is damaged
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LlamaExportError(
            f"{path} does not hold the adapter {name!r} for this graph ({reason}); build the bundle again."
        ) from error
    for first in (key for key in matrices if key.endswith(SUFFIXES[0])):
        second = first.removesuffix(SUFFIXES[0]) + SUFFIXES[1]
        if second not in matrices or matrices[first].shape[1] != matrices[second].shape[0]:
            raise LlamaExportError(f"{path} holds {first} and {second} of different ranks; build the bundle again.")
    return matrices


def _read(archive: zipfile.ZipFile, inputs: Inputs, dtype: npt.DTypeLike, room: int) -> Matrices:
    """The matrices, which together may take `room` bytes: they are stored as they are.

    Raises ValueError when there are others, and as `read_array` does.
    """
    if others := sorted(set(archive.namelist()) - {f"{name}.npy" for name in inputs}):
        raise ValueError(f"{others[0]} is no input of the graph")
    matrices = {}
    for name, shape in inputs.items():
        matrices[name] = np.ascontiguousarray(read_array(archive, name, dtype, shape, room))
        room -= matrices[name].nbytes
    return matrices
