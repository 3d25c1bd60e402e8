"""llama.cpp through llama-cpp-python, with the same number of threads for prompt and decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llama_cpp import Llama

if TYPE_CHECKING or __package__:
    from .protocol import main
else:
    from protocol import main


class LlamaCpp:
    def __init__(self, model: Path, threads: int, positions: int) -> None:
        self.model = Llama(
            str(model), n_ctx=positions, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
        )

    def encode(self, text: str) -> Sequence[int]:
        return list(self.model.tokenize(text.encode()))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.model.detokenize(list(tokens)).decode(errors="replace"))

    def generate(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        self.model.reset()  # else a prefix that two prompts share is not computed again
        yield from islice(self.model.generate(list(prompt), temp=0.0, top_k=1), count)


if __name__ == "__main__":
    main(LlamaCpp)
