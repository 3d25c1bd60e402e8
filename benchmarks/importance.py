"""Measures what llama.cpp calls an importance matrix: the mean square of each column of what a projection multiplies.

    python benchmarks/importance.py FOLDER TEXT FILE.npz [--tokens 20000]

FOLDER is a Hugging Face folder, TEXT a file to run through it in windows of 512 tokens, in float32 by PyTorch. FILE
gets float32 [columns] by llama.cpp's names of the projections; as with its own llama-imatrix, embedding and head have
none. llama-cpp-python hands it to llama.cpp (workers/llamacpp_quantise.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_export.errors import LlamaExportError
from llama_export.export.gguf.source import gguf_name
from llama_export.optimize.tensors import Float32
from tokenizers import Tokenizer

LENGTH = 512


def mean_squares(folder: Path, text: str, most: int) -> dict[str, Float32]:
    """The mean square of each column that each projection reads, by llama.cpp's name of its weight.

    Raises LlamaExportError when the text has no token.
    """
    import torch  # noqa: PLC0415 (seconds, and only measuring needs it)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids[:most]
    if not ids:
        raise LlamaExportError("The text has no token; give one of some thousand words.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def before(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        module.register_forward_pre_hook(before)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            watch(gguf_name(f"{name}.weight"), module)
    with torch.inference_mode():
        for start in range(0, len(ids), LENGTH):
            model(torch.tensor([ids[start : start + LENGTH]]), logits_to_keep=1)
    return {name: (total / len(ids)).float().numpy() for name, total in sums.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=20000, help="of the text, at most")
    arguments = parser.parse_args()
    try:
        text = arguments.text.read_text(encoding="utf-8")
        found: dict[str, Any] = mean_squares(arguments.folder, text, arguments.tokens)
        np.savez(arguments.file, **found)
    except (LlamaExportError, OSError) as error:
        print(f"importance.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
