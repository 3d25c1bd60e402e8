"""The logits of a Hugging Face folder by PyTorch, in float32: the original, or weights that were quantised and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

if TYPE_CHECKING or __package__:
    from .quality import Float32, Int64, Logits, main
else:
    from quality import Float32, Int64, Logits, main


def load(model: Path, threads: int, length: int, exact: bool) -> Logits:
    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(ids: Int64) -> Float32:
        result: Float32 = loaded(torch.from_numpy(ids[None])).logits[0].numpy()
        return result

    return logits


if __name__ == "__main__":
    main(load)
