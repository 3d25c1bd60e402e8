"""PyTorch through transformers: what a user has before any export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING or __package__:
    from .protocol import main
else:
    from protocol import main


class Transformers:
    def __init__(self, model: Path, threads: int, positions: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(self, text: str) -> Sequence[int]:
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens))

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        inputs, cache = torch.tensor([list(prompt)]), None
        for _ in range(count):
            result = self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            inputs = result.logits[:, -1:].argmax(-1)
            yield int(inputs)


if __name__ == "__main__":
    main(Transformers)
