"""llama-export's runtime, greedily and without turning tokens into text, as the other workers do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_export.runtime import load
from llama_export.runtime.sampling import greedy

if TYPE_CHECKING or __package__:
    from .protocol import main
else:
    from protocol import main


class Ours:
    def __init__(self, model: Path, threads: int, positions: int) -> None:
        self.model = load(model, threads=threads)

    def encode(self, text: str) -> Sequence[int]:
        return self.model.tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.model.tokenizer.decode(tokens)

    def generate(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        backend = self.model.backend
        backend.rewind(0)
        token = greedy(backend.extend(prompt)[0])
        yield token
        for _ in range(count - 1):
            token = greedy(backend.step(token))
            yield token


if __name__ == "__main__":
    main(Ours)
