"""A GGUF file of a Llama as a checkpoint: Hugging Face names and row order, rows read when they are needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...errors import LlamaExportError, did_you_mean
from ...optimize.tensors import Blocks, Float32, SourceTensor, UInt8
from ..config import expected_tensors
from ..licences import named_licence
from ..source import Source
from .blocks import ENCODINGS, FORMATS, decode_blocks, decode_values
from .config import check_architecture, generation_config, model_config
from .encoding import NotFiniteError
from .file import GgufFile, GgufTensor, read_gguf, read_rows
from .tokenizer import tokenizer_files

_MODEL_PARTS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROTARY_PARTS = ("self_attn.q_proj", "self_attn.k_proj")
_ROPE_FACTORS = "rope_freqs.weight"
_PIECE = 1 << 18
"""Weights decoded at a time: what is in flight then stays in the processor's cache."""

Decoded = TypeVar("Decoded", Float32, Blocks)


def open_gguf(path: Path) -> Source:
    """Open the GGUF file at `path` (architecture llama) as a checkpoint.

    Raises LlamaExportError for a damaged file, another architecture or tensor type, and for tensors that are missing,
    unknown or of another shape than the metadata say. Reads the header only.
    """
    file = read_gguf(path)
    check_architecture(file)
    config = model_config(file, _rope_factors(file))
    tensors = _tensors(file, config)
    files: dict[str, Path | bytes] = {
        "config.json": _json(config),
        "generation_config.json": _json(generation_config(config)),
        **tokenizer_files(file),
    }
    return Source(
        model_id=_text(file.metadata.get("general.name")) or path.stem,
        revision=None,
        kind="gguf",
        config=config,
        tensors=tensors,
        files=files,
        licence=named_licence(*(_text(file.metadata.get(f"general.license{part}")) for part in ("", ".name", ".link"))),
        native_precision="gguf",
    )


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor with the Hugging Face name `name`.

    `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`. Raises KeyError for a name no Llama has.
    """
    part, _, kind = name.rpartition(".")
    if part in _MODEL_PARTS:
        return f"{_MODEL_PARTS[part]}.{kind}"
    layer, _, part = part.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER_PARTS[part]}.{kind}"


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _rope_factors(file: GgufFile) -> Float32 | None:
    tensor = file.tensors.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    if len(tensor.shape) != 1:
        raise LlamaExportError(
            f"The GGUF file {file.path} has {_ROPE_FACTORS} of shape {list(tensor.shape)} instead of one axis; it is "
            "damaged or was converted wrongly, fetch it again."
        )
    return _Rows(file.path, tensor).read(0, tensor.shape[0])


def _tensors(file: GgufFile, config: dict[str, Any]) -> dict[str, SourceTensor]:
    """Check the file's tensors against the config and return them under their Hugging Face names."""
    expected = {gguf_name(name): (name, shape) for name, shape in expected_tensors(config).items()}
    for name in file.tensors:
        if name not in expected and name != _ROPE_FACTORS:
            raise LlamaExportError(
                f"The GGUF file {file.path} holds the tensor {name}, which is no part of a Llama with "
                f"{config['num_hidden_layers']} layers; choose a plain Llama model." + did_you_mean(name, expected)
            )
    return {
        name: _source_tensor(file, stored_name, name, shape, config) for stored_name, (name, shape) in expected.items()
    }


def _source_tensor(
    file: GgufFile, stored_name: str, name: str, shape: tuple[int, ...], config: dict[str, Any]
) -> SourceTensor:
    tensor = file.tensors.get(stored_name)
    if tensor is None:
        raise LlamaExportError(
            f"The GGUF file {file.path} lacks the tensor {stored_name}, which its metadata call for; it is damaged or "
            "was converted wrongly, fetch it again."
        )
    if tensor.shape != shape:
        raise LlamaExportError(
            f"The GGUF file {file.path} has the tensor {stored_name} with shape {list(tensor.shape)}, but its metadata "
            f"call for {list(shape)}; it is damaged or was converted wrongly, fetch it again."
        )
    rotary = any(part in name for part in _ROTARY_PARTS)
    rows = _Rows(file.path, tensor, config["head_dim"] if rotary else None)
    blocks = rows.blocks if tensor.type in ENCODINGS else None
    return SourceTensor(name, shape, tensor.type, FORMATS[tensor.type], rows.read, blocks)


@dataclass(frozen=True)
class _Rows:
    """Reads rows of one tensor, in Hugging Face order.

    head_dim: set for the query and key projections, whose rows GGUF stores with the two halves of each head
    interleaved (llama.cpp's `LlamaModel.permute`). Whole rows move, so the quantised blocks stay as they are.
    """

    path: Path
    tensor: GgufTensor
    head_dim: int | None = None

    def read(self, start: int, stop: int) -> Float32:
        """Return rows [start, stop) as float32."""
        values = np.empty((stop - start, *self.tensor.shape[1:]), np.float32)
        for here, rows in self._pieces(start, stop):
            values[here] = self._decoded(decode_values, rows).reshape(len(rows), *self.tensor.shape[1:])
        return values

    def blocks(self, start: int, stop: int) -> Blocks:
        """Return rows [start, stop) as stored codes and scales; types of ENCODINGS only."""
        rows, columns, format = stop - start, self.tensor.shape[1], FORMATS[self.tensor.type]
        codes = np.empty((rows, columns), np.uint8)
        scales = np.empty((rows, columns // format.block), np.float32)
        offsets, rounded = np.empty_like(scales) if format.offsets else None, 0
        for here, stored in self._pieces(start, stop):
            piece = self._decoded(decode_blocks, stored)
            codes[here], scales[here] = piece.codes, piece.scales
            if offsets is not None:
                offsets[here] = piece.offsets
            rounded += piece.rounded
        return Blocks(format, codes, scales, None, offsets, rounded)

    def _decoded(self, decode: Callable[[str, UInt8], Decoded], stored: UInt8) -> Decoded:
        try:
            return decode(self.tensor.type, stored)
        except NotFiniteError as error:
            raise LlamaExportError(
                f"The GGUF file {self.path} has scales in the tensor {self.tensor.name} that are not finite "
                "numbers; it is damaged, fetch it again."
            ) from error

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[slice, UInt8]]:
        """Yield the stored bytes of rows [start, stop) piece by piece, each with its place in the result."""
        origin, unit = start, self.head_dim or 1
        step = max(_PIECE // (math.prod(self.tensor.shape[1:]) * unit), 1) * unit
        while start < stop:
            end = min(start - start % unit + step, stop)
            yield slice(start - origin, end - origin), self._stored(start, end)
            start = end

    def _stored(self, start: int, stop: int) -> UInt8:
        """Return the stored bytes of rows [start, stop), in Hugging Face order."""
        if self.head_dim is None:
            return read_rows(self.path, self.tensor, start, stop)
        rows = np.arange(start, stop)
        row_of_head = rows % self.head_dim
        half, pair = np.divmod(row_of_head, self.head_dim // 2)
        stored = rows - row_of_head + 2 * pair + half
        lowest = int(stored.min())
        interleaved = read_rows(self.path, self.tensor, lowest, int(stored.max()) + 1)
        ordered: UInt8 = interleaved[stored - lowest]
        return ordered
