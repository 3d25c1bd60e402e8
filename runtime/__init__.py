"""What ships to the device: run a bundle with NumPy, tokenizers, Jinja and an inference engine, without PyTorch.

    from llama_export.runtime import GenerationOptions, load

    model = load("bundles/smollm2")
    print(model.generate("Once upon a time", GenerationOptions(max_new_tokens=64)).text)
    for piece in model.stream_chat([{"role": "user", "content": "What is the capital of France?"}]):
        print(piece.text, end="", flush=True)

These names are the public interface. They are imported when they are first used, so that reading a manifest costs no
more than reading it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle, Manifest, open_bundle
    from .conversation import Conversation
    from .generate import GenerationOptions, Piece, Result, Stream
    from .model import Model, load
    from .sampling import SamplingOptions

__all__ = [
    "Bundle",
    "Conversation",
    "GenerationOptions",
    "Manifest",
    "Model",
    "Piece",
    "Result",
    "SamplingOptions",
    "Stream",
    "load",
    "open_bundle",
]

_HOMES = {
    "bundle": ("Bundle", "Manifest", "open_bundle"),
    "conversation": ("Conversation",),
    "generate": ("GenerationOptions", "Piece", "Result", "Stream"),
    "model": ("Model", "load"),
    "sampling": ("SamplingOptions",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value
