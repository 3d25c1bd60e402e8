"""The engines that `gpu.py` compares, each with one text at a time: ours, and transformers eager and compiled."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from llama_export.runtime import open_bundle
from llama_export.runtime.choice import choose_backend, open_backend
from llama_export.runtime.sampling import greedy
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

HALF = {"cuda": torch.float16, "cpu": torch.float32}
"""What transformers computes in; half precision is slow and less exact on a CPU."""

COMPILERS: dict[str, dict[str, Any]] = {
    "cuda": {"mode": "reduce-overhead", "fullgraph": True},  # as transformers recommends with a static cache
    "cpu": {"backend": "eager", "fullgraph": True},  # traced as on a GPU, without a C++ compiler
}


class Engine(Protocol):
    """A loaded model. note: what is to be said of how it runs. nbytes: of the weights that one token reads."""

    note: str | None
    nbytes: int

    def prefill(self, ids: Sequence[int]) -> int:
        """Forget all and take a prompt; return the greedy next token, known on the CPU when this returns."""

    def step(self, token: int) -> int:
        """Take one token more; return the greedy next one."""

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Forget all; return [len(ids), vocab]."""


class Ours:
    """A bundle, as `llama-export run` opens it."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        bundle = open_bundle(folder)
        opened = open_backend(bundle, choose_backend(bundle))
        self.backend, self.note, self.nbytes = opened.backend, opened.note, nbytes

    def prefill(self, ids: Sequence[int]) -> int:
        self.backend.rewind(0)
        return greedy(self.backend.extend(ids)[0])

    def step(self, token: int) -> int:
        return greedy(self.backend.step(token))

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self.backend.rewind(0)
        return self.backend.extend(ids, keep=len(ids))


class Transformers:
    """The model before any export. compiled: its steps by torch.compile over a static cache of `positions`."""

    note: str | None = None

    def __init__(self, folder: Path, device: str, positions: int, *, compiled: bool) -> None:
        self.device = device
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=HALF[device]).eval()
        self.model = model.to(device)
        self.length = 0
        self.static = StaticCache(config=self.model.config, max_cache_len=positions) if compiled else None
        self.cache: Any = None
        self.forward = torch.compile(self.model.forward, **COMPILERS[device]) if compiled else self.model.forward
        weights = {id(value): value.nbytes for value in self.model.parameters()}
        embedding = self.model.get_input_embeddings().weight
        if embedding is not self.model.get_output_embeddings().weight:
            weights.pop(id(embedding))
        self.nbytes = sum(weights.values())

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> int:
        if self.static is not None:
            self.static.reset()
        self.cache = self.static if self.static is not None else DynamicCache(config=self.model.config)
        self.length = 0
        return int(self._run(self.model.forward, ids, 1)[-1].argmax())

    @torch.inference_mode()
    def step(self, token: int) -> int:
        return int(self._run(self.forward, [token], 1)[-1].argmax())

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self.cache, self.length = DynamicCache(config=self.model.config), 0
        found: npt.NDArray[np.float32] = self._run(self.model.forward, ids, 0).float().cpu().numpy()
        return found

    def _run(self, forward: Any, ids: Sequence[int], keep: int) -> torch.Tensor:
        """Logits [keep, vocab] after the last tokens, 0 for all, on the device."""
        positions = torch.arange(self.length, self.length + len(ids), device=self.device)[None]
        tokens = torch.tensor([list(ids)], device=self.device)
        result = forward(
            tokens, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=keep
        )
        self.length += len(ids)
        logits: torch.Tensor = result.logits[0]
        return logits


def free(device: str) -> None:
    """Give back what engines held that are no longer referred to."""
    gc.collect()
    if device == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
