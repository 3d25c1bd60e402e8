"""Which ONNX Runtime the graphs of the `ort` dialect need."""

from __future__ import annotations

CACHE_MINIMUM_ONNXRUNTIME = "1.27.0"
"""For graphs with a cache in int8: the first whose GroupQueryAttention for CPUs reads k_scale and v_scale. 1.25 and
1.26 load such graphs and fail when they run; 1.24 knows no such types (tried with each release up to 1.32).
"""

WINDOW_MINIMUM_ONNXRUNTIME = "1.24.0"
"""For graphs with a sliding window. Until 1.23, GroupQueryAttention's local_window_size did not count the token itself
(github.com/microsoft/onnxruntime/pull/25927), so every token would see one too many.
"""
