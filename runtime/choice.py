"""What computes a bundle here: the engine that it has for this GPU, or else ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LlamaExportError, UsageError, did_you_mean
from ..names import BACKENDS, ONNXRUNTIME, ORT
from .backend import OnnxRuntimeBackend
from .bundle import CUDA_PROVIDER, Bundle
from .cuda_backend import CudaBackend
from .executor import Executor, StepBackend
from .ort_executors import onnxruntime_executor
from .sequence import Backend
from .session import import_onnxruntime

if TYPE_CHECKING:
    from .tensorrt import EngineFile


@dataclass(frozen=True)
class Choice:
    """backend: a name of `BACKENDS`. engine: of TensorRT, None for ONNX Runtime. asked: it was asked for, so nothing
    else will do. note: why it is not what the bundle is made for and what to do, None where it is.
    """

    backend: str
    engine: EngineFile | None = None
    asked: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Opened:
    """backend: what computes. note: as of `Choice`."""

    backend: Backend
    note: str | None


def choose_backend(bundle: Bundle, asked: str | None = None, engine_dir: Path | None = None) -> Choice:
    """What to compute with; nothing of the model is loaded yet.

    asked: a name of `BACKENDS`, None for the best that is here. engine_dir: where engines built here lie, None for the
    user's cache folder. Raises UsageError when there is no such backend or the
    bundle is not made for it, LlamaExportError when what was asked for, or all, cannot run here.
    """
    made_for = bundle.manifest.backend
    if asked is not None:
        _refuse_other(bundle, asked)
    if ONNXRUNTIME in (made_for, asked):
        import_onnxruntime(bundle.manifest)
        return Choice(ONNXRUNTIME, asked=asked is not None)
    found = _engine(bundle, engine_dir)
    if not isinstance(found, str):
        return Choice(made_for, found, asked=asked is not None)
    if asked is not None:
        raise LlamaExportError(found)
    return _fallback(bundle, found)


def open_backend(
    bundle: Bundle,
    choice: Choice,
    *,
    threads: int | None = None,
    capacity: int | None = None,
    adapter: str | None = None,
) -> Opened:
    """Load the model. threads, capacity, adapter: as of `OnnxRuntimeBackend`.

    An engine that was not asked for by name and does not load is replaced by ONNX Runtime. Raises LlamaExportError when
    the model cannot be loaded, UsageError when an argument is out of range.
    """
    if choice.engine is not None:
        try:
            return Opened(_on_engine(bundle, choice.engine, capacity, adapter), choice.note)
        except LlamaExportError as error:
            if choice.asked or isinstance(error, UsageError):
                raise
            choice = _fallback(bundle, str(error))
    if bundle.manifest.dialect == ORT:
        if bundle.manifest.provider == CUDA_PROVIDER:
            on_gpu = CudaBackend(bundle, threads=threads, capacity=capacity, adapter=adapter)
            return Opened(on_gpu, choice.note or on_gpu.note)
        return Opened(OnnxRuntimeBackend(bundle, threads=threads, capacity=capacity, adapter=adapter), choice.note)
    backend = StepBackend(bundle, onnxruntime_executor(bundle, threads=threads), capacity=capacity)
    backend.use_adapter(adapter)
    return Opened(backend, choice.note)


def open_rows(bundle: Bundle, choice: Choice, rows: int) -> Executor:
    """The engine of a choice for several texts at once, which `Backend` does not know.

    Raises LlamaExportError when it cannot be loaded, UsageError when it is not for so many texts.
    """
    from .tensorrt import TensorRTExecutor  # noqa: PLC0415 (bundles for ONNX Runtime need none of it)

    assert choice.engine is not None
    return TensorRTExecutor(bundle, choice.engine, rows=rows)


def _refuse_other(bundle: Bundle, asked: str) -> None:
    made_for = bundle.manifest.backend
    if asked not in BACKENDS:
        raise UsageError(f"There is no backend {asked!r}, only {', '.join(BACKENDS)}.{did_you_mean(asked, BACKENDS)}")
    if asked not in (made_for, ONNXRUNTIME):
        runs = " or ".join(dict.fromkeys((made_for, ONNXRUNTIME)))
        raise UsageError(
            f"The bundle {bundle.path} is made for {made_for}: run it with {runs}, or build "
            f"one for a target that has {asked}."
        )


def _engine(bundle: Bundle, engine_dir: Path | None) -> EngineFile | str:
    """The engine for this machine, or a sentence on why there is none."""
    from .tensorrt import find_engine  # noqa: PLC0415 (bundles for ONNX Runtime need none of it)

    return find_engine(bundle, engine_dir)


def _on_engine(bundle: Bundle, engine: EngineFile, capacity: int | None, adapter: str | None) -> Backend:
    from .tensorrt import TensorRTExecutor  # noqa: PLC0415 (bundles for ONNX Runtime need none of it)

    backend = StepBackend(bundle, TensorRTExecutor(bundle, engine), capacity=capacity)
    backend.use_adapter(adapter)
    return backend


def _fallback(bundle: Bundle, reason: str) -> Choice:
    """ONNX Runtime instead of an engine; raises LlamaExportError with both reasons when it cannot run either."""
    try:
        import_onnxruntime(bundle.manifest)
    except LlamaExportError as error:
        raise LlamaExportError(f"{reason} Nor can the CPU run it meanwhile: {error}") from error
    return Choice(ONNXRUNTIME, note=f"ONNX Runtime computes on the CPU: {reason}")
