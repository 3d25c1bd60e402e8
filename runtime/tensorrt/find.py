"""Which engine of a bundle runs on this machine: one that was built here, or one that came with the bundle."""

from __future__ import annotations

from pathlib import Path

from ...errors import LlamaExportError
from ..bundle import Bundle, EngineRecord
from . import api
from .cuda import Cuda, Gpu
from .engine import EngineFile
from .places import PLAN_FILE, RUNTIME_CACHE_FILE, device_label, engine_folder


def find_engine(bundle: Bundle, engine_dir: Path | None = None) -> EngineFile | str:
    """The engine to run the bundle with here, or a sentence on why there is none and how to get one.

    engine_dir: where engines built here lie, see `places.engine_folder`.
    """
    record = bundle.manifest.engine
    if record is None:
        return "This bundle is made for ONNX Runtime and has no engine; build one with `-t` of a device with TensorRT."
    try:
        version = str(api.import_module(record.module).__version__)
        gpu = this_gpu()
        folder = engine_folder(
            bundle.manifest_sha256, record.module, version, device_label(gpu.name, gpu.compute_capability), engine_dir
        )
        return _choose(bundle, record, version, gpu, folder)
    except LlamaExportError as error:
        return str(error)


def this_gpu() -> Gpu:
    """The GPU of this machine. Raises LlamaExportError when CUDA for Python is not installed or finds none."""
    cuda = Cuda()
    try:
        return cuda.gpu()
    finally:
        cuda.close()


def _choose(bundle: Bundle, record: EngineRecord, version: str, gpu: Gpu, folder: Path) -> EngineFile | str:
    kernels = folder / RUNTIME_CACHE_FILE
    if (folder / PLAN_FILE).is_file():
        return EngineFile(folder / PLAN_FILE, record.module, version, kernels, built_here=True)
    fitting = [plan for plan in record.plans if gpu.compute_capability in plan.compute_capability]
    for plan in fitting:
        if _same_release(plan.version, version):
            return EngineFile(bundle.file(plan.file), record.module, version, kernels, built_here=False)
    here = f"build one here with `llama-export engine {bundle.path}`"
    product = api.PRODUCTS[record.module]
    if fitting:
        built = fitting[0].version
        return f"The bundle's engine for this GPU was built by {product} {built}, not {version} as is here; {here}."
    if record.plans:
        others = ", ".join(sorted({one for plan in record.plans for one in plan.compute_capability}))
        return (
            f"The bundle's engines are for compute capability {others}, but {gpu.name} has {gpu.compute_capability}; "
            f"{here}."
        )
    return f"No engine was built on this device yet for {product} {version}; {here}."


def _same_release(built: str, here: str) -> bool:
    """Whether two versions are one release: "1.7.1" and "1.7.1.116" are."""
    pairs = list(zip(built.split("."), here.split("."), strict=False))
    return len(pairs) >= 3 and all(one == other for one, other in pairs)
