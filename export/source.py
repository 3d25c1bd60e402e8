"""A checkpoint as the rest of the project sees it, wherever it comes from: a folder, the hub, or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..optimize.tensors import SourceTensor

Kind = Literal["folder", "hub", "gguf"]


@dataclass(frozen=True)
class Source:
    """A checkpoint that passed the checks of `config.check_config` and `config.check_tensors`.

    model_id: hub id, folder name, or `general.name` of a GGUF file.
    revision: the resolved commit for hub sources, else None.
    config: the content of config.json.
    tensors: by Hugging Face name. A tied `lm_head.weight` is absent, also when the file holds a copy of it.
    files: bundle file name -> where it is, or its content: config.json, generation_config.json, tokenizer.json,
        tokenizer_config.json, chat_template.jinja, special_tokens_map.json, LICENSE, NOTICE, USE_POLICY and the like.
    native_precision: "gguf" for GGUF files, whose own quantisation is kept by default; None for the others.
    """

    model_id: str
    revision: str | None
    kind: Kind
    config: dict[str, Any]
    tensors: Mapping[str, SourceTensor]
    files: Mapping[str, Path | bytes]
    licence: str | None
    native_precision: str | None


def open_source(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    progress: bool | None = None,
) -> Source:
    """Open `model`: an existing folder, an existing GGUF file, or a hub id (`org/name`, `org/name:file.gguf`).

    revision, token and cache_dir are for hub ids. progress: whether downloads draw bars on stderr; None decides by
    whether stderr is a terminal.
    Raises UsageError when the name cannot be used, LlamaExportError when the checkpoint cannot be.
    """
    raise NotImplementedError(model, revision, token, cache_dir, progress)
