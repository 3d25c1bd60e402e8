"""Running the engines of a bundle with TensorRT or TensorRT-RTX. Importing it needs neither, nor CUDA."""

from __future__ import annotations

from .engine import EngineFile
from .engine_label import engine_label
from .executor import TensorRTExecutor
from .find import find_engine, this_gpu
from .places import device_label, engine_folder

__all__ = ["EngineFile", "TensorRTExecutor", "device_label", "engine_folder", "engine_label", "find_engine", "this_gpu"]
