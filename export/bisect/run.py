"""`bisect`: the stored weights first, then the graph."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import onnx
from transformers import PreTrainedConfig

from ...errors import LlamaExportError, UsageError
from ...names import ORT
from ...optimize.tensors import Int64
from ...progress import Progress, Silent
from ...runtime.bundle import CPU_PROVIDER, Bundle, reference_file
from ...runtime.cpu_graph import rounds_activations
from ...runtime.proof.reference import EXACT, Index
from ...runtime.proof.reference_file import BUILD_AGAIN, load_index
from ...runtime.session import read_graph
from ...runtime.threads import choose_threads
from ..config import check_config, transformers_config
from ..identity import model_sha256
from ..source import Source
from .anatomy import dissect
from .finding import Bisection, Row
from .probe import Piece, Probe
from .stored import compare_stored
from .walk import Walk
from .weights import Known, NearWeights, SourceWeights, StoredWeights, Weights, source_weights

_TOKENS, _SINGLE = 24, 4
PREFILL, CHUNK, DECODE = "prefill", "chunk", "decode"


def bisect(
    bundle: Bundle, *, source: Source | None = None, progress: Progress | None = None, threads: int | None = None
) -> Bisection:
    """Compare a bundle with PyTorch place by place, and name the first place that differs by more than rounding.

    source: the checkpoint that the bundle was built from, whose tensors PyTorch then computes with; without it, with
    those that the bundle stores. threads: of ONNX Runtime, default the physical cores. Raises LlamaExportError when the
    bundle has no exact reference and no source is given, when the source is of another model, and as `open_session`
    does; UsageError when `threads` is out of range.
    """
    progress, count = progress or Silent(), choose_threads(threads)
    index = _exact_index(bundle)
    config = _config(bundle)
    weights = _weights(bundle, index, source)
    rows: list[Row] = []
    if index is not None:
        progress.stage("Comparing the stored weights")
        rows += compare_stored(bundle, index, config, _known(weights, source), progress, count)
    progress.stage("Comparing layer by layer")
    model = onnx.load_model_from_string(read_graph(bundle))
    ids = _text(bundle, index)
    pieces = cut(len(ids))
    anatomy = dissect(model, bundle.manifest.shape, config.head_dim)
    probe = Probe(bundle, model, anatomy.exposed, length=len(ids), threads=count)
    dtype, context = bundle.manifest.shape.activations, bundle.manifest.limits.context
    walk = Walk(config, context, weights, anatomy, probe, ids, pieces, dtype)
    rows += walk.run(progress)
    return Bisection(
        str(bundle.path),
        probe.name,
        weights.told,
        dtype,
        config.num_hidden_layers,
        tuple(piece.count for piece in pieces),
        0 if index is None else len(index.weights) + len(index.tables) + len(index.inputs),
        tuple(rows),
        tuple(_notes(bundle, index)),
    )


def cut(length: int) -> tuple[Piece, ...]:
    """A text of so many tokens in three passes: a prefill, a second piece on the filled cache, and single tokens."""
    single = min(_SINGLE, length // 3)
    first = length - single - (length - single) // 3
    firsts = [0, first, *range(length - single, length)]
    names = [PREFILL, CHUNK, *[DECODE] * single]
    stops = [*firsts[1:], length]
    return tuple(
        Piece(name, start, stop - start) for name, start, stop in zip(names, firsts, stops, strict=True) if stop > start
    )


def _exact_index(bundle: Bundle) -> Index | None:
    path = bundle.path / reference_file(EXACT)
    return load_index(path, BUILD_AGAIN) if path.is_file() else None


def _config(bundle: Bundle) -> PreTrainedConfig:
    try:
        value = json.loads(bundle.file("config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LlamaExportError(
            f"{bundle.path}/config.json cannot be read ({error}); build the bundle again."
        ) from error
    check_config(value)
    return transformers_config(value)


def _weights(bundle: Bundle, index: Index | None, source: Source | None) -> Weights:
    records = None if index is None else index.weights
    if source is not None:
        _refuse_another(bundle, source)
        if records is not None and not _retold(bundle):
            return StoredWeights(bundle, records)
        return source_weights(bundle, source.tensors, records, source.model_id)
    if records is None:
        raise LlamaExportError(
            f"{bundle.path} has no exact reference that says where its weights lie; name the checkpoint with -m, or "
            "build the bundle again without --no-reference."
        )
    return StoredWeights(bundle, records)


def _known(weights: Weights, source: Source | None) -> Known | None:
    if isinstance(weights, SourceWeights) or source is None:
        return weights if isinstance(weights, SourceWeights) else None
    return NearWeights(source.tensors)


def _retold(bundle: Bundle) -> bool:
    """Whether a checkpoint and the bundle's formats tell the stored codes."""
    quantisation = bundle.manifest.quantisation
    return quantisation is None or quantisation.retold


def _refuse_another(bundle: Bundle, source: Source) -> None:
    model, merged = bundle.manifest.model, [one.name for one in bundle.manifest.adapters if one.file is None]
    if merged:
        raise UsageError(
            f"The adapter {merged[0]} is merged into the weights of {bundle.path}, which the checkpoint alone does not "
            "have; leave -m out."
        )
    if model.sha256 is not None and model.sha256 != model_sha256(source):
        raise UsageError(
            f"{source.model_id} is not the checkpoint that {bundle.path} was built from ({model.id}); name that one."
        )


def _text(bundle: Bundle, index: Index | None) -> Int64:
    """Tokens of the reference's longest prompt, or random ones."""
    length = min(_TOKENS, bundle.manifest.limits.context)
    ids = max((prompt.ids for prompt in index.prompts), key=len) if index is not None and index.prompts else ()
    random = np.random.default_rng(0).integers(0, bundle.manifest.shape.vocab, length)
    return np.concatenate([np.array(ids, np.int64), random[len(ids) :]])[:length]


def _notes(bundle: Bundle, index: Index | None) -> Iterator[str]:
    """What a reader should know of how it was asked."""
    manifest = bundle.manifest
    if manifest.dialect != ORT:
        yield "A graph for TensorRT, asked in ONNX Runtime: what an engine makes of it is another question."
    if manifest.provider != CPU_PROVIDER:
        yield "The graph ran on the processor, not on the GPU that it is for."
    if rounds_activations(read_graph(bundle)):
        yield "The graph rounds activations to 8 bits, which is left out here."
    if manifest.choices:
        yield "Without any of its adapters."
    if index is not None and manifest.quantisation is not None and not _retold(bundle):
        yield (
            "PyTorch computed with the weights as the bundle stores them: what "
            f"{manifest.quantisation.method} chose is not in a checkpoint."
        )
    if index is None:
        yield "Without a reference in the bundle, the stored weights were not compared."
