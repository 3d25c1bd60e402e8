"""Which ONNX Runtime the graphs of the `ort` dialect need."""

from __future__ import annotations

WINDOW_MINIMUM_ONNXRUNTIME = "1.24.0"
"""For graphs with a sliding window. Until 1.23, GroupQueryAttention's local_window_size did not count the token itself
(github.com/microsoft/onnxruntime/pull/25927), so every token would see one too many.
"""
