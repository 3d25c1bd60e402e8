"""Where TensorRT 8.6, 10.x, 11.x and TensorRT-RTX 1.x differ for someone who runs engines; nowhere else is asked which
one it is.

The calls that all have (named tensors, `set_input_shape`, `set_tensor_address`, `execute_async_v3`,
`set_optimization_profile_async`) came with 8.5 and are used directly.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ... import names
from ...errors import LlamaExportError

TYPES: Mapping[str, str] = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}
"""NumPy's names of the types that a bundle's engine may have for its inputs and outputs, by those of `DataType`.

TensorRT before 10.0 has no INT64: its parser makes int64 inputs INT32 (TensorRT 10.0 release notes: INT64 added).
"""

INSTALL: Mapping[str, str] = {
    "tensorrt": "on a Jetson it comes with JetPack (`sudo apt install python3-libnvinfer`, and a virtual environment "
    "made with --system-site-packages), elsewhere `pip install tensorrt`",
    "tensorrt_rtx": '`pip install "llama-export[rtx]"`',
}
PRODUCTS: Mapping[str, str] = {module: names.PRODUCTS[backend] for backend, module in names.MODULES.items()}
"""What people call the modules."""


def import_module(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises LlamaExportError saying how to install it.

    Nothing is added to where Windows looks for DLLs: the wheels of tensorrt_rtx load their own by full paths
    (`tensorrt_rtx_libs`), and cuda-bindings holds the CUDA runtime and finds the driver's library in the system.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LlamaExportError(f"{PRODUCTS[name]} is not installed ({error}); {INSTALL[name]}.") from error
    except Exception as error:  # a broken installation raises what its parts raise
        raise LlamaExportError(
            f"{PRODUCTS[name]} is installed but does not work ({type(error).__name__}: {error}); {INSTALL[name]}."
        ) from error
    if not hasattr(module, "Runtime"):
        raise LlamaExportError(f"{PRODUCTS[name]} is not installed, only stubs for type checkers; {INSTALL[name]}.")
    return module


def make_logger(module: Any) -> Any:
    """A logger whose `messages` are the warnings and errors of late, instead of lines on stderr."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR, module.ILogger.WARNING):
                self.messages.append(message)
                del self.messages[:-50]

    return Logger()


def invalidity(module: Any, runtime: Any, plan: Any) -> frozenset[str]:
    """Why a plan would not run here, as TensorRT-RTX tells ("VERSION_MISMATCH"); empty where it does not know.

    Source: `Runtime.get_engine_validity` and `EngineInvalidityDiagnostics` of TensorRT-RTX 1.7; TensorRT has neither.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return frozenset()
    validity, bits = runtime.get_engine_validity(plan)
    if validity != module.EngineValidity.INVALID:
        return frozenset()
    members = module.EngineInvalidityDiagnostics.__members__.items()
    return frozenset(name for name, value in members if int(value) & int(bits))


def scratch_bytes(engine: Any) -> int:
    """What a run needs on the GPU beside weights, inputs and outputs; the most of all profiles.

    Source: 11.x removed `device_memory_size` for `device_memory_size_v2`, which 10.1 added ("Removed Python APIs and
    Replacements", TensorRT 11 migration guide).
    """
    names = ("device_memory_size_v2", "device_memory_size")
    return int(next(getattr(engine, name) for name in names if hasattr(engine, name)))


def create_context(module: Any, engine: Any, kernels: Any, *, one_shape: bool) -> Any:
    """A context without scratch memory of its own, None when TensorRT refuses it.

    kernels: TensorRT-RTX's cache of compiled kernels, see `create_kernel_cache`. one_shape: the shapes of inputs hardly
    change, so TensorRT-RTX shall compile its kernels for them at once; only then can a run be captured.

    Source: `ExecutionContextAllocationStrategy` came with 10.0 for `create_execution_context_without_device_memory`
    ("Added Python APIs in 10.x"); TensorRT-RTX takes all by `IRuntimeConfig` (its documentation, "Working with RTX CUDA
    Graphs", "Working with Dynamic Shapes").
    """
    if not hasattr(module, "ExecutionContextAllocationStrategy"):
        return engine.create_execution_context_without_device_memory()
    ours = module.ExecutionContextAllocationStrategy.USER_MANAGED
    if kernels is None:
        return engine.create_execution_context(ours)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(ours)
    config.set_runtime_cache(kernels)
    strategies = module.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if one_shape else strategies.LAZY
    return engine.create_execution_context(config)


def give_scratch(context: Any, address: int, count: int) -> None:
    """Let a context use `count` bytes on the GPU while it runs. Source: `set_device_memory` came with 10.1."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, count)
    else:
        context.device_memory = address


def create_kernel_cache(module: Any, engine: Any, known: bytes) -> Any:
    """TensorRT-RTX's cache of compiled kernels, with those of a former run where they still fit; else None.

    TensorRT compiles when it builds: it has no `IRuntimeCache`.
    """
    if not hasattr(module, "IRuntimeCache"):
        return None
    cache = engine.create_runtime_config().create_runtime_cache()
    if known:
        cache.deserialize(known)  # False where driver, GPU or version are others: it is then compiled anew
    return cache


def aliased_input(engine: Any, output: str) -> str | None:
    """The input whose memory an output has to share, as far as TensorRT knows.

    Source: `ICudaEngine.get_aliased_input_tensor`, with TensorScatter since 10.15.
    """
    if not hasattr(engine, "get_aliased_input_tensor"):
        return None
    name: str | None = engine.get_aliased_input_tensor(output)
    return name or None


def capturable(context: Any, stream: int) -> bool:
    """Whether a run can be recorded. Source: `is_stream_capturable` of TensorRT-RTX 1.2; TensorRT has to be tried."""
    return not hasattr(context, "is_stream_capturable") or bool(context.is_stream_capturable(stream))
