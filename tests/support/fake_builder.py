"""Stands in for the module `tensorrt` in the process that builds: of the release that its folder says, it takes what
that release takes and writes down what it was told. Copied as `tensorrt.py` by `install`; it computes nothing.
"""

from __future__ import annotations

import enum
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

_HERE = Path(__file__).parent
_FACTS = json.loads((_HERE / "fake.json").read_text()) if (_HERE / "fake.json").is_file() else {"version": "0"}
__version__ = _FACTS["version"]
_MAJOR = int(__version__.split(".")[0])
_TOLD = {"flags": [], "layers": {}}

float32, float16, int32 = "float32", "float16", "int32"


def install(folder: Path, version: str, **behaviour: object) -> None:
    """Make `folder` one that holds this release. behaviour: "die", a signal for the build to end by."""
    folder.mkdir()
    (folder / "tensorrt.py").write_text(Path(__file__).read_text())
    (folder / "fake.json").write_text(json.dumps({"version": version, **behaviour}))


def told(folder: Path) -> dict[str, object]:
    """What the builder was told."""
    return json.loads((folder / "told.json").read_text())


_WEAK = ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"] if _MAJOR < 11 else []
BuilderFlag = enum.IntEnum("BuilderFlag", ["TF32", *_WEAK], start=0)
_TYPED = {"EXPLICIT_BATCH": 0} if _MAJOR < 10 else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", _TYPED)
LayerType = enum.IntEnum("LayerType", ["CONSTANT", "SHAPE", "ELEMENTWISE", "QUANTIZE", "DEQUANTIZE"])
MemoryPoolType = enum.IntEnum("MemoryPoolType", ["WORKSPACE"])
ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


if _MAJOR >= 10:

    class IProgressMonitor:
        pass


class _Layer:
    def __init__(self, name: str, kind: LayerType, inputs: list[str], dtype: str) -> None:
        self.name, self.type, self.precision, self.num_outputs = name, kind, None, 1
        self._inputs, self._dtype = inputs, dtype
        self.num_inputs = len(inputs)

    precision_is_set = False

    def get_input(self, index: int) -> object:
        return SimpleNamespace(name=self._inputs[index])

    def get_output(self, _: int) -> object:
        return SimpleNamespace(dtype=self._dtype)

    def set_output_type(self, _: int, dtype: str) -> None:
        _TOLD["layers"][self.name] = [self.precision, dtype]


class _Network:
    def __init__(self) -> None:
        self.name, self.inputs, self.num_outputs = "", {"x": (-1, 4)}, 1
        self.layers = [
            _Layer("norm/float32/Mul", LayerType.ELEMENTWISE, ["x"], float16),
            _Layer("norm/float32/axes", LayerType.CONSTANT, [], float32),
            _Layer("norm/float32/Shape", LayerType.ELEMENTWISE, ["x"], int32),
            _Layer("mlp/MatMul", LayerType.ELEMENTWISE, ["x"], float16),
        ]
        self.num_layers, self.num_inputs = len(self.layers), 1

    def get_layer(self, index: int) -> _Layer:
        return self.layers[index]

    def __iter__(self) -> object:
        return iter(self.layers)

    def get_input(self, index: int) -> object:
        name = list(self.inputs)[index]
        return SimpleNamespace(name=name, shape=self.inputs[name], is_shape_tensor=False, dtype=float16)


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        if b"unsupported" in Path(path).read_bytes():
            self.num_errors = 1
            return False
        return True

    def get_error(self, _: int) -> object:
        old = {
            "desc": lambda: "no importer\n found",
            "node": lambda: 3,
            "func": lambda: "",
            "code": lambda: SimpleNamespace(name="UNSUPPORTED_NODE"),
        }
        new = {"node_name": lambda: "attn", "node_operator": lambda: "Attention"}
        return SimpleNamespace(**old, **(new if _MAJOR >= 10 else {}))


class _Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+"


class _Config:
    def __init__(self) -> None:
        self.profiles = 0

    def add_optimization_profile(self, _: object) -> None:
        self.profiles += 1

    def set_flag(self, flag: BuilderFlag) -> None:
        _TOLD["flags"].append(flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        pass

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        _TOLD["workspace"] = size

    def create_timing_cache(self, data: bytes) -> _Cache | None:
        return None if data == b"damaged" else _Cache(data)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> _Cache:
        return self.cache


class _Profile:
    def set_shape(self, *_: object) -> None:
        pass


class Runtime:
    pass


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> _Network:
        _TOLD["network"] = flags
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        self.logger.log(ILogger.Severity.INFO, "building")
        if "die" in _FACTS:
            os.kill(os.getpid(), signal.Signals[_FACTS["die"]])
        level = getattr(config, "builder_optimization_level", None)
        facts = {"profiles": config.profiles, "level": level, "monitor": getattr(config, "progress_monitor", None)}
        facts["monitor"] = facts["monitor"] is not None
        (_HERE / "told.json").write_text(json.dumps({**_TOLD, **facts, "name": network.name}))
        if "fail" in _FACTS:
            self.logger.log(ILogger.Severity.ERROR, "no kernel\n for mlp/MatMul.")
            return None
        return b"plan"
