"""A model by its config alone: from a folder, a GGUF file's header, the list of published Llamas, or the hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import LlamaExportError, UsageError
from ..optimize.formats import FLOATS, FP16, Format, int_format
from ..optimize.tensors import SourceTensor
from .config import ModelShape, check_config, expected_tensors
from .hub import HubOptions, download_file
from .json_object import read_object
from .published import Published, published
from .source import HUB_FILE, looks_like_path, no_such_path

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TUNED = re.compile(r"-(instruct|chat)(?=$|-hf$)")
"""What the hub ids of tuned Llamas have in addition; their shapes are those of the base models."""


@dataclass(frozen=True)
class ConfigSource:
    """What a config says of a model. tensors: without values, `read` of them refuses. native: as in `Source`.

    origin: where the config is from, for people. notes: what was taken for granted, as whole sentences.
    """

    name: str
    config: Mapping[str, Any]
    shape: ModelShape
    tensors: Mapping[str, SourceTensor]
    native: str | None
    origin: str
    notes: tuple[str, ...] = ()


def open_config(model: str, options: HubOptions | None = None) -> ConfigSource:
    """Read what the config of `model` says: a folder, a GGUF file, a published Llama by name or hub id, or a hub id.

    Of the hub only config.json is fetched, and nothing of a published Llama unless `options` name a revision. Raises
    UsageError when the name cannot be used, LlamaExportError when there is no such model or its config is none that
    exports.
    """
    options = options or HubOptions()
    path = Path(model).expanduser() if model else Path("?")
    try:
        here = path.exists()
    except OSError as error:
        raise LlamaExportError(f"{model[:200]} cannot be read: {error.strerror}; name a folder or a hub id.") from error
    if here and options.revision is not None:
        raise UsageError(f"--revision {options.revision} is for models on the hub, but {model} is here; leave it out.")
    if here:
        return _open_path(path)
    found = _published(model) if options.revision is None else None
    if found is not None:
        return _of_config(found.hub, found.config, "the list of published Llamas")
    if HUB_FILE.fullmatch(model):
        raise UsageError(f"Of {model} the whole file would have to be fetched; fetch it, then name the file.")
    if not model or looks_like_path(model) or "/" not in model:
        raise UsageError(f"{no_such_path(path)}{_hint(model)}")
    return _open_hub(model, options)


def _open_path(path: Path) -> ConfigSource:
    from .folder import read_config  # noqa: PLC0415 - both take a while to import
    from .gguf.source import open_gguf  # noqa: PLC0415

    if path.is_dir():
        return _of_config(path.resolve().name, read_config(path), str(path / "config.json"))
    if path.suffix.lower() != ".gguf":
        if path.name == "config.json":
            return _of_config(path.resolve().parent.name, read_object(path), str(path))
        raise UsageError(f"{path} is neither a folder nor a GGUF file; name a checkpoint's folder or a .gguf file.")
    source = open_gguf(path)
    return ConfigSource(
        source.model_id, source.config, source.shape, source.tensors, source.native_precision, f"the header of {path}"
    )


def _open_hub(model: str, options: HubOptions) -> ConfigSource:
    try:
        download = download_file(model, "config.json", options)
    except LlamaExportError as error:
        raise type(error)(f"{error}{_hint(model)}") from error
    return _of_config(model, read_object(download.path), f"config.json on the hub, {download.revision[:12]}")


def _published(model: str) -> Published | None:
    if model in published():
        return published()[model]
    return next((one for one in published().values() if _plain(one.hub) == _plain(model)), None)


def _plain(hub: str) -> str:
    """A hub id in the spelling of base models. Code Llamas differ in more than their training."""
    name = hub.casefold().replace("meta-llama/meta-llama-", "meta-llama/llama-")
    return name if "codellama" in name else _TUNED.sub("", name)


def _hint(model: str) -> str:
    known = {_plain(one.hub): one.hub for one in published().values()}
    close = difflib.get_close_matches(_plain(model), [*published(), *known], n=1, cutoff=0.8)
    return f" Did you mean {known.get(close[0], close[0])!r}?" if close else ""


def _of_config(name: str, config: Mapping[str, Any], origin: str) -> ConfigSource:
    shape = check_config(config)
    settings = config.get("quantization_config")
    dense = FLOATS.get(_DTYPES.get(str(config.get("torch_dtype", config.get("dtype"))), ""), FP16)
    packed = _packed(settings) if isinstance(settings, Mapping) else None
    tensors = {
        tensor: _without_values(tensor, size, packed if packed is not None and "_proj." in tensor else dense)
        for tensor, size in expected_tensors(config).items()
    }
    method = str(settings.get("quant_method", "")) if isinstance(settings, Mapping) else None
    notes = (f"The projections are taken as {packed.name}, as config.json describes them.",) if packed else ()
    return ConfigSource(name, config, shape, tensors, method, origin, notes)


def _packed(settings: Mapping[str, Any]) -> Format:
    """The format of projections that come quantised, as the config of GPTQ, AWQ or compressed-tensors describes it."""
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    inner = first.get("weights") if isinstance(first, Mapping) else None
    said = {**settings, **(inner if isinstance(inner, Mapping) else {})}
    bits = next((said[key] for key in ("bits", "w_bit", "num_bits") if key in said), None)
    block = next((said[key] for key in ("group_size", "q_group_size") if said.get(key)), 128)
    if bits not in (4, 8) or not isinstance(block, int):
        raise LlamaExportError(
            f"config.json says that the weights are quantised ({settings.get('quant_method')}) to {bits} bits in "
            f"groups of {block}, which cannot be planned from it; plan the unquantised checkpoint with --precision."
        )
    symmetric = bool(said.get("sym", said.get("symmetric", not said.get("zero_point", False))))
    return int_format(bits, block if block > 0 else 128, zeros=not symmetric)


def _without_values(name: str, shape: tuple[int, ...], format: Format) -> SourceTensor:
    def read(start: int, stop: int) -> NoReturn:
        raise AssertionError(f"{name} was planned from its config, rows {start} to {stop} were never here")

    return SourceTensor(name, shape, format.name, format, read)
