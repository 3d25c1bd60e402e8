"""Graphs for CUDA: the numbers of those for the CPU, in ops that ONNX Runtime can record as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support.graphs import VARIANTS, llama, lowered, session, source_tensors, traced_once

CAPACITY = 23
HEAD_DIM = 32

PLAIN, RECORDABLE = False, True

READ_ON_CPU = {
    "Expand": {1},
    "CumSum": {1},
    "GroupQueryAttention": {6},
    "ReduceSum": {1},
    "Reshape": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Unsqueeze": {1},
}
"""Inputs that kernels of ONNX Runtime's CUDA provider take from the CPU's memory (InputMemoryType in its source)."""

UNRECORDABLE = {"GatherND", "Range", "NonZero", "Loop", "If", "Scan"}
"""Ops whose CUDA kernels copy to or from the CPU, or that a session with CUDA graphs refuses."""


@pytest.fixture(scope="module", params=["grouped", "untied", "mistral-window"])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    model = llama(**{**VARIANTS[request.param], "head_dim": HEAD_DIM})
    found = {}
    for recordable in (PLAIN, RECORDABLE):
        folder = tmp_path_factory.mktemp("recordable" if recordable else "plain")
        tensors = source_tensors(model)
        graph = traced_once(model.config)
        lowered(graph, model.config, tensors, folder, precision="int4", recordable=recordable)
        found[recordable] = folder / "model.onnx"
    return found


class Run:
    """A session with a cache of fixed length, which it changes in place."""

    def __init__(self, path: Path, rows: int) -> None:
        self.session = session(path)
        self.binding = self.session.io_binding()
        self.rows = rows
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                cache = np.zeros((rows, value.shape[1], CAPACITY, value.shape[3]), np.float32)
                one = onnxruntime.OrtValue.ortvalue_from_numpy(cache)
                self.binding.bind_ortvalue_input(value.name, one)
                self.binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), one)

    def __call__(self, ids: Any, mask: Any, keep: int | None = None) -> Any:
        feeds = {"input_ids": ids, "attention_mask": mask}
        if keep is not None:
            feeds["logits_to_keep"] = np.array([keep])
        self.held = {name: np.ascontiguousarray(value, dtype=np.int64) for name, value in feeds.items()}
        for name, value in self.held.items():
            self.binding.bind_input(name, "cpu", 0, np.int64, value.shape, value.ctypes.data)
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[-1].numpy()


def ones(*lengths: int, total: int) -> Any:
    return (np.arange(total) < np.array(lengths)[:, None]).astype(np.int64)


def runs(rows: int) -> Iterator[tuple[Any, Any, int]]:
    """Ids, mask and keep of a prompt whose rows end apart, of a step, and of a chunk, which the kernel takes of one row
    alone.
    """
    random = np.random.default_rng(7)

    def ids(count: int) -> Any:
        return random.integers(0, 250, (rows, count))

    lengths = np.array([6, 3, 5][:rows])
    yield ids(6), ones(*lengths, total=6), 4  # more than the second row's tokens
    yield ids(1), ones(*(lengths + 1), total=7), 1
    if rows == 1:
        yield ids(3), ones(*(lengths + 4), total=10), 3


@pytest.mark.parametrize("rows", [1, 3])
def test_both_graphs_give_the_very_same_logits(graphs: dict[bool, Path], rows: int) -> None:
    plain, recordable = Run(graphs[PLAIN], rows), Run(graphs[RECORDABLE], rows)
    for ids, mask, keep in runs(rows):
        assert np.array_equal(plain(ids, mask, keep), recordable(ids, mask, keep))


def test_a_mask_of_the_whole_cache_changes_nothing(graphs: dict[bool, Path]) -> None:
    """In every step: what a recording is given, and what is given without one. `logits_to_keep` has its default."""
    growing, constant = Run(graphs[RECORDABLE], 1), Run(graphs[RECORDABLE], 1)
    ids = np.random.default_rng(3).integers(0, 250, (1, CAPACITY))
    first = [run(ids[:, :4], ones(4, total=4)) for run in (growing, constant)]
    assert np.array_equal(*first)
    for position in range(4, CAPACITY):
        token = ids[:, position : position + 1]
        expected = growing(token, ones(position + 1, total=position + 1))
        assert np.array_equal(constant(token, ones(position + 1, total=CAPACITY)), expected)


def test_a_constant_mask_at_the_first_position(graphs: dict[bool, Path]) -> None:
    growing, constant = Run(graphs[RECORDABLE], 1), Run(graphs[RECORDABLE], 1)
    token = np.array([[17]])
    assert np.array_equal(constant(token, ones(1, total=CAPACITY)), growing(token, ones(1, total=1)))


def copies(graph: onnx.GraphProto) -> list[str]:
    """Where a value of the CPU's memory is read on the GPU, or the other way about.

    As ONNX Runtime places nodes: what is made of shapes alone runs on the CPU (GetCpuPreferredNodes).
    """
    on_cpu: set[str] = set()
    constants = {tensor.name for tensor in graph.initializer}
    problems = []
    for node in graph.node:
        here = {index for index, name in enumerate(node.input) if name in on_cpu}
        elsewhere = {index for index, name in enumerate(node.input) if name and name not in on_cpu | constants}
        at = READ_ON_CPU.get(node.op_type, set())
        if node.op_type == "Shape" or (here and not elsewhere and not here & at):
            on_cpu.update(node.output)
            continue
        problems += [f"{node.name} reads {node.input[index]} on the GPU" for index in here - at]
        problems += [f"{node.name} reads {node.input[index]} on the CPU" for index in elsewhere & at]
    return problems


def test_what_is_made_of_shapes_is_only_read_as_a_size_or_an_index(graphs: dict[bool, Path]) -> None:
    found = {kind: onnx.load(path, load_external_data=False).graph for kind, path in graphs.items()}
    assert copies(found[RECORDABLE]) == []
    assert any("last_positions/Sub" in problem for problem in copies(found[PLAIN])), "else it would notice nothing"
    assert {node.op_type for node in found[RECORDABLE].node}.isdisjoint(UNRECORDABLE)


def test_logits_to_keep_is_only_a_size(graphs: dict[bool, Path]) -> None:
    graph = onnx.load(graphs[RECORDABLE], load_external_data=False).graph
    readers = [
        (node.op_type, list(node.input).index("logits_to_keep"))
        for node in graph.node
        for name in node.input
        if name == "logits_to_keep"
    ]
    assert readers == [("Expand", 1)]


def test_bundles_for_cuda_are_recordable_and_those_for_the_cpu_as_before(tmp_path: Path) -> None:
    from llama_export.build_options import BuildOptions
    from llama_export.pipeline import build
    from support.hf_models import write_llama_folder

    model = str(write_llama_folder(tmp_path / "llama"))
    for target, expected in (("cuda", "GatherElements"), ("cpu", "GatherND")):
        build(BuildOptions(model=model, target=target, output=tmp_path / target, reference=False))
        graph = onnx.load(tmp_path / target / "model.onnx", load_external_data=False).graph
        kept = next(node for node in graph.node if node.name.startswith("last_positions/Gather"))
        assert kept.op_type == expected
        assert (copies(graph) == []) is (target == "cuda")
