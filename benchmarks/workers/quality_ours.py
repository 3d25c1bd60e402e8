"""The logits of a bundle by llama-export's runtime: the kernels that ship, or full-precision ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama_export.runtime import open_bundle
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.onnx_file import with_accuracy_level
from llama_export.runtime.session import read_graph

if TYPE_CHECKING or __package__:
    from .quality import Float32, Int64, Logits, main
else:
    from quality import Float32, Int64, Logits, main


def load(model: Path, threads: int, length: int, exact: bool) -> Logits:
    bundle = open_bundle(model)
    graph = with_accuracy_level(read_graph(bundle), 0) if exact else None
    backend = OnnxRuntimeBackend(bundle, model=graph, threads=threads)

    def logits(ids: Int64) -> Float32:
        backend.rewind(0)
        return backend.extend(ids, keep=len(ids))

    return logits


if __name__ == "__main__":
    main(load)
