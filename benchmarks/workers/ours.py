"""llama-export's runtime, greedily and without turning tokens into text, as the other workers do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_export.runtime import open_bundle
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.sampling import greedy
from llama_export.runtime.text import Tokenizer

if TYPE_CHECKING or __package__:
    from .protocol import main
else:
    from protocol import main


class Ours:
    def __init__(self, model: Path, threads: int, positions: int) -> None:
        bundle = open_bundle(model)
        self.backend = OnnxRuntimeBackend(bundle, threads=threads)
        self.tokenizer = Tokenizer.load(bundle.file("tokenizer.json"), bundle.manifest.tokens)

    def encode(self, text: str) -> Sequence[int]:
        return self.tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def generate(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        self.backend.rewind(0)
        token = greedy(self.backend.extend(prompt)[0])
        yield token
        for _ in range(count - 1):
            token = greedy(self.backend.step(token))
            yield token


if __name__ == "__main__":
    main(Ours)
