"""A checkpoint as the rest of the project sees it, wherever it comes from: a folder, the hub, or a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import LlamaExportError, UsageError, did_you_mean
from ..optimize.tensors import SourceTensor
from ..progress import Progress, Silent
from .config import ModelShape, check_tensors
from .hub import HubOptions, download_file, download_settings, download_weights
from .json_object import parse_object
from .token_ids import TokenIds, token_ids

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
    native_precision: where the weights come quantised, by what, which is kept by default: "gguf", or the quant_method
        of config.json; None for the others.
    notes: what users of a bundle should know of the checkpoint: whole sentences.
    """

    model_id: str
    revision: str | None
    kind: Kind
    config: dict[str, Any]
    tensors: Mapping[str, SourceTensor]
    files: Mapping[str, Path | bytes]
    licence: str | None
    native_precision: str | None
    notes: tuple[str, ...] = ()

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes that config.json gives."""
        return ModelShape.from_config(self.config)

    @cached_property
    def tokens(self) -> TokenIds:
        """Which tokens begin, end and pad a text; the tokenizer is read for it, once.

        Raises LlamaExportError as `token_ids.token_ids` does.
        """
        return token_ids(self)

    def with_other(self, **changes: Any) -> Source:
        """A copy with other tensors or notes. What was read of the tokenizer is kept: a large one takes 100 MB to
        read.
        """
        copy = replace(self, **changes)
        copy.__dict__.update({name: value for name, value in self.__dict__.items() if name not in copy.__dict__})
        return copy

    def content(self, name: str) -> bytes:
        """Return the content of one of `files`. Raises KeyError for another name."""
        file = self.files[name]
        return file if isinstance(file, bytes) else file.read_bytes()

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in one of `files`, empty when the checkpoint has no such file.

        Raises LlamaExportError when it holds no JSON object.
        """
        if name not in self.files:
            return {}
        return parse_object(self.content(name), f"The {name} of {self.model_id}")


HUB_FILE = re.compile(r"(?P<repo>[^/:]+/[^/:]+):(?P<file>(?!.*\.\.)[^:/][^:]*\.gguf)", re.IGNORECASE)
"""A GGUF file of a repository on the hub."""


def open_source(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Source:
    """Open `model`: an existing folder, an existing GGUF file, or a hub id (`org/name`, `org/name:file.gguf`).

    revision, token and cache_dir are for hub ids. progress: is told of downloads that are tried again, and decides
    whether bars are drawn.
    Raises UsageError when the name cannot be used, LlamaExportError when the checkpoint cannot be.
    """
    try:
        path = Path(model).expanduser()
        is_here = bool(model) and path.exists()
        if is_here and revision is not None:
            raise UsageError(f"--revision {revision} is for models on the hub, but {model} is here; leave it out.")
        source = _open_path(path) if is_here else None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user of somebody unknown
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise LlamaExportError(
            f"{model[:200]} cannot be read: {reason}; name a folder, a GGUF file or a hub id."
        ) from error
    if source is None:
        if looks_like_path(model) and not HUB_FILE.fullmatch(model):
            raise UsageError(no_such_path(path))
        source = _open_hub(model, HubOptions(revision, token, cache_dir, progress or Silent()))
    source = replace(source, tensors=check_tensors(source.config, source.tensors))
    _ = source.tokens  # what is wrong with the tokenizer is told now, not after the weights
    return source


def _open_path(path: Path) -> Source:
    from .folder import open_folder  # noqa: PLC0415 - both make the class above
    from .gguf.source import open_gguf  # noqa: PLC0415

    if path.is_dir():
        return open_folder(path, model_id=path.resolve().name)
    if not path.is_file():
        raise UsageError(f"{path} is neither a folder nor a plain file; name a folder or a .gguf file.")
    if path.suffix.lower() == ".gguf":
        return open_gguf(path)
    advice = f"name its folder {path.parent}" if path.suffix == ".safetensors" else "name a folder or a .gguf file"
    raise UsageError(f"{path} is a file, but no GGUF file, which is the one kind of file read as a model; {advice}.")


def _open_hub(model: str, options: HubOptions) -> Source:
    from .folder import open_folder, read_config  # noqa: PLC0415
    from .gguf.source import open_gguf  # noqa: PLC0415

    if match := HUB_FILE.fullmatch(model):
        download = download_file(match["repo"], match["file"], options)
        return replace(open_gguf(download.path), model_id=model, revision=download.revision)
    try:
        download = download_settings(model, options)
    except LlamaExportError as error:
        raise type(error)(f"{error}{_nor_here(Path(model))}") from error
    read_config(download.path)  # refuses other architectures before gigabytes of them are downloaded
    download_weights(model, download, options)
    return open_folder(download.path, model_id=model, revision=download.revision, kind="hub")


def _nor_here(path: Path) -> str:
    """What to add where the hub gave nothing for a name that may have been meant as a folder."""
    try:
        names = [entry.name for entry in sorted(path.parent.iterdir())]
    except OSError:  # no such folder, or not ours to read: then it was meant for the hub
        return ""
    return f" Nor is there a folder {path} here.{did_you_mean(path.name, names)}"


def looks_like_path(model: str) -> bool:
    """Whether a name that is not here was meant as a path rather than as a hub id."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model or model.endswith(".gguf")


def no_such_path(path: Path) -> str:
    """The sentence about a path that is not here, with the closest name beside it."""
    parent = path.parent
    if not parent.is_dir():
        return f"There is no {path}, since there is no folder {parent}; name a folder, a GGUF file or a hub id."
    names = [entry.name for entry in sorted(parent.glob("*")) if entry.is_dir() or entry.suffix == ".gguf"]
    return f"There is no {path}; name a folder, a GGUF file or a hub id." + did_you_mean(path.name, names)
