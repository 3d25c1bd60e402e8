"""Makes random checkpoints in the shapes of the published Llamas, so that speed and memory can be measured without a
download.

    python benchmarks/checkpoints.py llama-3.2-1b checkpoints/llama-3.2-1b [--tokenizer tokenizer.json] [--seed 0]

The folder is what Hugging Face would give: config.json, generation_config.json, bf16 safetensors, tokenizer.json and
tokenizer_config.json. The weights are a function of shape and seed alone, and are written in pieces of a few megabytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from llama_export.export.config import check_config
from llama_export.export.published import published_configs
from numpy.typing import NDArray

Config = dict[str, Any]

CHUNK_ELEMENTS = 1 << 20
SPARE_BYTES = 200 << 20  # left free on the disk beside the checkpoint


def llama_tiny() -> Config:
    """Nobody's: a Llama 3.2 for a quick try of every step."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    more = {"head_dim": 32, "intermediate_size": 640, "vocab_size": 2048, "bos_token_id": 2046, "eos_token_id": 2047}
    return {**published_configs()["llama-3.2-1b"], **sizes, **more}


SHAPES: Mapping[str, Config] = {"llama-tiny": llama_tiny(), **published_configs()}
"""The content of config.json by the name of the shape."""


@dataclass(frozen=True)
class Tensor:
    """One bf16 tensor of the checkpoint: `shape` as safetensors stores it, values drawn around `mean` with `std`."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return 2 * self.elements


def tensors(config: Config) -> list[Tensor]:
    """Every tensor of the checkpoint, in the order they are written.

    A matrix of n inputs has the deviation 1/sqrt(n), which keeps the variance of what it is given; the two projections
    that write to the residual stream are narrower by sqrt(2 layers) (Radford et al. 2019). For the 1B shape that is
    0.022 and below, as in trained Llamas, and greedy decoding does not fall into repeating one token.
    """
    shape = check_config(config)
    hidden, ffn = shape.hidden, shape.ffn
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    residual = (2 * shape.layers) ** -0.5

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return Tensor(f"{name}.weight", (rows, columns), 0.0, scale * columns**-0.5)

    def norm(name: str) -> Tensor:
        return Tensor(f"{name}.weight", (hidden,), 1.0, 0.1)

    result = [Tensor("model.embed_tokens.weight", (shape.vocab, hidden), 0.0, 0.02)]
    for layer in (f"model.layers.{number}" for number in range(shape.layers)):
        result += [
            norm(f"{layer}.input_layernorm"),
            matrix(f"{layer}.self_attn.q_proj", queries, hidden),
            matrix(f"{layer}.self_attn.k_proj", keys, hidden),
            matrix(f"{layer}.self_attn.v_proj", keys, hidden),
            matrix(f"{layer}.self_attn.o_proj", hidden, queries, residual),
            norm(f"{layer}.post_attention_layernorm"),
            matrix(f"{layer}.mlp.gate_proj", ffn, hidden),
            matrix(f"{layer}.mlp.up_proj", ffn, hidden),
            matrix(f"{layer}.mlp.down_proj", hidden, ffn, residual),
        ]
    result.append(norm("model.norm"))
    if not shape.tied:
        result.append(matrix("lm_head", shape.vocab, hidden))
    return result


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 values to bfloat16, to nearest and ties to even; returns the bit patterns."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_tensor(file: BinaryIO, tensor: Tensor, seed: int, index: int) -> None:
    """Draw tensor number `index` of the checkpoint and append its bytes, little-endian."""
    generator = np.random.Generator(np.random.SFC64([seed, index]))
    for start in range(0, tensor.elements, CHUNK_ELEMENTS):
        values = generator.standard_normal(min(CHUNK_ELEMENTS, tensor.elements - start), dtype=np.float32)
        values *= np.float32(tensor.std)
        values += np.float32(tensor.mean)
        file.write(bf16_bits(values).astype("<u2", copy=False).tobytes())


def shards(wanted: list[Tensor], limit: int) -> list[list[tuple[int, Tensor]]]:
    """Split numbered tensors into files of at most `limit` bytes, at least one tensor each."""
    files: list[list[tuple[int, Tensor]]] = [[]]
    size = 0
    for index, tensor in enumerate(wanted):
        if files[-1] and size + tensor.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append((index, tensor))
        size += tensor.nbytes
    return files


def write_shard(path: Path, content: list[tuple[int, Tensor]], seed: int) -> None:
    """Write one safetensors file: the header's length in 8 bytes, the header in JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for _, tensor in content:
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, tensor in content:
            write_tensor(file, tensor, seed, index)


def write_weights(folder: Path, config: Config, seed: int, shard_bytes: int) -> None:
    """Write model.safetensors, or several numbered files and their index where one would pass `shard_bytes`."""
    wanted = tensors(config)
    files = shards(wanted, shard_bytes)
    if len(files) == 1:
        write_shard(folder / "model.safetensors", files[0], seed)
        return
    weight_map: dict[str, str] = {}
    for number, content in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        write_shard(folder / name, content, seed)
        weight_map |= {tensor.name: name for _, tensor in content}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in wanted)}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level tokenizer (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def byte_strings() -> Iterator[str]:
    """All byte strings in the byte-level alphabet, the shortest first."""
    alphabet = byte_alphabet()
    for length in itertools.count(1):
        yield from map("".join, itertools.product(alphabet, repeat=length))


def special_tokens(config: Config) -> tuple[int, int]:
    """The ids that begin and end a text; the first where there are several."""
    ends = config["eos_token_id"]
    return config["bos_token_id"], ends[0] if isinstance(ends, list) else ends


def byte_tokenizer(config: Config) -> dict[str, Any]:
    """A tokenizer.json with a string for every id: single bytes, then longer byte strings that only decoding uses."""
    special = dict(zip(special_tokens(config), ("<|begin_of_text|>", "<|end_of_text|>"), strict=True))
    strings = byte_strings()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for token, text in sorted(special.items())
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {special.get(token) or next(strings): token for token in range(config["vocab_size"])},
            "merges": [],
        },
    }


def token_strings(tokenizer: dict[str, Any]) -> dict[int, str]:
    """The string of every id in a tokenizer.json.

    Raises ValueError when the file holds no vocabulary that maps strings to ids.
    """
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if not hasattr(vocabulary, "items"):
        raise ValueError("the tokenizer has no model.vocab that maps strings to ids; give a BPE tokenizer.json")
    return {token: text for text, token in vocabulary.items()} | {
        added["id"]: added["content"] for added in tokenizer.get("added_tokens", [])
    }


def tokenizer_config(tokenizer: dict[str, Any], config: Config) -> dict[str, Any]:
    """The tokenizer_config.json for a tokenizer whose ids must lie inside the vocabulary; else raises ValueError."""
    strings = token_strings(tokenizer)
    if max(strings) >= config["vocab_size"]:
        raise ValueError(
            f"the tokenizer's largest id is {max(strings)}, but the shape has {config['vocab_size']} tokens; "
            "give a tokenizer of this vocabulary or leave --tokenizer out"
        )
    bos, eos = special_tokens(config)
    ends = {"bos_token": strings.get(bos), "eos_token": strings.get(eos)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: text for name, text in ends.items() if text is not None},
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(config: Config, folder: Path, seed: int, tokenizer_file: Path | None, shard_bytes: int) -> None:
    """Write a whole checkpoint to `folder`, which must not exist; it appears only when it is complete.

    Raises ValueError for a tokenizer that does not fit, FileExistsError, and OSError when the disk is too full.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder or remove it first")
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8")) if tokenizer_file else byte_tokenizer(config)
    settings = tokenizer_config(tokenizer, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in tensors(config)) + SPARE_BYTES
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free >> 20} MiB free, but the checkpoint needs {needed >> 20} MiB")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_json(partial / "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(partial / "generation_config.json", {"_from_model_config": True, **ends, "do_sample": False})
    write_json(partial / "tokenizer.json", tokenizer)
    write_json(partial / "tokenizer_config.json", settings)
    write_weights(partial, config, seed, shard_bytes)
    partial.rename(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to carry instead of the byte-level one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000, help="largest safetensors file")
    arguments = parser.parse_args()
    try:
        write_checkpoint(
            SHAPES[arguments.shape], arguments.folder, arguments.seed, arguments.tokenizer, arguments.shard_bytes
        )
    except (OSError, ValueError) as error:
        print(f"checkpoints.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
