"""What `gpu.py` says of the card: its name and versions, its bandwidth, and whether TensorRT-RTX runs on it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from typing import Any

import torch

PACKAGES = ("llama-export", "onnxruntime-gpu", "onnxruntime", "torch", "transformers", "tensorrt_rtx")
COPIED_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
"""Of one copy: more than any cache of the device holds."""

_RTX_SECONDS = 180


def facts(device: str) -> dict[str, Any]:
    """Date, card, driver and versions."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "card": _card() if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    asked = ("driver_version", "power.limit", "clocks.max.memory", "mig.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        more = dict(zip(asked, map(str.strip, answer.strip().split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        more = {"nvidia-smi": f"{type(error).__name__}: {error}"}
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def bandwidth(device: str, rounds: int = 7) -> float:
    """Bytes a second that a copy within the device's memory reads and writes together, the median of the rounds."""
    source = torch.ones(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = []
    for _ in range(rounds + 1):
        synchronise(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        found.append(2 * source.nbytes / (time.perf_counter() - began))
    return statistics.median(found[1:])


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def try_tensorrt_rtx() -> dict[str, str]:
    """Build and run a tiny engine in a process of its own, which may die of it; what each step said."""
    try:
        done = subprocess.run(
            [sys.executable, __file__], capture_output=True, text=True, check=False, timeout=_RTX_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"outcome": f"no answer within {_RTX_SECONDS} s"}
    try:
        said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = {"outcome": f"ended with status {done.returncode}", "stderr": done.stderr[-1000:]}
    return said


def tiny_engine() -> dict[str, str]:
    """Steps of making and running y = x + x with TensorRT-RTX; the last one reached is the outcome."""
    try:
        trt = importlib.import_module("tensorrt_rtx")
    except ImportError as error:
        return {"outcome": f"not importable: {error}"}
    said = {"version": str(trt.__version__)}
    try:
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        x = network.add_input("x", trt.float32, (4,))
        total = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
        total.name = "y"
        network.mark_output(total)
        plan = builder.build_serialized_network(network, builder.create_builder_config())
        said["plan"] = "none" if plan is None else f"{plan.nbytes} bytes"
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        said["engine"] = "none" if engine is None else "loaded"
        said["outcome"] = _run_engine(engine) if engine is not None else "the runtime did not load the plan"
    except Exception as error:  # whatever it says is the result
        said["outcome"] = f"{type(error).__name__}: {error}"
    return said


def _run_engine(engine: Any) -> str:
    context = engine.create_execution_context()
    if context is None:
        return "no execution context"
    x, y = torch.arange(4.0, device="cuda"), torch.zeros(4, device="cuda")
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        return "the run failed"
    torch.cuda.synchronize()
    return "runs" if torch.equal(y, x + x) else f"computes {y.tolist()}"


if __name__ == "__main__":
    print(json.dumps(tiny_engine()))
