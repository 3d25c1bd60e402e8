"""A folder in Hugging Face's layout as a checkpoint: config.json, safetensors, tokenizer, licence files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LlamaExportError
from ..optimize.formats import EMBEDDING, HEAD
from ..optimize.tensors import SourceTensor
from ..runtime.bundle import is_safe_name, same_elsewhere
from ..tables import size
from .config import check_config
from .json_object import MOST_BYTES, read_object
from .licences import folder_licence, legal_files
from .prequantised import Prequantised, check_quantisation, prequantised_tensors
from .safetensors_file import open_safetensors, plain_tensor
from .source import Kind, Source

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)
_QUANTISED = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Settings that AutoGPTQ and AutoAWQ write, and the method they are of."""
_ROWS = 4096


def open_folder(path: Path, *, model_id: str, revision: str | None = None, kind: Kind = "folder") -> Source:
    """Open a checkpoint folder. Reads config, tokenizer settings and the headers of the weights.

    Raises LlamaExportError that names the file that is missing or broken.
    """
    config = read_config(path)
    settings = _quantisation(path, config)
    stored = open_safetensors(path)
    if settings is None:
        found = Prequantised({name: plain_tensor(tensor) for name, tensor in stored.items()}, None)
    else:
        found = prequantised_tensors(settings, config, stored)
    tensors = found.tensors
    if config.get("tie_word_embeddings"):
        tensors = _without_tied_copy(tensors)
    if not (path / "tokenizer.json").is_file():
        raise LlamaExportError(_no_tokenizer(path))
    return Source(
        model_id=model_id,
        revision=revision,
        kind=kind,
        config=config,
        tensors=tensors,
        files=_files(path),
        licence=folder_licence(path),
        native_precision=found.method,
        notes=found.notes,
    )


def _quantisation(path: Path, config: Mapping[str, Any]) -> Any:
    """What says how the weights are quantised, None when they are not. Before config.json did, files of their own."""
    if settings := config.get("quantization_config"):
        return settings
    for name, method in _QUANTISED.items():
        if (path / name).is_file():
            return {"quant_method": method, **read_object(path / name)}
    return None


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a checkpoint folder, after `check_config`, and once its quantisation is one that is
    read. Raises LlamaExportError without one.
    """
    file = path / "config.json"
    if not file.is_file():
        raise LlamaExportError(_no_config(path))
    config = read_object(file)
    check_config(config)
    if (settings := _quantisation(path, config)) is not None:
        check_quantisation(settings)
    return config


def _no_config(path: Path) -> str:
    if (path / "manifest.json").is_file():
        return f"{path} is a bundle, not a checkpoint; name the model that it was built from."
    if (path / "params.json").is_file():
        return (
            f"{path} holds a checkpoint in Meta's own format (params.json); take the one in Hugging Face's format, "
            "with config.json and safetensors."
        )
    if (path / "adapter_config.json").is_file():
        return f"{path} holds a LoRA adapter and no model; name the model that the adapter was trained on."
    if ggufs := sorted(path.glob("*.gguf")):
        return f"{path} has no config.json but GGUF files; name the file, such as {ggufs[0]}."
    return f"{path} has no config.json; expected a checkpoint folder with config.json, tokenizer.json and safetensors."


def _no_tokenizer(path: Path) -> str:
    if (path / "tokenizer.model").is_file():
        return (
            f"{path} has only a sentencepiece tokenizer.model; convert it with AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...) of transformers, which writes the tokenizer.json that is expected."
        )
    return f"{path} has no tokenizer.json, which the bundle needs; copy it from the checkpoint."


def _without_tied_copy(tensors: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Leave out a head that repeats the embedding; one that differs contradicts the config and is refused."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return tensors
    if head.shape != embedding.shape or any(
        not np.array_equal(head.read(start, stop), embedding.read(start, stop), equal_nan=True)
        for start in range(0, head.shape[0], _ROWS)
        for stop in [min(start + _ROWS, head.shape[0])]
    ):
        raise LlamaExportError(
            f"config.json says tie_word_embeddings: true, but {HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false in config.json if the head is meant."
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _files(path: Path) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = {name: path / name for name in _COPIED if (path / name).is_file()}
    files |= legal_files(path)
    check_carried(path, files)
    if "chat_template.jinja" not in files and (template := _chat_template(path)) is not None:
        files["chat_template.jinja"] = template.encode(errors="replace")  # JSON allows half characters
    return files


def check_carried(path: Path, files: Mapping[str, Path | bytes]) -> None:
    """Raise LlamaExportError for a file of the folder `path` that cannot go into a bundle."""
    for name, other in same_elsewhere(files):
        raise LlamaExportError(
            f"{path} holds {name!r} and {other!r}, which are one file where case does not count; rename one of them."
        )
    for name, file in files.items():
        if not (is_safe_name(name) and name.isprintable()):
            raise LlamaExportError(
                f"{path} holds the file {name!r}, which belongs into the bundle, but not every system can name a file "
                "so; rename it."
            )
        if isinstance(file, Path) and file.stat().st_size > MOST_BYTES:
            raise LlamaExportError(
                f"{file} has {size(file.stat().st_size)}, but at most {size(MOST_BYTES)} are read; check what it is."
            )


def _chat_template(path: Path) -> str | None:
    """Return the chat template that older checkpoints keep in tokenizer_config.json or chat_template.json."""
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_object(path / name).get("chat_template") if (path / name).is_file() else None
        if isinstance(template, list):  # several, by name
            named = (item for item in template if isinstance(item, Mapping) and item.get("name") == "default")
            template = next(named, {}).get("template")
        if isinstance(template, str):
            return template
    return None
