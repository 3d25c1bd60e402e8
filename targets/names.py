"""The words that people choose by, apart from what they mean, so that `--help` costs no more than reading them."""

from __future__ import annotations

from collections.abc import Sequence

PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp8", "nvfp4")
"""Of weights; which of them a target has is `made.what_is_made(target).precisions`."""

ONNXRUNTIME, TENSORRT, TENSORRT_RTX = "onnxruntime", "tensorrt", "tensorrt-rtx"
BACKENDS = (ONNXRUNTIME, TENSORRT, TENSORRT_RTX)
SHORT_BACKENDS = {"ort": ONNXRUNTIME, "trt": TENSORRT, "rtx": TENSORRT_RTX}
"""Other names that `--backend` takes."""

PRODUCTS = {ONNXRUNTIME: "ONNX Runtime", TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT-RTX"}


def listed(words: Sequence[str], last: str = "and") -> str:
    """ "fp16, int8 and int4"; empty for no words."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
