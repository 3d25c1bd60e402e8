"""A cache in int8: keys and values rounded by fixed scales, in graphs, on the way through the runtime, in proofs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from llama_export.build_options import RUNTIME, BuildOptions
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.cache_scales import MARGIN, PIECE, cache_scales
from llama_export.export.calibration_text import calibration_text
from llama_export.export.source import open_source
from llama_export.names import CACHE_PRECISIONS
from llama_export.optimize.graph import past_name
from llama_export.optimize.ort.odd_heads import cache_head_dim
from llama_export.optimize.tensors import Float32
from llama_export.pipeline import build
from llama_export.planning import plan_build
from llama_export.progress import Silent
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.bundle import Bundle, open_bundle
from llama_export.runtime.cache_graph import rounding_nodes, with_float_cache
from llama_export.runtime.proof.replayers import GraphReplayer
from llama_export.runtime.proof.verdict import Verdict
from llama_export.runtime.proof.verify import verify
from llama_export.runtime.session import read_graph
from llama_export.targets.choice import choose
from llama_export.targets.devices import load_target
from llama_export.targets.made import cache_dtype, what_is_made
from onnx import helper
from support import faults
from support.command import call
from support.graphs import VARIANTS, llama, lowered, run_ort, session, source_tensors, traced_once
from support.hf_models import write_llama_folder
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

ort = pytest.importorskip("onnxruntime", reason="the cache is ONNX Runtime's")
if tuple(int(part) for part in ort.__version__.split(".")[:2]) < (1, 27):
    pytest.skip("a cache in int8 needs onnxruntime 1.27", allow_module_level=True)

TEXT = "The old lighthouse keeper climbed the stairs every evening at dusk, and lit 12 lamps. " * 40
FILES = ("model.onnx", "model.onnx.data", "exact.npz")


class RoundedCache(DynamicCache):
    """PyTorch's side of a cache in int8: what attention reads is round(x / scale) * scale, of the new tokens too."""

    def __init__(self, scales: dict[str, Float32], head_dim: int) -> None:
        super().__init__()
        self._scales = {name: torch.from_numpy(scale[..., :head_dim].copy()) for name, scale in scales.items()}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        rounded = (self._round(keys, past_name(layer, "key")), self._round(values, past_name(layer, "value")))
        return super().update(*rounded, layer, *rest, **more)

    def _round(self, numbers: torch.Tensor, name: str) -> torch.Tensor:
        scale = self._scales[name]
        return torch.clamp(torch.round(numbers / scale), -128, 127) * scale


def head_dim_of(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads)


def rounded_logits(model: PreTrainedModel, ids: np.ndarray, scales: dict[str, Float32]) -> np.ndarray:
    with torch.no_grad():
        cache = RoundedCache(scales, head_dim_of(model))
        logits: np.ndarray = model(torch.from_numpy(ids), past_key_values=cache, use_cache=True).logits.numpy()
    return logits


def plain_logits(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return logits


def coarse_scales(model: PreTrainedModel, seed: int = 5) -> dict[str, Float32]:
    """Different ones for every channel, some of them so small that numbers are cut off."""
    random, head_dim = np.random.default_rng(seed), head_dim_of(model)
    shape = (1, model.config.num_key_value_heads, 1, head_dim)
    scales = {}
    for layer in range(model.config.num_hidden_layers):
        for part in ("key", "value"):
            scale = np.ones((*shape[:3], cache_head_dim(head_dim)), np.float32)
            scale[..., :head_dim] = random.uniform(0.005, 0.05, shape)
            scales[past_name(layer, part)] = scale
    return scales


def same_rounding(found: np.ndarray, rounded: np.ndarray, plain: np.ndarray) -> None:
    """The last digit decides between two steps here and there, so a few numbers differ by a little of what rounding
    makes of them.
    """
    cost = np.abs(plain - rounded).mean()
    assert cost > 1e-3, "the scales are too fine to tell"
    assert np.abs(found - rounded).mean() < 0.03 * cost


@pytest.mark.parametrize(
    "variant", ["grouped", "one-kv-head", "own-head-dim", "head-dim-24", "head-dim-20", "biased", "mistral-window"]
)
def test_the_graph_equals_pytorch_with_a_rounded_cache(variant: str, tmp_path: Path) -> None:
    """In one piece, and in chunks and steps, of two texts at once; the cache holds the very codes."""
    model = llama(**VARIANTS[variant])
    scales = coarse_scales(model)
    lowered(traced_once(model.config), model.config, source_tensors(model), tmp_path, precision="fp32", cache=scales)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 30))
    rounded, plain = rounded_logits(model, ids, scales), plain_logits(model, ids)
    graph = session(tmp_path / "model.onnx")
    assert {value.type for value in graph.get_inputs() if value.name.startswith("past")} == {"tensor(int8)"}
    same_rounding(run_ort(graph, ids, (30,)), rounded, plain)
    same_rounding(run_ort(graph, ids, (28, 29, 30)), rounded, plain)
    same_rounding(run_ort(graph, ids[:1], (17, 29, 30)), rounded[:1], plain[:1])


def test_without_its_rounding_the_graph_equals_pytorch(tmp_path: Path) -> None:
    """To every digit, which is what proofs ask; a graph that rounds nothing stays the same bytes."""
    model = llama(**VARIANTS["biased"])
    kept, rounding = tmp_path / "kept", tmp_path / "rounding"
    for folder, scales in ((kept, {}), (rounding, coarse_scales(model))):
        folder.mkdir()
        lowered(traced_once(model.config), model.config, source_tensors(model), folder, precision="fp32", cache=scales)
    plain = (kept / "model.onnx").read_bytes()
    assert with_float_cache(plain) == plain and not rounding_nodes(plain)
    graph = (rounding / "model.onnx").read_bytes()
    assert len(rounding_nodes(graph)) == model.config.num_hidden_layers
    changed = with_float_cache(graph)
    assert not rounding_nodes(changed)
    (rounding / "float.onnx").write_bytes(changed)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 30))
    found = run_ort(session(rounding / "float.onnx"), ids, (17, 29, 30))
    assert np.abs(found - plain_logits(model, ids)).max() < 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_folder(tmp_path_factory.mktemp("cached") / "llama", layers=3, heads=6, kv_heads=2, hidden=96)


@pytest.fixture(scope="module")
def built(checkpoint: Path) -> Path:
    output = checkpoint.parent / "bundle"
    text = checkpoint.parent / "text.txt"
    text.write_text(TEXT)
    wish: dict[str, Any] = {"precision": "fp32", "cache_precision": "int8", "quality": False}
    build(BuildOptions(model=str(checkpoint), target="cpu", output=output, **wish))
    return output


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return faults.copy_of(built, tmp_path / "bundle", changed=FILES)


def stored_scales(bundle: Bundle) -> dict[str, Float32]:
    """Read by the onnx package, by inputs of the cache."""
    model = onnx.load(bundle.path / "model.onnx")
    named = {one.name.removesuffix(".scale"): one for one in model.graph.initializer if one.name.endswith(".scale")}
    return {name: onnx.numpy_helper.to_array(one) for name, one in named.items()}


def test_scales_are_what_a_text_reaches(checkpoint: Path) -> None:
    """Short pieces and whole sequences; of keys the length of the two numbers that are rotated together counts."""
    source = open_source(str(checkpoint), progress=Silent())
    text = calibration_text(source, "built-in", 200, 800)
    found = cache_scales(source, text, 200, head_dim=16, progress=Silent())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    bos = source.tokens.bos
    largest: dict[str, np.ndarray] = {}
    for which, sequence in enumerate(text.sequences):
        assert sequence[0] == bos
        length = len(sequence) if which % 2 else PIECE
        for start in range(1, len(sequence), length):
            cache = DynamicCache()
            ids = torch.tensor([[bos, *sequence[start : start + length]]])
            with torch.no_grad():
                model(ids, past_key_values=cache, use_cache=True)
            for number, layer in enumerate(cache.layers):
                keys, values = layer.keys[0].numpy(), np.abs(layer.values[0].numpy())
                pairs = np.hypot(keys[..., :8], keys[..., 8:])
                for part, sizes in (("key", np.concatenate([pairs, pairs], axis=-1)), ("value", values)):
                    name = past_name(number, part)
                    largest[name] = np.maximum(largest.get(name, 0), sizes.max(axis=1))
    assert found.keys() == largest.keys()
    for name, scale in found.items():
        assert scale.shape == (1, 2, 1, 16) and scale.dtype == np.float32
        np.testing.assert_allclose(scale[0, :, 0] * 127, MARGIN * largest[name], rtol=1e-4)


def test_the_runtime_computes_with_the_rounded_cache(built: Path, checkpoint: Path) -> None:
    """Prompt, chunks, steps, and a rewind into the middle; another text after it."""
    opened = open_bundle(built)
    assert opened.manifest.shape.cache_dtype == "int8"
    assert opened.manifest.minimum["onnxruntime"] == "1.27.0"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = np.random.default_rng(3).integers(3, 300, (1, 40))
    rounded, plain = rounded_logits(model, ids, stored_scales(opened)), plain_logits(model, ids)
    backend = OnnxRuntimeBackend(opened, threads=1)

    def close(found: np.ndarray, start: int, stop: int) -> None:
        cost = np.abs(rounded - plain).mean()
        assert cost > 1e-5 and np.abs(found - rounded[0, start:stop]).mean() < 0.1 * cost

    close(backend.extend(ids[0, :20], keep=20), 0, 20)
    close(np.stack([backend.step(int(token)).copy() for token in ids[0, 20:25]]), 20, 25)
    backend.extend(ids[0, ::-1])
    backend.rewind(25)
    close(backend.extend(ids[0, 25:40], keep=15), 25, 40)
    backend.rewind(0)
    close(backend.extend(ids[0, :40], keep=40), 0, 40)


def test_a_batch_of_two_lengths_computes_with_the_rounded_cache(built: Path, checkpoint: Path) -> None:
    opened = open_bundle(built)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = np.random.default_rng(4).integers(3, 300, (2, 24))
    scales = stored_scales(opened)
    replayer = GraphReplayer(opened, read_graph(opened), 2, exact=False)
    replayer.begin(2)
    first = replayer.run(ids[:, :20], [0, 0], [20, 13])
    rest = replayer.run(np.array([[ids[0, 20]], [ids[1, 13]]]), [20, 13], [1, 1])
    for row, count in enumerate((20, 13)):
        text = ids[row : row + 1, : count + 1]
        rounded, plain = rounded_logits(model, text, scales)[0], plain_logits(model, text)[0]
        found = np.concatenate([first[row, :count], rest[row]])
        assert np.abs(found - rounded).mean() < 0.1 * np.abs(plain - rounded).mean()


def verdict_of(bundle: Path) -> Verdict:
    return verify(open_bundle(bundle), check_hashes=False, threads=1, progress=Silent())


def failed(verdict: Verdict) -> set[str]:
    return {check.id for check in verdict.checks if not check.passed}


def test_verify_passes_with_the_limits_of_any_other_bundle(built: Path) -> None:
    verdict = verdict_of(built)
    assert verdict.passed
    (full,) = (check for check in verdict.checks if check.id == "full")
    worst = max(gate.measured for case in full.cases for gate in case.gates if gate.figure == "difference")
    assert worst < 1e-3


def wrong_names(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    node.input[12], node.input[13] = node.input[13], node.input[12]


def no_rounding(model: onnx.ModelProto) -> None:
    changed = onnx.load_from_string(with_float_cache(model.SerializeToString()))
    model.CopyFrom(changed)


def other_layer(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    nodes[1].input[12] = nodes[0].input[12]


def one_scale(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    kept = [one for one in node.attribute if one.name != "k_quant_type"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("k_quant_type", "PER_TENSOR")])


@pytest.mark.parametrize(
    "fault",
    [
        faults.put("past_key_values.1.key.scale", 0.5, at=7),
        faults.flip("past_key_values.2.value.scale", 0, at="last"),
        faults.graph(wrong_names),
        faults.graph(other_layer),
        faults.graph(one_scale),
        faults.graph(no_rounding),
        faults.attribute("GroupQueryAttention", "kv_cache_bit_width", 4, which=1),
    ],
    ids=["another scale", "its last bit", "exchanged", "of another layer", "one for all", "none", "4 bits"],
)
def test_scales_that_are_not_the_calibrated_ones_are_found(bundle: Path, fault: Callable[[Path], None]) -> None:
    fault(bundle)
    assert "weights" in failed(verdict_of(bundle))


def test_what_a_bundle_is_shows(built: Path) -> None:
    result = call("inspect", built)
    assert result.exit_code == 0 and "int8, " in result.stdout
    derived = json.loads(call("inspect", built, "--json").stdout)["derived"]
    assert derived["cache_bytes_per_1000_tokens"] == 1000 * 2 * 3 * 2 * 16
    note = "The cache is rounded to int8, by scales calibrated on"
    assert any(line.startswith(note) for line in open_bundle(built).manifest.notes)


def test_a_rounded_cache_holds_four_times_the_tokens() -> None:
    def cache(*options: str) -> int:
        found = call("plan", "-m", "llama-3.2-1b", "-t", "cpu", "--context", "4096", *options, "--json")
        assert found.exit_code == 0, found.stderr
        return int(json.loads(found.stdout)["plans"][0]["memory"]["cache"])

    assert cache() == 4 * cache("--cache-precision", "int8") == cache("--cache-precision", "fp32")


@pytest.mark.parametrize(
    ("name", "options", "precision", "message"),
    [
        ("cpu", {}, "fp16", "has no cache in fp16: choose fp32 or int8, or leave --cache-precision out"),
        ("cpu", {}, "fp8", "has no cache in fp8, since .*: choose fp32 or int8"),
        ("cuda", {}, "int8", "since no such cache has been run on a GPU by us.*: choose fp16"),
        ("rtx-4090", {}, "int8", "TensorScatter takes neither INT8 nor FP8.*: choose fp16"),
        ("rtx-4090", {}, "fp8", "has no cache in fp8, since .*: choose fp16"),
        ("jetson-orin", {}, "int8", "for each token.*: choose fp16"),
        ("jetson-orin", {"backend": "onnxruntime"}, "int8", "1.27.0, and there is none so new for .*: choose fp32"),
    ],
)
def test_a_cache_that_a_target_lacks_is_refused_with_what_it_has(
    name: str, options: dict[str, str], precision: str, message: str
) -> None:
    target = choose(load_target(name), **options)
    made = what_is_made(target)
    with pytest.raises(UsageError, match=message):
        cache_dtype(target, made, precision)
    assert cache_dtype(target, made, None) == made.activations == CACHE_PRECISIONS[made.caches[0]]


def test_adapters_to_choose_from_have_no_rounded_cache(checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(
        model=str(checkpoint), target="cpu", output=tmp_path / "b", adapter_mode=RUNTIME, cache_precision="int8"
    )
    with pytest.raises(UsageError, match="--cache-precision int8 has scales of one model"):
        plan_build(options, choose(load_target("cpu")), Silent())


def test_the_users_text_calibrates(checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(model=str(checkpoint), target="cpu", output=tmp_path / "b", cache_precision="int8")
    plan = plan_build(options, choose(load_target("cpu")), Silent())
    assert plan.cached is not None and plan.cached.built_in and plan.cache == "int8"
    (tmp_path / "short.txt").write_text("Too short.")
    short = BuildOptions(
        **{**vars(options), "calibrate": tmp_path / "short.txt", "precision": "int8"},
    )
    with pytest.raises(LlamaExportError, match="tokens, but calibrating takes at least"):
        plan_build(short, choose(load_target("cpu")), Silent())
