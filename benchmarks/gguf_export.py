"""Writes a Hugging Face folder as a GGUF file, so that llama.cpp runs the same weights.

    python benchmarks/gguf_export.py FOLDER FILE [--type Q4_0|F16|F32]

Every matrix is of one type, embedding and head too: by default Q4_0 (blocks of 32, one fp16 scale), the 4 bits of our
symmetric int4 bundles; F32 is what llama.cpp quantises further. Norms are fp32. The weights go through in pieces of
rows. The tokenizer is good enough to load and to decode: the benchmarks feed token ids,
so the splitting of text is left at GPT-2's. Needs llama-export with its `build` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_export.errors import LlamaExportError
from llama_export.export.config import ModelShape, check_config, check_tensors
from llama_export.export.gguf.config import llama3_factors
from llama_export.export.gguf.source import gguf_name
from llama_export.export.safetensors_file import open_safetensors, plain_tensor
from llama_export.optimize.tensors import Float32, SourceTensor, UInt8
from numpy.typing import NDArray

Type = gguf.GGMLQuantizationType
Q4_0 = Type.Q4_0
FILE_TYPES: Mapping[str, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "Q4_0": (Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "F16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "F32": (Type.F32, gguf.LlamaFileType.ALL_F32),
}
"""Of the matrices, and of a file of such."""
CHUNK_BYTES = 32 << 20


def interleaved_rows(heads: int, head_dim: int) -> NDArray[np.int64]:
    """Where each row of a query or key matrix comes from: GGUF has the halves of a head's rotary pairs side by side."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


def row_order(name: str, shape: ModelShape) -> NDArray[np.int64] | None:
    """The order in which the rows of a tensor are stored; None leaves them as they are."""
    heads = {"self_attn.q_proj.weight": shape.heads, "self_attn.k_proj.weight": shape.kv_heads}
    count = heads.get(name.split(".", 3)[-1])
    return None if count is None else interleaved_rows(count, shape.head_dim)


def row_bytes(columns: int, kind: gguf.GGMLQuantizationType) -> int:
    """The bytes of a row in GGUF's type `kind`."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    return int(columns // values * size)


def stored(tensor: SourceTensor, order: NDArray[np.int64] | None, kind: gguf.GGMLQuantizationType) -> UInt8:
    """The bytes [rows, bytes per row] of a matrix in `kind`, its rows in `order`."""
    rows, columns = tensor.shape
    out = np.empty((rows, row_bytes(columns, kind)), np.uint8)
    step = max(1, CHUNK_BYTES // (4 * columns))
    if order is not None:
        out[:] = gguf.quants.quantize(tensor.read(0, rows)[order], kind).view(np.uint8)
        return out
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out[start:stop] = gguf.quants.quantize(tensor.read(start, stop), kind).view(np.uint8)
    return out


def rope_factors(config: dict[str, Any], head_dim: int) -> Float32 | None:
    """What llama.cpp divides each rotary frequency by for rope type llama3, with Llama 3's numbers; None for default.

    Raises LlamaExportError for another rope type.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise LlamaExportError(f"This script writes rope type default or llama3, not {kind!r}; take another model.")
    return llama3_factors(head_dim, rope_theta(config), float(rope["factor"]))


def rope_theta(config: dict[str, Any]) -> float:
    """The base of the rotary frequencies, from the new or the old place in config.json."""
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta", 10000.0))


def add_metadata(
    writer: gguf.GGUFWriter, config: dict[str, Any], shape: ModelShape, file_type: gguf.LlamaFileType
) -> None:
    writer.add_file_type(file_type)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any], vocab: int) -> None:
    """Add a byte-level BPE tokenizer; ids without a string get one that no text has."""
    texts = [f"[UNUSED{token}]" for token in range(vocab)]
    kinds = [gguf.TokenType.UNUSED] * vocab
    for text, token in tokenizer["model"]["vocab"].items():
        texts[token], kinds[token] = text, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        texts[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or ["\u0100 \u0101"])  # llama.cpp wants one: that of the bytes 0 and 1, in no text
    writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)


def write_gguf(folder: Path, path: Path, type_name: str = "Q4_0") -> None:
    """Write the checkpoint in `folder` to the GGUF file `path`, its matrices of the type `type_name`.

    Raises LlamaExportError for a checkpoint that cannot be read or whose rows do not divide into blocks.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape, (kind, file_type) = check_config(config), FILE_TYPES[type_name]
    tensors = check_tensors(config, {name: plain_tensor(tensor) for name, tensor in open_safetensors(folder).items()})
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if odd := next((t.name for t in tensors.values() if len(t.shape) == 2 and t.shape[1] % block), None):
        raise LlamaExportError(
            f"The rows of {odd} do not divide into {type_name}'s blocks of {block}; take another type."
        )
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, config, shape, file_type)
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), config, shape.vocab)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1:
            writer.add_tensor_info(gguf_name(name), tensor.shape, np.dtype(np.float32), 4 * tensor.shape[0])
        else:
            size = (tensor.shape[0], row_bytes(tensor.shape[1], kind))
            writer.add_tensor_info(gguf_name(name), size, np.dtype(np.uint8), size[0] * size[1], raw_dtype=kind)
    factors = rope_factors(config, shape.head_dim)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        whole = len(tensor.shape) == 1
        writer.write_tensor_data(
            tensor.read(0, tensor.shape[0]) if whole else stored(tensor, row_order(name, shape), kind)
        )
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", choices=FILE_TYPES, default="Q4_0")
    arguments = parser.parse_args()
    partial = arguments.file.with_name(arguments.file.name + ".partial")
    try:
        write_gguf(arguments.folder, partial, arguments.type)
        partial.rename(arguments.file)
    except (LlamaExportError, OSError) as error:
        partial.unlink(missing_ok=True)
        print(f"gguf_export.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
