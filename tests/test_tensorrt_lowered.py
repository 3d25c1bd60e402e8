"""The graphs that builds write, run by the executor of engines on the fake: what the two expect of each other."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_export.runtime.bundle import ENGINES, RECIPE_FILE, Bundle, EngineRecord, Limits, Shape, open_bundle, seal
from llama_export.runtime.tensorrt import EngineFile, TensorRTExecutor
from support.fake_tensorrt import RELEASES, Release, fake_module, write_plan
from support.fake_tensorrt_cuda import FakeCuda
from support.graphs import VARIANTS, llama, source_tensors, traced_once
from support.replay import Replay, lower_to, write
from support.tiny_bundle import manifest_for, random_llama
from support.tiny_tensorrt import recipe_for

BATCH = 2


def bundle_of(folder: Path, lowering: str, variant: str, release: Release) -> Bundle:
    model = llama(**VARIANTS[variant])
    config, tensors = model.config, source_tensors(model)
    graph = traced_once(config, dtype=torch.float16)
    lower_to(lowering, graph, config, tensors, "fp16")
    (folder / ENGINES).mkdir(parents=True)
    write(graph, tensors, folder)
    heads = config.num_attention_heads
    shape = Shape(
        config.num_hidden_layers,
        config.hidden_size,
        heads,
        config.num_key_value_heads,
        config.head_dim or config.hidden_size // heads,
        config.intermediate_size,
        config.vocab_size,
        "float16",
    )
    manifest = dataclasses.replace(
        manifest_for(random_llama()),
        dialect="trt" if lowering == "trt" else "trt-primitive",
        backend="tensorrt",
        engine=EngineRecord("tensorrt", release.version),
        shape=shape,
        limits=Limits(64, BATCH, 16),
    )
    (folder / RECIPE_FILE).write_text(recipe_for(manifest).to_json())
    seal(folder, manifest)
    return open_bundle(folder)


@pytest.mark.parametrize(
    ("lowering", "variant", "release"),
    [("trt", "odd-rows", "10.16"), ("primitive-17", "odd-rows", "8.6"), ("primitive-21", "mistral-window", "10.3")],
)
def test_executor_and_graph_fit(
    lowering: str, variant: str, release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, one = FakeCuda(), RELEASES[release]
    monkeypatch.setitem(sys.modules, "tensorrt", fake_module(one, cuda))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    bundle = bundle_of(tmp_path / "bundle", lowering, variant, one)
    plan = write_plan(tmp_path / "plan", bundle, one)
    executor = TensorRTExecutor(bundle, EngineFile(plan, "tensorrt", one.version, tmp_path / "k", True), rows=BATCH)
    reference = Replay(bundle.path / "model.onnx", BATCH)
    random = np.random.default_rng(3)
    starts = np.array([0, 0])
    for count, kept in ((16, 16), (5, 1), (1, 1), (1, 1), (1, 1), (3, 2)):
        ids = random.integers(0, bundle.manifest.shape.vocab, (BATCH, count))
        wanted = np.tile(np.arange(count - kept, count), (BATCH, 1))
        found = executor.run(ids, starts[:, None] + np.arange(count), wanted)
        assert np.abs(found - reference(ids, starts.tolist(), wanted)).max() < 0.02
        starts = starts + count - np.array([0, 1])  # the second row goes back by one
    executor.close()
    assert cuda.live == 0
