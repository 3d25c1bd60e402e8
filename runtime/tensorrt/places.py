"""Where engines that were built on a device lie: in the user's cache folder, since a bundle never changes.

The folder's name holds all that an engine is tied to, so an update of TensorRT leads to a new build, not to a crash.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import LlamaExportError
from ..hashes import cache_folder

ENGINES_FOLDER = "engines"
PLAN_FILE, TIMING_CACHE_FILE, LOG_FILE = "engine.plan", "timing.cache", "build.log"
"""What a build leaves in an engine's folder: the plan appears last, whole, and once it was verified."""

RUNTIME_CACHE_FILE = "runtime.cache"
"""The kernels that TensorRT-RTX compiles when it first runs an engine."""

_OTHER = re.compile(r"[^a-z0-9.]+")


def device_label(name: str, compute_capability: str) -> str:
    """A GPU in words that can name a folder: "nvidia-geforce-rtx-4090-sm8.9"."""
    words = _OTHER.sub("-", name.lower()).strip("-.")[:64]
    return f"{words or 'gpu'}-sm{compute_capability}"


def engine_folder(manifest_sha256: str, module: str, version: str, device: str, engine_dir: Path | None = None) -> Path:
    """The folder of the engine of one bundle for one device; it need not exist.

    manifest_sha256: `Bundle.manifest_sha256`. module: "tensorrt" or "tensorrt_rtx"; version: its `__version__`.
    device: as `device_label` writes it. engine_dir: where all engines lie, by default in the user's cache folder.
    Raises LlamaExportError when the user has no cache folder and `engine_dir` is None.
    """
    base = engine_dir
    if base is None:
        cache = cache_folder()
        if cache is None:
            raise LlamaExportError("Engines have no folder, as this user has no home; name one with --engine-dir DIR.")
        base = cache / ENGINES_FOLDER
    return base / manifest_sha256 / f"{module}-{_OTHER.sub('-', version.lower())}-{device}"
