"""The graphs of the TensorRT dialects, written and run in ONNX Runtime with caches in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from llama_export.export.rotary import rotary_tables
from llama_export.export.write import lay_out, refer, write_data
from llama_export.optimize import primitive, trt
from llama_export.optimize.formats import Format
from llama_export.optimize.plan import column_orders, plan_formats
from llama_export.optimize.policy import ORT, TENSORRT, TENSORRT_8, TENSORRT_RTX
from llama_export.optimize.tensors import SourceTensor
from llama_export.optimize.trt.linear import InputScale
from llama_export.progress import Silent
from transformers import PreTrainedConfig

POLICIES = {"trt": TENSORRT_RTX, "primitive-17": TENSORRT_8, "primitive-21": TENSORRT}
DIALECTS = tuple(POLICIES)
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def lower_to(
    dialect: str,
    graph: ir.Model,
    config: PreTrainedConfig,
    tensors: Mapping[str, SourceTensor],
    precision: str,
    *,
    formats: dict[str, Format] | None = None,
    inputs: Mapping[str, InputScale] | None = None,
) -> dict[str, Format]:
    """Lower a canonical graph of a context of 64; return the formats. inputs: how what projections read is rounded."""
    policy = POLICIES[dialect] if precision.startswith("int") else ORT
    formats, inputs = formats or plan_formats(tensors, precision, policy=policy), inputs or {}
    rotary, orders = rotary_tables(config, 64), column_orders(tensors, formats)
    options = trt.TrtOptions(formats, rotary, orders, inputs)
    if dialect == "trt":
        trt.lower(graph, options)
    else:
        primitive.lower(graph, options, int(dialect.removeprefix("primitive-")))
    return formats


def write(graph: ir.Model, tensors: Mapping[str, SourceTensor], folder: Path) -> Path:
    """The files of a lowered graph; return the path of model.onnx."""
    layout = lay_out(graph)
    write_data(graph, layout, tensors, folder, Silent(), threads=2)
    refer(graph, layout, folder)
    return folder / "model.onnx"


def _session(path: Path) -> onnxruntime.InferenceSession:
    """With products in the type of the activations; by default ONNX Runtime rounds what codes are multiplied with."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(str(path), options)


class Replay:
    """A graph and the cache of `rows` texts, [rows, kv_heads, context, head_dim] for each input `past_key_values…`.

    The cache starts as noise: nothing of it may show.
    """

    def __init__(self, path: Path, rows: int, context: int = 64) -> None:
        self.session = _session(path)
        random = np.random.default_rng(9)
        self.cache = {
            value.name: 3
            * random.standard_normal((rows, value.shape[1], context, value.shape[3])).astype(_NUMPY[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values")
        }
        self._grows = any(value.shape[2] == "past_sequence" for value in self.session.get_inputs()[3:])

    def __call__(self, ids: np.ndarray, starts: Sequence[int], kept: np.ndarray | None = None) -> np.ndarray:
        """The logits of `ids` [rows, sequence], the first of each row at its start, for the tokens `kept` [rows, n]
        (by default all of them). The cache takes the new rows up.
        """
        rows, sequence = ids.shape
        positions = np.asarray(starts)[:, None] + np.arange(sequence)
        kept = np.tile(np.arange(sequence), (rows, 1)) if kept is None else kept
        length = max(1, int(max(starts)))
        past = {name: value[:, :, :length] if self._grows else value for name, value in self.cache.items()}
        feeds = {"input_ids": ids, "position_ids": positions, "logits_positions": kept, **past}
        logits, *presents = self.session.run(None, feeds)
        for name, present in zip(self.cache, presents, strict=True):
            if self._grows:
                for row, start in enumerate(starts):
                    self.cache[name][row, :, start : start + sequence] = present[row]
            else:
                self.cache[name] = present
        return logits  # type: ignore[no-any-return]

    def read(self, ids: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
        """The logits of all of `ids` [rows, tokens], read in pieces that end at `cuts`."""
        starts = (0, *cuts[:-1])
        pieces = [self(ids[:, start:stop], [start] * len(ids)) for start, stop in zip(starts, cuts, strict=True)]
        return np.concatenate(pieces, axis=1)
