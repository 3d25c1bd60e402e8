"""What `llama-export engine` does and tells: build the device's engine, verify it, and say what that took."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .errors import LlamaExportError
from .progress import Progress
from .runtime.bundle import REFERENCE, Bundle
from .runtime.proof.verify import verify
from .runtime.tensorrt import EngineFile, find_engine, this_gpu
from .runtime.tensorrt.api import import_module
from .tables import size
from .targets.engine_device import DeviceEngine, build_engine


def build_and_verify(
    bundle: Bundle, progress: Progress, *, engine_dir: Path | None = None, force: bool = False
) -> DeviceEngine:
    """See `build_engine`; an engine that `verify` does not pass raises LlamaExportError with the gates it fails."""
    has_reference = any(name.startswith(f"{REFERENCE}/") for name in bundle.manifest.files)

    def check(file: EngineFile) -> None:
        if not has_reference:
            progress.warn("The bundle was built with --no-reference, so the engine cannot be verified.")
            return
        verdict = verify(bundle, check_hashes=False, threads=None, progress=progress, engine=file)
        if not verdict.passed:
            raise LlamaExportError(
                f"The engine computes something else than PyTorch ({'; '.join(verdict.failed)}), so it "
                "is not kept; `llama-export run --backend onnxruntime` runs the bundle on the CPU."
            )

    return build_engine(bundle, check, progress, engine_dir=engine_dir, force=force)


def can_be_built(bundle: Bundle, engine_dir: Path | None = None) -> bool:
    """Whether this device lacks the bundle's engine and has what building it takes."""
    engine = bundle.manifest.engine
    if engine is None or isinstance(find_engine(bundle, engine_dir), EngineFile):
        return False
    try:
        import_module(engine.module)
        this_gpu()
    except LlamaExportError:
        return False
    return True


def lines(made: DeviceEngine) -> list[str]:
    """The outcome for people."""
    if made.built is None:
        return [*made.notes, f"The engine is there already: {made.file.path}; --force builds it again."]
    peak = f", {size(made.built.peak_bytes)} of memory at most" if made.built.peak_bytes else ""
    took = f"{size(made.built.size)}, built in {made.built.seconds:.0f} s{peak}"
    return [*made.notes, f"The engine is ready: {made.file.path} ({took})."]


def to_json(made: DeviceEngine) -> dict[str, object]:
    """The outcome for programs."""
    return {
        "schema_version": 1,
        "path": str(made.file.path),
        "module": made.file.module,
        "version": made.file.version,
        "built": None if made.built is None else asdict(made.built),
        "notes": list(made.notes),
    }
