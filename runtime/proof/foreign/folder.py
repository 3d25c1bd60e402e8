"""Folders that optimum or onnxruntime-genai exported, recognised and measured; nothing of them is believed.

Formats: the folders that optimum-onnx 0.1 and onnxruntime-genai 0.18 write, and github.com/microsoft/onnxruntime-genai,
src/config.cpp.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import LlamaExportError, UsageError
from ...bundle import MANIFEST, is_safe_name
from .graph import read_onnx
from .signature import Signature, signature

OPTIMUM, GENAI, ONNX = "optimum", "onnxruntime-genai", "onnx"
"""Kinds of folders: what exported them; the last is any other tool with the same names of inputs and outputs."""
GENAI_CONFIG, CONFIG, TOKENIZER = "genai_config.json", "config.json", "tokenizer.json"

_GROUPED, _BLOCKWISE = "GroupQueryAttention", "MatMulNBits"
_MOST_JSON_BYTES = 4 << 20
_MOST_SIZE = 1 << 24
_ASSUMED_CONTEXT = 2048
_INNER = "onnx"
"""The folder that some publishers put the graphs into, beside the config."""
_STANDS_FOR: Mapping[str, tuple[str, ...]] = {
    "decoder_model_merged.onnx": ("decoder_model.onnx", "decoder_with_past_model.onnx"),
    "decoder_with_past_model.onnx": ("decoder_model.onnx",),
}
"""Graphs of older optimum, and the others of the same model that they make needless here."""
_QUANTISED = ("8", "4")


@dataclass(frozen=True)
class ForeignFolder:
    """What another tool exported. kind: one of those above; graph: its ONNX file; context: positions are below it.
    hidden, heads: None where nothing tells. weights: "fp32", "fp16", "bf16", or the bits of quantised ones, "8" or
    "4". grouped: attention is ONNX Runtime's GroupQueryAttention, which finds a row's place by its length.
    blockwise: it has MatMulNBits, whose kernels may round activations, or be told not to.
    tokenizer: tokenizer.json, where it is there. notes: what else a reader of a verdict should know.
    """

    path: Path
    kind: str
    graph: Path
    signature: Signature
    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    hidden: int | None
    heads: int | None
    weights: str
    grouped: bool
    blockwise: bool
    rounds_activations: bool
    tokenizer: Path | None
    notes: tuple[str, ...] = ()

    @property
    def cache_dtype(self) -> str:
        """float32 or float16, which stands for that of the activations."""
        return self.signature.cache_dtype

    @property
    def quantised(self) -> bool:
        return self.weights in _QUANTISED

    @property
    def full_precision(self) -> bool:
        """Whether kernels can be asked to round no activations: not where the graph does it itself, nor those in one
        of its inner graphs.
        """
        return not self.rounds_activations and not (self.blockwise and self.signature.branch is not None)

    @property
    def has_positions(self) -> bool:
        return self.signature.positions is not None

    def __str__(self) -> str:
        stored = f"{self.weights}-bit weights" if self.quantised else f"{self.weights} weights"
        by = "an ONNX file" if self.kind == ONNX else f"exported by {self.kind}"
        return f"{self.path}, {by}, {stored}"


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an ONNX file, or a folder with one in it and no manifest of a bundle."""
    place = Path(path)
    with contextlib.suppress(OSError):
        if place.is_file():
            return place.suffix == ".onnx"
        if place.is_dir() and not os.path.lexists(place / MANIFEST):
            return (place / GENAI_CONFIG).is_file() or bool(_graphs(place) or _graphs(place / _INNER))
    return False


def open_foreign(path: str | os.PathLike[str]) -> ForeignFolder:
    """Recognise what another tool exported. path: its folder, or the ONNX file where there are several.

    Weights are not read. Raises UsageError when there is no such folder, or it leaves open which graph is meant;
    LlamaExportError, one sentence, for anything that keeps it from being replayed.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UsageError(f"There is no {path}; name a folder that optimum or onnxruntime-genai exported, or a bundle.")
    folder = (place if place.is_dir() else place.parent).resolve()
    if not place.is_dir() and folder.name == _INNER and _plain(folder.parent / CONFIG):
        folder = folder.parent
    genai, config = (_read_json(folder, name) for name in (GENAI_CONFIG, CONFIG))
    model = _object(genai, "model")
    decoder = _object(model, "decoder")
    if config.get("is_encoder_decoder") is True or "encoder" in model:
        raise LlamaExportError(
            f"{folder} holds an encoder-decoder; only decoders that stand alone, such as Llamas, can be compared."
        )
    graph = _chosen(folder, decoder) if place.is_dir() else place
    _refuse_outside(folder, graph)
    onnx = read_onnx(graph)
    for name in sorted(onnx.files):
        _refuse_data(folder, graph, name)
    found = signature(onnx, decoder, str(graph))
    context, notes = _context(model, config)
    past, tokenizer = found.past[0][0].dims, folder / TOKENIZER
    if _plain(tokenizer):
        _refuse_outside(folder, tokenizer)
    sizes = _Sizes(graph, model, decoder, config)
    return ForeignFolder(
        path=folder,
        kind=GENAI if genai else OPTIMUM if config else ONNX,
        graph=graph.resolve(),
        signature=found,
        layers=len(found.past),
        kv_heads=sizes.find(past[1], "num_key_value_heads", "heads of the cache"),
        head_dim=sizes.find(past[3], "head_size", "size of a head"),
        vocab=sizes.find(found.logits.dims[-1], "vocab_size", "vocabulary"),
        context=context,
        hidden=sizes.told("hidden_size"),
        heads=sizes.told("num_attention_heads"),
        weights=onnx.weights,
        grouped=_GROUPED in onnx.ops,
        blockwise=_BLOCKWISE in onnx.ops,
        rounds_activations=onnx.rounds_activations,
        tokenizer=tokenizer if _plain(tokenizer) else None,
        notes=(*notes, *_graph_notes(graph)),
    )


@dataclass(frozen=True)
class _Sizes:
    """Where the sizes of a model are told, beside its graph."""

    graph: Path
    model: Mapping[str, Any]
    decoder: Mapping[str, Any]
    config: Mapping[str, Any]

    def told(self, name: str) -> int | None:
        """What the configs say; None where none of them does, or nonsense."""
        alias = "head_dim" if name == "head_size" else name
        for value in (self.decoder.get(name), self.model.get(name), self.config.get(alias)):
            if type(value) is int and 0 < value <= _MOST_SIZE:
                return value
        if name == "head_size":
            hidden, heads = self.told("hidden_size"), self.told("num_attention_heads")
            return hidden // heads if hidden and heads else None
        return None

    def find(self, dim: int | None, name: str, what: str) -> int:
        """A size by the graph, or where it leaves that free by the configs."""
        size = dim if dim is not None else self.told(name)
        if size is None or not 0 < size <= _MOST_SIZE:
            raise LlamaExportError(
                f"Neither {self.graph} nor a {CONFIG} beside it tells the {what}; export it again, with its config."
            )
        return size


def _chosen(folder: Path, decoder: Mapping[str, Any]) -> Path:
    """The graph that a folder is about."""
    if decoder:
        name = decoder.get("filename")
        if not isinstance(name, str) or not is_safe_name(name):
            raise LlamaExportError(f"{folder / GENAI_CONFIG} names no file of its own folder as the decoder's.")
        if not _plain(folder / name):
            raise LlamaExportError(f"{folder / GENAI_CONFIG} names {name}, which is not there; copy the folder again.")
        return folder / name
    found = _graphs(folder) or _graphs(folder / _INNER)
    names = {graph.name for graph in found}
    if any(name.startswith("encoder_model") for name in names):
        raise LlamaExportError(
            f"{folder} holds an encoder-decoder; only decoders that stand alone, such as Llamas, can be compared."
        )
    needless = {other for name, others in _STANDS_FOR.items() if name in names for other in others}
    left = [graph for graph in found if graph.name not in needless]
    if not left:
        raise UsageError(
            f"{folder} has no {MANIFEST} and no ONNX file, so it is neither a bundle nor exported by optimum or "
            "onnxruntime-genai; name the folder that holds model.onnx."
        )
    if len(left) > 1:
        told = ", ".join(sorted(graph.name for graph in left)[:8])
        raise UsageError(f"{left[0].parent} has several graphs ({told}); name the file that is meant.")
    return left[0]


def _graphs(folder: Path) -> list[Path]:
    """The ONNX files of a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == ".onnx" and _plain(path))


def _plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _refuse_outside(folder: Path, path: Path) -> None:
    try:
        inside = path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise LlamaExportError(f"{path} is a link that leads nowhere; copy the folder again.") from error
    if not inside:
        raise LlamaExportError(
            f"{path} is a link that leads out of its folder; copy the folder with its links followed (cp -rL)."
        )


def _refuse_data(folder: Path, graph: Path, name: str) -> None:
    """Weights beside a graph have to be files of the folder: ONNX Runtime itself follows any path, and takes some names
    for addresses in memory.
    """
    if not is_safe_name(name):
        raise LlamaExportError(f"{graph} keeps weights in {name!r}, which is no file of its folder; export it again.")
    path = graph.parent / name
    _refuse_outside(folder, path)
    if not _plain(path):
        raise LlamaExportError(f"{graph} keeps weights in {name}, which is not there; copy the folder again.")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a file of the folder; empty where there is none."""
    path = folder / name
    if not os.path.lexists(path):
        return {}
    _refuse_outside(folder, path)
    try:
        usable = _plain(path) and path.stat().st_size <= _MOST_JSON_BYTES
        value = json.loads(path.read_bytes()) if usable else None
    except OSError as error:
        raise LlamaExportError(f"{path} cannot be read: {error.strerror}; check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise LlamaExportError(f"{path} is no valid JSON ({error}); export it again.") from error
    if not isinstance(value, dict):
        raise LlamaExportError(f"{path} is not a JSON object of at most {_MOST_JSON_BYTES >> 20} MiB; export it again.")
    return value


def _object(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = value.get(name)
    return inner if isinstance(inner, dict) else {}


def _context(model: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, Sequence[str]]:
    for value in (model.get("context_length"), config.get("max_position_embeddings")):
        if type(value) is int and 0 < value <= _MOST_SIZE:
            return value, ()
    return _ASSUMED_CONTEXT, (f"Nothing tells the context of this graph; {_ASSUMED_CONTEXT} tokens were assumed.",)


def _graph_notes(graph: Path) -> list[str]:
    notes = []
    if graph.name == "decoder_with_past_model.onnx":
        notes.append(f"Only {graph.name} ran; decoder_model.onnx, which others take for a prompt, was not looked at.")
    return notes
