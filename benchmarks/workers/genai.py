"""onnxruntime-genai: its own export or our bundle, with the number of threads set (by default, physical cores)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime_genai as og

if TYPE_CHECKING or __package__:
    from .protocol import main
else:
    from protocol import main


class Genai:
    def __init__(self, model: Path, threads: int, positions: int) -> None:
        config = og.Config(str(model))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = og.Model(config)
        self.positions = positions
        self.tokenizer: og.Tokenizer | None = None

    def _tokenizer(self) -> og.Tokenizer:
        if self.tokenizer is None:
            self.tokenizer = og.Tokenizer(self.model)
        return self.tokenizer

    def encode(self, text: str) -> Sequence[int]:
        return [int(token) for token in self._tokenizer().encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer().decode(np.array(tokens, np.int32)))

    def generate(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.positions, do_sample=False)
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(count):
            if generator.is_done():
                return
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


if __name__ == "__main__":
    main(Genai)
