"""The dialects `trt` and `trt-primitive`: the same numbers as PyTorch, on the very file that TensorRT gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.graphs import VARIANTS, llama, logits_of, source_tensors, traced_once, with_stored_weights
from support.replay import DIALECTS, Replay, lower_to, write


def replay(dialect: str, variant: str, folder: Path, *, rows: int = 1, dtype: torch.dtype = torch.float32):
    """A graph of this variant ready to run, and the model whose weights it stores."""
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    graph = traced_once(model.config, dtype=dtype)
    half = dtype == torch.float16
    formats = lower_to(dialect, graph, model.config, tensors, "fp16" if half else "fp32")
    twin = with_stored_weights(model, tensors, formats, np.float16 if half else np.float32)
    return Replay(write(graph, tensors, folder), rows), twin


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_equals_pytorch(variant: str, dialect: str, tmp_path: Path) -> None:
    """In one piece; in chunks and single steps, over what the first reading left in the cache."""
    graph, model = replay(dialect, variant, tmp_path)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 40))
    expected = logits_of(model, ids)
    for cuts in ((40,), (25, 38, 39, 40)):
        found = graph.read(ids, cuts)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-4
