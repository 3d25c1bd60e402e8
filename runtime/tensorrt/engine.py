"""From a plan to an engine that is what its bundle says: everything that is checked before the GPU computes."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LlamaExportError
from ...tables import size
from ..bundle import DATA_FILE, GRAPH_FILE, Bundle, Shape
from ..recipe import IDS, KEPT, POSITIONS, Profile, Recipe, read_recipe
from ..session import PAST, PRESENT, cache_names
from . import api
from .cuda import Gpu
from .engine_label import engine_label, label_problem

LOGITS = "logits"


@dataclass(frozen=True)
class EngineFile:
    """A plan that fits this machine. module, version: what runs it; kernels: where what TensorRT-RTX compiles is kept;
    built_here: on this device, not with the bundle.
    """

    path: Path
    module: str
    version: str
    kernels: Path
    built_here: bool


@dataclass(frozen=True)
class Engine:
    """A deserialized plan. handle: the `ICudaEngine`; runtime: has to live as long as the engine; types: NumPy's, of
    every input and output; logger: what TensorRT says, see `api.make_logger`.
    """

    module: Any
    runtime: Any
    handle: Any
    logger: Any
    types: Mapping[str, np.dtype[Any]]
    recipe: Recipe


@dataclass(frozen=True)
class _Diagnosis:
    """Why a plan does not load. names: in TensorRT-RTX's diagnostics; pattern: in what TensorRT logs."""

    names: frozenset[str]
    pattern: str
    told: str
    remedy: str


_REBUILD = "build one here with `llama-export engine {bundle}{force}`"
_DIAGNOSES = (
    _Diagnosis(
        frozenset({"MALFORMED_ENGINE"}),
        r"magic|header\.size|blobSize|empty memory|truncat|corrupt",
        "it is damaged, or no engine of {product}",
        _REBUILD,
    ),
    _Diagnosis(
        frozenset({"VERSION_MISMATCH"}),
        r"library version|version tag|serialization version|this version of tensorrt",
        "it was built by another version",
        _REBUILD,
    ),
    _Diagnosis(
        frozenset({"UNSUPPORTED_CC"}),
        r"incompatible device|expecting compute|compute capability (?!check)",
        "it was built for another GPU",
        _REBUILD,
    ),
    _Diagnosis(
        frozenset({"INSUFFICIENT_GPU_MEMORY"}),
        r"out ?of ?memory|cudaErrorMemoryAllocation|cudaError 2\b",
        "the GPU has too little free memory for it ({free} of {total})",
        "end what else uses the GPU, or build with a smaller --precision",
    ),
    _Diagnosis(
        frozenset({"OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "CUDA_ERROR"}),
        r"driver version is insufficient|cudaError 35\b|no CUDA-capable device",
        "NVIDIA's driver is missing or too old (it runs CUDA up to {driver})",
        "update the driver; `llama-export doctor` says what is there",
    ),
)
"""In the order in which they are looked for: a plan that is damaged is often called one of another version as well."""


def load_engine(bundle: Bundle, file: EngineFile, gpu: Gpu) -> Engine:
    """Deserialize a plan and check it.

    Raises LlamaExportError when the module is absent, the plan does not load here, or is not of this bundle.
    """
    recipe = read_recipe(bundle)
    module = api.import_module(file.module)
    logger = api.make_logger(module)
    runtime = module.Runtime(logger)
    handle = _deserialize(bundle, file, gpu, module, runtime, logger)
    for problem in _problems(bundle, recipe, handle):
        raise LlamaExportError(
            f"{file.path} is no engine of {bundle.path}: {problem}; {_mend(_REBUILD, bundle, file)}."
        )
    types = {name: _type(handle, name) for name in _tensors(handle)}
    return Engine(module, runtime, handle, logger, types, recipe)


def _deserialize(bundle: Bundle, file: EngineFile, gpu: Gpu, module: Any, runtime: Any, logger: Any) -> Any:
    """The `ICudaEngine`; the plan is mapped, not read, so that its pages can be dropped again while it is copied."""
    try:
        count = file.path.stat().st_size
        if not 0 < count < gpu.total_bytes:
            raise LlamaExportError(
                f"{file.path} has {size(count)}, but an engine for {gpu.name} has more than none and less than its "
                f"memory of {size(gpu.total_bytes)}; {_mend(_REBUILD, bundle, file)}."
            )
        with file.path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            handle = runtime.deserialize_cuda_engine(plan)
            reasons = api.invalidity(module, runtime, plan) if handle is None else frozenset()
    except OSError as error:
        raise LlamaExportError(f"{file.path} cannot be read: {error.strerror}.") from error
    if handle is None:
        raise LlamaExportError(_refusal(bundle, file, gpu, reasons, logger.messages))
    return handle


def _refusal(bundle: Bundle, file: EngineFile, gpu: Gpu, reasons: frozenset[str], messages: list[str]) -> str:
    """One sentence on why a plan does not load, from what TensorRT-RTX's diagnostics or the log say."""
    product = api.PRODUCTS[file.module]
    log = "\n".join(messages)
    found = [one for one in _DIAGNOSES if one.names & reasons] or [
        one for one in _DIAGNOSES if re.search(one.pattern, log, re.IGNORECASE)
    ]
    facts = {"product": product, "free": size(gpu.free_bytes), "total": size(gpu.total_bytes), "driver": gpu.driver}
    told, remedy = (found[0].told.format(**facts), found[0].remedy) if found else ("it gives no known reason", _REBUILD)
    said = f' ("{messages[0].strip()[:200]}")' if messages else ""
    return (
        f"{product} {file.version} cannot load {file.path} on {gpu.name}: {told}{said}; {_mend(remedy, bundle, file)}."
    )


def _mend(remedy: str, bundle: Bundle, file: EngineFile) -> str:
    """A remedy for this bundle; an engine that was built here is only replaced when that is asked for."""
    return remedy.format(bundle=bundle.path, force=" --force" if file.built_here else "")


def _problems(bundle: Bundle, recipe: Recipe, handle: Any) -> Iterator[str]:
    """What tells that an engine is not that of the bundle and its recipe."""
    files = bundle.manifest.files
    expected = engine_label(files[GRAPH_FILE].sha256, files[DATA_FILE].sha256)
    if problem := label_problem(handle.name, expected):
        yield problem
    wanted, tensors = _signature(bundle.manifest.shape), _tensors(handle)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        yield f"it has {'no' if name in wanted else 'a'} tensor {name}"
    for name, types in wanted.items():
        found = api.TYPES.get(handle.get_tensor_dtype(name).name, "another type")
        if found not in types:
            yield f"{name} is {found} where {' or '.join(types)} is expected"
        is_input = tensors[name] == "INPUT"
        if is_input != (name in recipe.profiles[0].inputs):
            yield f"{name} is an {'input' if is_input else 'output'}"
    if handle.num_optimization_profiles != len(recipe.profiles):
        yield f"it has {handle.num_optimization_profiles} profiles, not {len(recipe.profiles)}"
    for index, profile in enumerate(recipe.profiles):
        yield from _profile_problems(handle, index, profile)
    for name in cache_names(bundle.manifest.shape):
        if api.aliased_input(handle, PRESENT + name) not in (None, PAST + name):
            yield f"{PRESENT + name} shares its memory with another input than {PAST + name}"


def _profile_problems(handle: Any, index: int, profile: Profile) -> Iterator[str]:
    for name, extent in profile.inputs.items():
        least, _, most = (tuple(dims) for dims in handle.get_tensor_profile_shape(name, index))
        if (least, most) != (extent.minimum, extent.maximum):
            yield (
                f"in the profile {profile.name} {name} is from {least} to {most}, "
                f"not from {extent.minimum} to {extent.maximum}"
            )


def _signature(shape: Shape) -> dict[str, tuple[str, ...]]:
    """The types that every input and output may have, as NumPy calls them."""
    whole = dict.fromkeys((IDS, POSITIONS, KEPT), ("int64", "int32"))
    cache = {side + name: (shape.cache_dtype,) for name in cache_names(shape) for side in (PAST, PRESENT)}
    return {**whole, **cache, LOGITS: ("float32",)}


def _tensors(handle: Any) -> dict[str, str]:
    """Every input and output of an engine, and which of the two it is: "INPUT", "OUTPUT"."""
    names = (handle.get_tensor_name(index) for index in range(handle.num_io_tensors))
    return {name: handle.get_tensor_mode(name).name for name in names}


def _type(handle: Any, name: str) -> np.dtype[Any]:
    return np.dtype(api.TYPES[handle.get_tensor_dtype(name).name])
