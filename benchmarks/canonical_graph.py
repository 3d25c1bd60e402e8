"""The canonical graph, before any dialect, replayed in ONNX Runtime against PyTorch's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from llama_export.export.canonical import canonical
from llama_export.export.config import transformers_config
from llama_export.export.source import Source, open_source
from llama_export.progress import Silent
from llama_export.runtime.arrays import Float32, Int64
from llama_export.runtime.proof.gates import FULL, limits_of
from llama_export.runtime.proof.judging import Judge, Question, by_prompt, replay
from llama_export.runtime.proof.reference import Reference
from llama_export.runtime.proof.replayer import CacheView
from llama_export.runtime.proof.verdict import Case
from llama_export.runtime.proof.ways import WAYS, Text
from llama_export.runtime.threads import physical_cores

_PAST = "past_key_values."
_ROWS = 8


class CanonicalReplayer:
    """A `Replayer` over the canonical graph in float32: a static cache [rows, kv_heads, context, head_dim]."""

    most_rows = _ROWS

    def __init__(self, source: Source, context: int, folder: Path) -> None:
        """folder: where the graph is written, weights and all."""
        graph = canonical(transformers_config(source.config), context=context)
        for name, value in graph.graph.initializers.items():
            if value.const_value is None:
                tensor = source.tensors[name]
                value.const_value = ir.tensor(tensor.read(0, tensor.shape[0]), name=name)
        folder.mkdir(parents=True)
        ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of every copied cache
        options.intra_op_num_threads = physical_cores()
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        self._cache_inputs = [value for value in self._session.get_inputs() if value.name.startswith(_PAST)]
        self._cache: dict[str, Float32] = {}
        self.name, self.vocab = f"onnxruntime {onnxruntime.__version__} cpu", source.shape.vocab
        self.context = self.chunk = context

    def begin(self, rows: int) -> None:
        """See `Replayer.begin`."""
        self._cache = {value.name: np.zeros((rows, *value.shape[1:]), np.float32) for value in self._cache_inputs}

    def run(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.run`; padding is written behind the text, where what comes next overwrites it."""
        positions = np.asarray(firsts, np.int64)[:, None] + np.arange(ids.shape[1])
        logits, *present = self._session.run(None, {"input_ids": ids, "position_ids": positions, **self._cache})
        self._cache = dict(zip(self._cache, present, strict=True))
        return logits  # type: ignore[no-any-return]

    def last(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        """See `Replayer.last`; this graph always gives all."""
        logits: Float32 = self.run(ids, firsts, counts)[np.arange(len(counts)), np.asarray(counts) - 1]
        return logits

    def cache(self, layer: int) -> CacheView:
        """See `Replayer.cache`."""
        return CacheView(*(self._cache[f"{_PAST}{layer}.{part}"] for part in ("key", "value")))


def canonical_cases(model: Path, original: Reference, context: int, folder: Path) -> list[Case]:
    """Every way of the canonical graph against the checkpoint's reference, with the gates of full precision."""
    index = original.index
    replayer = CanonicalReplayer(open_source(str(model)), context, folder)
    names = tuple(prompt.name for prompt in index.prompts)
    question = Question(FULL, "The canonical graph against PyTorch", tuple(WAYS), names, limits_of(FULL, "float32"))
    judge = Judge(question, index.prompts, by_prompt(original))
    texts = [Text(prompt.ids, prompt.prompt_tokens) for prompt in index.prompts]
    replay(replayer, texts, tuple(WAYS), context // 2, Silent(), [judge])
    return list(judge.cases(str))
