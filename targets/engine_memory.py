"""Whether an engine can be built with the memory that is free; on a Jetson that is the GPU's memory too."""

from __future__ import annotations

from ..errors import LlamaExportError
from ..runtime.recipe import Recipe
from ..tables import size
from .host import memory_bytes


def shortage(recipe: Recipe) -> str | None:
    """A sentence's beginning on what building takes and what is free, None where it is enough or nobody tells."""
    _, free = memory_bytes()
    if not 0 < free < recipe.build_memory_bytes:
        return None
    return f"Building the engine takes about {size(recipe.build_memory_bytes)} of memory, but {size(free)} is free"


def need_memory(recipe: Recipe) -> None:
    """Raise LlamaExportError where building takes more memory than is free."""
    found = shortage(recipe)
    if found is not None:
        raise LlamaExportError(
            f"{found}: end other programs, on a Jetson the desktop too (`sudo systemctl isolate multi-user.target`), "
            "or add swap and try all the same with --force."
        )
