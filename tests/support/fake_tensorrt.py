"""TensorRT's Python API for running engines, on ONNX Runtime and the CUDA of `fake_tensorrt_cuda`.

A plan is JSON that says what a real one holds; its engine computes with the bundle's graph. Each run checks what a
real one would corrupt memory over: addresses, shapes within the profile, who shares memory with whom.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from llama_export.runtime.bundle import Bundle
from llama_export.runtime.recipe import read_recipe
from support.fake_tensorrt_cuda import ALIGNMENT, FakeCuda

NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}
OF_ONNX = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}

TensorIOMode = IntEnum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"], start=0)
Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)


@dataclass(frozen=True)
class Release:
    """What sets the Python API of a release apart, from its documentation, not from our code."""

    module: str = "tensorrt"
    version: str = "10.3.0"
    int64: bool = True
    strategies: bool = True
    sizes: tuple[str, ...] = ("device_memory_size", "device_memory_size_v2")
    set_device_memory: bool = True
    aliases: bool = False

    @property
    def rtx(self) -> bool:
        return self.module == "tensorrt_rtx"


RELEASES = {
    "8.6": Release(
        version="8.6.2", int64=False, strategies=False, sizes=("device_memory_size",), set_device_memory=False
    ),
    "10.0": Release(version="10.0.1", sizes=("device_memory_size",), set_device_memory=False),
    "10.3": Release(),
    "10.16": Release(version="10.16.2", aliases=True),
    "11.4": Release(version="11.4.1", sizes=("device_memory_size_v2",), aliases=True),
    "rtx": Release("tensorrt_rtx", "1.7.1.116", sizes=("device_memory_size_v2",), aliases=True),
}


def write_plan(path: Path, bundle: Bundle, release: Release, **changes: Any) -> Path:
    """The plan that a builder makes of the bundle. changes: of its facts, to make wrong ones."""
    profiles = {
        profile.name: {
            name: [extent.minimum, extent.optimum, extent.maximum] for name, extent in profile.inputs.items()
        }
        for profile in read_recipe(bundle).profiles
    }
    facts = {
        "magic": "plan",
        "version": release.version,
        "capability": [8, 7],
        "graph": str(bundle.path / "model.onnx"),
        "profiles": profiles,
        "name": "Unnamed Network 0",
        "types": {},
        "scratch": 4096,
        "dialect": bundle.manifest.dialect,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | changes))
    return path


def fake_module(release: Release, cuda: FakeCuda) -> ModuleType:
    """The module `tensorrt` or `tensorrt_rtx` of a release."""
    module: Any = ModuleType(release.module)
    module.__version__ = release.version
    module.ILogger = type("ILogger", (), dict(Severity.__members__))
    module.TensorIOMode = TensorIOMode
    module.Runtime = lambda logger: Runtime(module, release, cuda, logger)
    module.contexts = []
    if release.strategies:
        module.ExecutionContextAllocationStrategy = SimpleNamespace(STATIC=0, ON_PROFILE_CHANGE=1, USER_MANAGED=2)
    if release.rtx:
        module.IRuntimeCache = RuntimeCache
        module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager", NONE="none")
        module.EngineValidity = IntEnum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"], start=0)
        names = ["VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"]
        names += ["INSUFFICIENT_GPU_MEMORY", "MALFORMED_ENGINE", "CUDA_ERROR"]
        module.EngineInvalidityDiagnostics = SimpleNamespace(
            __members__={name: 1 << index for index, name in enumerate(names)}
        )
        module.specialised = []
    return module


class RuntimeCache:
    """Compiled kernels: it knows how many there were."""

    def __init__(self) -> None:
        self.known = b""

    def deserialize(self, blob: bytes) -> bool:
        self.known = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return self.known or b"compiled"


class Runtime:
    def __init__(self, module: Any, release: Release, cuda: FakeCuda, logger: Any) -> None:
        self.module, self.release, self.cuda, self.logger = module, release, cuda, logger
        self.why = ""
        if release.rtx:
            self.get_engine_validity = self._validity

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        facts, problem = self._read(plan)
        if problem:
            self.logger.log(Severity.INFO, "Loaded engine size: 0 MiB")
            self.logger.log(Severity.ERROR, problem[1])
            return None
        return engine_of(facts, self.module, self.release, self.cuda, self.logger)

    def _read(self, plan: Any) -> tuple[dict[str, Any], tuple[str, str] | None]:
        """A plan's facts, and the diagnosis and message of what is wrong with it, worded as TensorRT does."""
        try:
            facts = json.loads(bytes(memoryview(plan)))
        except ValueError:
            return {}, ("MALFORMED_ENGINE", "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
        if facts["version"] != self.release.version:
            told = f"expecting library version {self.release.version} got {facts['version']}, please rebuild."
            return facts, (
                "VERSION_MISMATCH",
                f"The engine plan file is not compatible with this version of TensorRT, {told}",
            )
        if tuple(facts["capability"]) != self.cuda.capability:
            return facts, (
                "UNSUPPORTED_CC",
                "The engine plan file is generated on an incompatible device, expecting compute 8.7 got compute 8.9.",
            )
        if self.cuda.used + 4096 > self.cuda.total:
            return facts, (
                "INSUFFICIENT_GPU_MEMORY",
                "Requested amount of GPU memory could not be allocated: OutOfMemory",
            )
        return facts, None

    def _validity(self, plan: Any) -> tuple[Any, int]:
        _, problem = self._read(plan)
        validity = self.module.EngineValidity
        if problem is None:
            return validity.VALID, 0
        return validity.INVALID, self.module.EngineInvalidityDiagnostics.__members__[problem[0]]


def engine_of(facts: dict[str, Any], module: Any, release: Release, cuda: FakeCuda, logger: Any) -> Engine:
    """An engine with the attributes that its release has, and no others."""
    engine = Engine(facts, module, release, cuda, logger)
    for name in release.sizes:
        setattr(engine, name, facts["scratch"])
    if release.rtx:
        engine.create_runtime_config = RuntimeConfig
    if release.strategies:
        engine.create_execution_context = engine.make_context
    else:
        engine.create_execution_context_without_device_memory = lambda: engine.make_context(2)
    if release.aliases:
        engine.get_aliased_input_tensor = engine.alias
    return engine


class RuntimeConfig:
    def __init__(self) -> None:
        self.strategy, self.cache = 0, None
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    def __init__(self, facts: dict[str, Any], module: Any, release: Release, cuda: FakeCuda, logger: Any) -> None:
        self.facts, self.module, self.release, self.cuda, self.logger = facts, module, release, cuda, logger
        self.name = facts["name"]
        self.session = onnxruntime.InferenceSession(facts["graph"], providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.outputs = {one.name: one for one in self.session.get_outputs()}
        self.profiles = list(facts["profiles"].values())

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        kind = OF_ONNX[(self.inputs | self.outputs)[name].type]
        kind = "INT32" if kind == "INT64" and not self.release.int64 else kind
        return SimpleNamespace(name=self.facts["types"].get(name, kind))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[profile_index][name]]

    def alias(self, name: str) -> str | None:
        known = self.facts["dialect"] == "trt" and name.startswith("present.")
        return name.replace("present.", "past_key_values.") if known else None

    def make_context(self, how: Any = 0) -> Context:
        config = how if isinstance(how, RuntimeConfig) else None
        assert (config.strategy if config else how) == 2, "contexts share their scratch memory"
        if config:
            self.module.specialised.append(config.dynamic_shapes_kernel_specialization_strategy)
        context = Context(self)
        if self.release.set_device_memory:
            context.set_device_memory = context.take_memory
        if self.release.rtx:
            eager = config is not None and config.dynamic_shapes_kernel_specialization_strategy == "eager"
            context.is_stream_capturable = lambda stream: eager
        self.module.contexts.append(context)
        return context


@dataclass(frozen=True)
class Setting:
    """What a run is given: shapes of inputs, addresses of all."""

    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    profile: int


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.setting = Setting({}, {}, -1)
        self.ran: Setting | None = None
        self.device_memory = 0
        self.runs = 0

    def take_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.facts["scratch"]
        self.device_memory = address

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in self.engine.cuda.handles
        self.setting = replace(self.setting, profile=profile_index)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.setting.profile)
        if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            self.engine.logger.log(
                Severity.ERROR, f"Set dimension {shape} for tensor {name} does not satisfy any optimization profiles."
            )
            return False
        self.setting = replace(self.setting, shapes={**self.setting.shapes, name: tuple(shape)})
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % ALIGNMENT == 0, f"{name} is not aligned"
        self.setting = replace(self.setting, addresses={**self.setting.addresses, name: memory})
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda, setting = self.engine.cuda, self.setting
        assert stream_handle in cuda.handles
        assert setting.shapes.keys() == self.engine.inputs.keys()
        assert setting.addresses.keys() == self.engine.inputs.keys() | self.engine.outputs.keys()
        cuda.view(self.device_memory, self.engine.facts["scratch"])
        if cuda.recording is not None:
            if cuda.no_capture:
                self.engine.logger.log(Severity.ERROR, "operation not permitted when stream is capturing")
                return False
            assert self.ran == setting, "shapes that never ran cannot be recorded"
        self.ran = setting
        cuda.put("run", lambda: self._run(setting))
        return True

    def _run(self, setting: Setting) -> None:
        assert setting == self.setting, "a recording was launched for shapes or addresses that have changed"
        self.runs += 1
        feeds = {name: self._read(name, setting) for name in self.engine.inputs}
        results = dict(zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True))
        self._check_places(setting, feeds, results)
        for name, value in results.items():
            self._view(name, setting, value.shape, value.dtype)[...] = value

    def _read(self, name: str, setting: Setting) -> np.ndarray:
        kind = np.dtype(NUMPY[self.engine.get_tensor_dtype(name).name])
        value = self._view(name, setting, setting.shapes[name], kind).copy()
        return value.astype(np.int64) if kind == np.int32 else value

    def _view(self, name: str, setting: Setting, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
        size = math.prod(shape) * kind.itemsize
        return self.engine.cuda.view(setting.addresses[name], size).view(kind).reshape(shape)

    def _check_places(self, setting: Setting, feeds: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Outputs share the memory of their inputs where the dialect says so; nothing else shares any."""
        sizes = {
            name: value.size * np.dtype(NUMPY[self.engine.get_tensor_dtype(name).name]).itemsize
            for name, value in (feeds | results).items()
        }
        static = self.engine.facts["dialect"] == "trt"
        for (one, size), (other, other_size) in itertools.combinations(sizes.items(), 2):
            start, other_start = setting.addresses[one], setting.addresses[other]
            if static and other == one.replace("past_key_values.", "present."):
                assert start == other_start, f"{other} is not updated in place"
            else:
                assert start + size <= other_start or other_start + other_size <= start, f"{one} and {other} overlap"
