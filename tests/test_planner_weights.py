"""Bytes that the planner counts are the bytes that a build writes, whatever dialect and format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from llama_export.export.config import expected_tensors
from llama_export.export.published import published_configs
from llama_export.export.rotary import rotary_tables
from llama_export.export.write import lay_out
from llama_export.optimize import primitive, trt
from llama_export.optimize.formats import EMBEDDING, FP16, stored_bytes
from llama_export.optimize.ort import OrtOptions
from llama_export.optimize.ort import lower as lower_to_ort
from llama_export.optimize.plan import column_orders, plan_formats
from llama_export.optimize.policy import ORT, ORT_CUDA, TENSORRT, TENSORRT_8, TENSORRT_RTX, Policy
from llama_export.optimize.tensors import SourceTensor
from llama_export.targets.planner_weights import Weights, weights_of
from support.graphs import VARIANTS, llama, source_tensors, traced_once

CASES = [
    *((("ort", 21), ORT, precision) for precision in ("fp32", "fp16", "int8", "int4")),
    *((("trt", 24), TENSORRT_RTX, precision) for precision in ("fp16", "int8", "int4", "fp8", "nvfp4")),
    *((("ort", 21), ORT, precision) for precision in ("int4-b16-zeros", "int4-b32", "int8-b16-zeros", "int8-b256")),
    *((("ort", 21), ORT_CUDA, precision) for precision in ("int4", "int8-b64-zeros")),
    *((("trt", 24), TENSORRT_RTX, precision) for precision in ("w8a8", "fp8")),
    *((("trt-primitive", 21), TENSORRT, precision) for precision in ("fp16", "int4", "fp8", "int8", "w8a8")),
    *((("trt-primitive", 17), TENSORRT_8, precision) for precision in ("fp16", "int8")),
]


TENSOR = SourceTensor("", (), "F16", FP16, lambda start, stop: np.zeros((stop - start, 1), np.float32))


def written(
    graph_of: tuple[str, int], variant: Mapping[str, object], policy: Policy, precision: str, dtype: torch.dtype
) -> tuple[int, Weights]:
    """Bytes of the weights that a build would write, and what the planner counts."""
    (dialect, opset), model = graph_of, llama(**variant)
    tensors: dict[str, SourceTensor] = source_tensors(model)
    graph = traced_once(model.config, dtype=dtype)
    formats = plan_formats(tensors, precision, None, policy)
    rotary, orders = rotary_tables(model.config, 64), column_orders(tensors, formats)
    if dialect == "ort":
        lower_to_ort(graph, OrtOptions(formats, rotary, 0, orders))
    elif dialect == "trt":
        trt.lower(graph, trt.TrtOptions(formats, rotary, orders))
    else:
        primitive.lower(graph, trt.TrtOptions(formats, rotary, orders), opset)
    laid = sum(region.size for region in lay_out(graph).regions.values())
    counted = weights_of(tensors, formats, dialect, opset, dtype.itemsize)
    return laid, counted


@pytest.mark.parametrize(("graph_of", "policy", "precision"), CASES, ids=lambda case: getattr(case, "name", str(case)))
@pytest.mark.parametrize("variant", ["odd-sizes", "odd-rows"])
def test_the_bytes_are_those_that_a_build_writes(
    variant: str, graph_of: tuple[str, int], policy: Policy, precision: str
) -> None:
    laid, counted = written(graph_of, VARIANTS[variant], policy, precision, torch.float16)
    assert counted.total == laid
    if graph_of[0] == "ort":
        laid, counted = written(graph_of, VARIANTS[variant], policy, precision, torch.float32)
        assert counted.total == laid


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_all_but_the_table_that_it_looks_up(tied: bool) -> None:
    config = {**published_configs()["llama-3.2-1b"], "tie_word_embeddings": tied}
    shapes = expected_tensors(config)
    tensors = {name: replace(TENSOR, name=name, shape=shape) for name, shape in shapes.items()}
    formats = plan_formats(tensors, "int4", None, TENSORRT)
    engine = weights_of(tensors, formats, "trt", 24, 2)
    table = stored_bytes(shapes[EMBEDDING], formats[EMBEDDING], 2)
    assert engine.read == engine.total - table
    projections = [shape for name, shape in shapes.items() if len(shape) > 1 and name != EMBEDDING]
    head = shapes[EMBEDDING] if tied else (0,)
    assert engine.multiplied == sum(map(math.prod, projections)) + math.prod(head)


def test_the_tied_table_of_the_1b_lies_twice_in_an_engine_and_once_elsewhere() -> None:
    shapes = expected_tensors(published_configs()["llama-3.2-1b"])
    tensors = {name: replace(TENSOR, name=name, shape=shape) for name, shape in shapes.items()}
    engine = weights_of(tensors, plan_formats(tensors, "int4", None, TENSORRT_RTX), "trt", 24, 2)
    plain = weights_of(tensors, plan_formats(tensors, "int4-b32", None, ORT_CUDA), "ort", 21, 2)
    assert engine.total - plain.total == 128_256 * 2048 * 9 // 16, "4.5 bits a weight"
    assert plain.read == plain.total == engine.read
