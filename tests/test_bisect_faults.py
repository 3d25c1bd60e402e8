"""Faults planted in exported bundles: which gate of `verify` sees each, and that the bisection names its place."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest
from llama_export.build_options import BuildOptions
from llama_export.export.bisect import Bisection, bisect
from llama_export.export.source import open_source
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.proof.verify import verify
from support import faults, planted
from support.checkpoints import write_weights_of_trained_size
from support.hf_models import write_llama_folder


class Bundles(Protocol):
    """A bundle of a kind. rounded: to nearest."""

    def __call__(self, kind: str, *, rounded: bool = False) -> Path: ...


class Plant(Protocol):
    """A copy of such a bundle with a fault in it."""

    def __call__(self, kind: str, fault: faults.Fault, *, rounded: bool = False) -> Path: ...


PROMPTS = "The old lighthouse keeper climbed the stairs\nEvery evening at dusk\n"
"""Two, as many as it takes to read several at once: every fault is replayed on all of them."""

KINDS = {
    "ort fp32": {"target": "cpu", "precision": "fp32"},
    "ort int4": {"target": "cpu", "precision": "int4"},
    "trt int4": {"target": "jetson-orin", "precision": "int4", "jetpack": "7.2"},
    "primitive int4": {"target": "jetson-orin", "precision": "int4"},
}
ROUNDED = {kind: {**options, "method": "rtn"} for kind, options in KINDS.items() if options["precision"] == "int4"}
"""The same in codes that a checkpoint tells."""
ORT, FLOAT16 = ("ort fp32", "ort int4"), ("trt int4", "primitive int4")
ATTENDS = {
    "ort fp32": "GroupQueryAttention",
    "ort int4": "GroupQueryAttention",
    "trt int4": "RotaryEmbedding",
    "primitive int4": "rotary/float32/Concat",
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """The same odd little Llama in every dialect, each built once."""
    folder = tmp_path_factory.mktemp("bisected")
    write_llama_folder(folder / "llama", layers=3, hidden=96, heads=6, kv_heads=2, head_dim=16, ffn=160, vocab=323)
    write_weights_of_trained_size(folder / "llama")
    (folder / "prompts.txt").write_text(PROMPTS)

    def bundle(kind: str, *, rounded: bool = False) -> Path:
        path = folder / f"{kind.replace(' ', '-')}{'-rounded' * rounded}"
        if not path.exists():
            options = {"context": 64, "prompts": folder / "prompts.txt", **(ROUNDED if rounded else KINDS)[kind]}
            build(BuildOptions(model=str(folder / "llama"), output=path, **options))
        return path

    return bundle


@pytest.fixture
def plant(bundles: Bundles, tmp_path: Path) -> Plant:
    """A copy of the bundle of a kind with a fault in it."""

    def planted_in(kind: str, fault: faults.Fault, *, rounded: bool = False) -> Path:
        name = "rounded" if rounded else "copy"
        copy = faults.copy_of(bundles(kind, rounded=rounded), tmp_path / name, changed=("model.onnx", faults.DATA))
        fault(copy)
        return copy

    return planted_in


def failing(path: Path) -> set[str]:
    """Which of the lines that look for faults fail."""
    verdict = verify(path, check_hashes=False, threads=1, progress=Silent())
    return {check.id for check in verdict.checks if not check.passed} & {"weights", "full", "shipped"}


def bisected(path: Path, model: Path | None = None) -> Bisection:
    source = None if model is None else open_source(str(model))
    return bisect(open_bundle(path), source=source, threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_is_no_place(kind: str, bundles: Bundles) -> None:
    found = bisected(bundles(kind))
    assert found.passed and found.first is None, "\n".join(found.lines())
    assert found.verdict.startswith("no place found")
    again = bisected(bundles(kind), bundles(kind).parent / "llama")
    assert again.passed, "\n".join(again.lines())


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_theta(kind: str, plant: Plant) -> None:
    path = plant(kind, lambda bundle: planted.table(bundle, 12000.0))
    assert failing(path) >= {"weights", "full"}
    found = bisected(path)
    assert found.first is not None and found.first.op == "initializer cos_cache"
    assert "62 of 64 rows" in found.first.hint or "63 of 64 rows" in found.first.hint
    planted.forget_tables(path)
    assert "weights" not in failing(path) and "full" in failing(path)
    found = bisected(path)
    assert found.first is not None and found.first.layer == 0
    assert found.first.place == ("keys" if kind in ORT else "q_rotary")
    assert found.first.op.endswith(f"self_attn/{ATTENDS[kind]}")
    assert "theta of 12000 instead of 10000" in found.first.hint


@pytest.mark.parametrize("kind", KINDS)
def test_exchanged_key_heads_in_the_graph(kind: str, plant: Plant) -> None:
    path = plant(kind, planted.exchange_key_heads)
    assert failing(path) == {"full"}
    found = bisected(path)
    assert found.first is not None and (found.first.layer, found.first.place) == (1, "keys")
    assert found.first.op.startswith("model.layers.1.self_attn/")
    assert found.first.hint == "heads 0 and 1 exchanged"
    assert any("keys after the rotary embedding already differ, values agree" in line for line in found.lines())


def test_exchanged_key_heads_in_the_weights(bundles: Bundles, plant: Plant) -> None:
    def swap(bundle: Path) -> None:
        for part in ("codes", "scales", "zeros"):
            faults.swap_rows(f"{planted.LAYER}.self_attn.q_k_v_proj.{part}", 96, 112, 16)(bundle)

    path = plant("ort int4", swap)
    assert failing(path) >= {"weights", "full"}
    found = bisected(path)
    assert found.first is not None and (found.first.layer, found.first.place) == (1, "self_attn.k_proj.weight")
    assert [row for row in found.failed if row.kind != "weights"] == []  # the graph is right for what is stored
    llama = bundles("ort int4").parent / "llama"
    found = bisected(path, llama)
    assert found.first is not None and "all of it is far from the checkpoint's" in found.first.hint
    found = bisected(plant("ort int4", swap, rounded=True), llama)
    assert found.first is not None and "32 of 32 rows" in found.first.hint
    graph = next(row for row in found.failed if row.kind != "weights")
    assert (graph.layer, graph.place, graph.hint) == (1, "k", "heads 0 and 1 exchanged")
    assert graph.op == "model.layers.1.self_attn.q_k_v_proj/MatMulNBits"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_scale_of_attention(kind: str, plant: Plant) -> None:
    path = plant(kind, planted.no_scale)
    assert failing(path) == {"full"}
    found = bisected(path)
    assert found.first is not None and found.first.layer == 1
    assert found.first.place == ("q_scaled" if kind == "primitive int4" else "attention")
    assert found.first.hint == "no 1/sqrt(head_dim)"
    expected = {"primitive int4": "scale/float32/Mul", "trt int4": "Attention"}
    assert found.first.op == f"model.layers.1.self_attn/{expected.get(kind, 'GroupQueryAttention')}"
    if kind != "primitive int4":
        assert any("keys and values agree; attention's output differs" in line for line in found.lines())


@pytest.mark.parametrize("kind", KINDS)
def test_positions_one_too_late(kind: str, plant: Plant) -> None:
    path = plant(kind, planted.late_by_one)
    assert "full" in failing(path) and "weights" not in failing(path)
    found = bisected(path)
    assert found.first is not None and found.first.layer == 0
    assert found.first.place in (("keys",) if kind in ORT else ("q_rotary",))
    assert found.first.pass_ != "prefill"
    assert not any(row.pass_ == "prefill" for row in found.failed)
    assert any("only with tokens in the cache" in line for line in found.lines())
    if kind not in ORT:
        assert found.first.hint == "positions off by +1"


@pytest.mark.parametrize(("kind", "value"), [(kind, 1e-6) for kind in ORT] + [(kind, 1e-2) for kind in FLOAT16])
def test_a_wrong_epsilon_in_one_norm(kind: str, value: float, plant: Plant) -> None:
    path = plant(kind, planted.epsilon(value))
    assert "weights" not in failing(path) and "shipped" not in failing(path)
    found = bisected(path)
    assert found.first is not None and (found.first.layer, found.first.place) == (1, "post_norm")
    assert found.first.op.startswith("model.layers.1.post_attention_layernorm/")
    assert found.first.hint.startswith("an epsilon of ") and found.first.hint.endswith("instead of 1e-05")


@pytest.mark.parametrize("kind", KINDS)
def test_exchanged_gate_and_up(kind: str, plant: Plant) -> None:
    path = plant(kind, planted.gate_and_up)
    assert failing(path) == {"full"}
    found = bisected(path)
    assert found.first is not None and (found.first.layer, found.first.place) == (1, "gate")
    assert found.first.op.startswith("model.layers.1.mlp.gate_up_proj/")
    assert found.first.hint == "gate and up exchanged"


@pytest.mark.parametrize("kind", ["ort int4", *FLOAT16])
def test_a_bad_scale(kind: str, bundles: Bundles, plant: Plant) -> None:
    path = plant(kind, planted.bad_scale)
    assert "weights" in failing(path)
    found = bisected(path)
    assert found.first is not None and (found.first.layer, found.first.place) == (1, "mlp.down_proj.weight")
    assert f"{planted.LAYER}.mlp.down_proj.scales" in found.first.op
    llama = bundles(kind).parent / "llama"
    found = bisected(path, llama)
    assert found.first is not None and "by a factor of 1.5: its scale" in found.first.hint
    assert "1 of 96 rows are far from the checkpoint's" in found.first.hint
    found = bisected(plant(kind, planted.bad_scale, rounded=True), llama)
    assert found.first is not None and "by a factor of 1.5: its scale" in found.first.hint
    graph = next(row for row in found.failed if row.kind != "weights")
    assert (graph.layer, graph.place) == (1, "down")
