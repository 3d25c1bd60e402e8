"""llama-export: from a Llama checkpoint to a verified bundle that an edge device runs without PyTorch."""

__version__ = "0.1.0"
