"""The words that manifests, targets and the command line share: dialects, backends, methods.

Apart from what they mean, so that `--help` costs no more than reading them.
"""

from __future__ import annotations

from collections.abc import Mapping

CACHE_PRECISIONS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8", "fp8": "float8e4m3fn"}
"""Of the cache, and the types that they stand for; those of a target are `targets.made.what_is_made(target).caches`."""

ORT, TRT, TRT_PRIMITIVE = DIALECTS = ("ort", "trt", "trt-primitive")
"""Of graphs; see docs/architecture.md."""

ONNXRUNTIME, TENSORRT, TENSORRT_RTX = "onnxruntime", "tensorrt", "tensorrt-rtx"
BACKENDS: Mapping[str, tuple[str, ...]] = {
    ONNXRUNTIME: (ORT,),
    TENSORRT: (TRT, TRT_PRIMITIVE),
    TENSORRT_RTX: (TRT,),
}
"""What a bundle may be made for, and the dialects that this takes."""

SHORT_BACKENDS = {"ort": ONNXRUNTIME, "trt": TENSORRT, "rtx": TENSORRT_RTX}
"""Other names that `--backend` takes."""

PRODUCTS = {ONNXRUNTIME: "ONNX Runtime", TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT-RTX"}
"""What people call them."""

MODULES: Mapping[str, str] = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
"""The Python module of each builder of engines."""

BUILT_IN = "built-in"
"""What stands for our own text to calibrate on, where a file may be named."""

RTN, SEARCH, GPTQ = METHODS = ("rtn", "search", "gptq")
"""Of quantising weights: rounding to nearest, searching for scales, and solving for the errors over a text."""
