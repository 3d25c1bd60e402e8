"""The logits of a GGUF file by llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama_cpp import Llama

if TYPE_CHECKING or __package__:
    from .quality import Float32, Int64, Logits, main
else:
    from quality import Float32, Int64, Logits, main


def load(model: Path, threads: int, length: int, exact: bool) -> Logits:
    loaded = Llama(str(model), n_ctx=length, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)

    def logits(ids: Int64) -> Float32:
        loaded.reset()
        loaded.eval(ids.tolist())
        result: Float32 = loaded.scores[: len(ids)].copy()
        return result

    return logits


if __name__ == "__main__":
    main(load)
