"""LoRA adapters in peft's format: what they add to the weights of the model that they were trained on.

A folder holds adapter_config.json and adapter_model.safetensors with two thin matrices for each adapted projection:
lora_A [rank, inputs] and lora_B [outputs, rank]. The adapted weight is W + scale * (B @ A), scale = alpha / rank, or
alpha / sqrt(rank) with rsLoRA (Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import LlamaExportError, UsageError
from ...optimize.formats import FLOATS
from ...optimize.tensors import Float32
from ...runtime.bundle import is_safe_name
from ..json_object import read_object
from ..safetensors_file import StoredTensor, open_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_THIN = re.compile(r"(base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
_WHOLE = re.compile(r"(base_model\.model\.)?(?P<module>.+?)(\.modules_to_save(\.default)?)?\.weight")
_COPY = re.compile(r".+\.base_layer\.weight")
"""The model's own weight, which peft saves beside an adapted head; never trained, at times in another dtype."""
_PLAIN_PATTERN = re.compile(r"\^?[\w.]{1,300}")
_MOST_RANK = 1 << 14
_MOST_NAME = 300

_OTHER_MATHEMATICS = (
    *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "lora_bias", "layer_replication"),
    *("alora_invocation_tokens", "trainable_token_indices", "target_parameters"),
)
"""Keys of adapter_config.json that, when set, make something else of the model than W + scale * (B @ A)."""
_OTHER_BASE = re.compile("pissa.*|corda.*|olora|lora_ga|loftq", re.IGNORECASE)
"""What init_lora_weights says of adapters that began by taking a part out of W: they fit what is left of it. Where peft
has converted one to fit W, it says true.
"""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to one weight: `scale * (b @ a)`. a: [rank, inputs]; b: [outputs, rank]."""

    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def scaled_b(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) of `scale * b`, float32 [stop - start, rank]."""
        rows: Float32 = self.b.floats(start, stop) * np.float32(self.scale)
        return rows

    def delta(self, start: int, stop: int, dtype: npt.DTypeLike = np.float32) -> Float32:
        """Rows [start, stop) of what is added, float32 [stop - start, inputs]; of matrices stored in `dtype`."""
        a, b = (
            half.astype(dtype, copy=False).astype(np.float32, copy=False)
            for half in (_whole(self.a), self.scaled_b(start, stop))
        )
        with np.errstate(invalid="ignore", over="ignore"):  # whoever stores it looks for infinity
            added: Float32 = b @ a
        return added


@functools.lru_cache(maxsize=16)  # of the few weights that are written at the moment, not of all
def _whole(thin: StoredTensor) -> Float32:
    return thin.floats(0, thin.shape[0])


@dataclass(frozen=True)
class Adapter:
    """One adapter. base: the model that it says it was trained on, a hub id or a path; weight: by which all that it
    adds is multiplied (already part of each scale); parts: what is added, by the Hugging Face name of the weight;
    whole: weights that it brings along instead of the model's.
    """

    name: str
    path: Path
    base: str | None
    weight: float
    parts: Mapping[str, LowRank]
    whole: Mapping[str, StoredTensor]

    @property
    def rank(self) -> int:
        """The largest of any part."""
        return max(part.rank for part in self.parts.values())


def read_adapter(text: str) -> Adapter:
    """Read the adapter of `--adapter DIR[:weight]`.

    Raises UsageError when there is no such folder, LlamaExportError for another method than plain LoRA, and for files
    that are missing, broken or contradict each other.
    """
    path, weight = _split(text)
    if not (path / CONFIG).is_file():
        raise UsageError(_no_adapter(path))
    config = read_object(path / CONFIG)
    _check_method(path, config)
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        why = "only a pickle, which can run code and is not read" if pickled else "no weights"
        raise LlamaExportError(
            f"The adapter {path} holds {why}; expected {WEIGHTS}, which save_pretrained of peft writes."
        )
    thin, whole = _tensors(path)
    parts = {f"{module}.weight": _low_rank(path, config, weight, module, halves) for module, halves in thin.items()}
    if not parts:
        raise LlamaExportError(f"The adapter {path} holds no lora_A and lora_B; take the adapter again.")
    _check_targets(path, config, parts)
    base = config.get("base_model_name_or_path")
    base = " ".join(base.split())[:_MOST_NAME] if isinstance(base, str) else ""  # it is shown to people
    return Adapter(_name(path), path, base or None, weight, parts, whole)


def _split(text: str) -> tuple[Path, float]:
    """The folder and the weight of DIR[:weight]."""
    folder, colon, number = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return Path(text).expanduser(), 1.0
    try:
        weight = float(number)
    except ValueError:
        return Path(text).expanduser(), 1.0
    if not math.isfinite(weight) or weight == 0:
        raise UsageError(f"--adapter {text} has the weight {number}, but a number other than 0 is expected, like 0.5.")
    return Path(folder).expanduser(), weight


def _name(path: Path) -> str:
    name = path.resolve().name
    if not is_safe_name(name) or not name.isprintable():
        raise UsageError(f"The adapter's folder {path} has a name that not every system can name a file by; rename it.")
    return name


def _no_adapter(path: Path) -> str:
    if not path.is_dir():
        return f"There is no adapter folder {path}; expected one with {CONFIG} and {WEIGHTS}, with or without :weight."
    if (path / "config.json").is_file():
        return f"{path} is a model, not an adapter; give it as --model."
    return f"{path} holds no {CONFIG}; expected the folder of a LoRA adapter in peft's format."


def _check_method(path: Path, config: Mapping[str, Any]) -> None:
    method = config.get("peft_type")
    if method != "LORA":
        raise LlamaExportError(
            f"The adapter {path} is of the kind {method!r:.80}, and only LORA is supported; merge it with peft first."
        )
    for key in _OTHER_MATHEMATICS:
        if config.get(key):
            raise LlamaExportError(
                f"The adapter {path} sets {key} to {str(config[key])[:80]}, which plain LoRA does not have and this "
                "version does not support; merge it with peft's merge_and_unload first."
            )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and _OTHER_BASE.fullmatch(begun):
        raise LlamaExportError(
            f"The adapter {path} was begun with {begun[:40]!r}, which changes the model's own weights too; convert it "
            "to plain LoRA (save_pretrained of peft with path_initial_model_for_weight_conversion), or merge it with "
            "peft's merge_and_unload first."
        )
    if config.get("bias", "none") != "none":
        raise LlamaExportError(
            f"The adapter {path} trains biases (bias is {config['bias']!r:.80}), which is not supported; merge it with "
            "peft's merge_and_unload first."
        )


def _tensors(path: Path) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """The thin matrices by module and A or B, and whole weights by name."""
    thin: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    whole: dict[str, StoredTensor] = {}
    for name, tensor in open_file(path / WEIGHTS).items():
        if _COPY.fullmatch(name):
            continue
        match = _THIN.fullmatch(name) or _WHOLE.fullmatch(name)
        if match is None or ".lora_" in match["module"]:
            raise LlamaExportError(
                f"The adapter {path} holds the tensor {name}, which is no lora_A or lora_B of a projection; merge it "
                "with peft's merge_and_unload first."
            )
        if tensor.dtype not in FLOATS:
            raise LlamaExportError(
                f"The adapter {path} holds {name} as {tensor.dtype}, but {', '.join(FLOATS)} are read; take it again."
            )
        part = match.groupdict().get("part")
        known, key = (thin[match["module"]], part) if part else (whole, f"{match['module']}.weight")
        if key in known:
            raise LlamaExportError(f"The adapter {path} holds {name} twice; take the adapter again.")
        known[key] = tensor
    return thin, whole


def _low_rank(
    path: Path, config: Mapping[str, Any], weight: float, module: str, halves: Mapping[str, StoredTensor]
) -> LowRank:
    if missing := {"A", "B"} - halves.keys():
        raise LlamaExportError(f"The adapter {path} has no lora_{missing.pop()} of {module}; take the adapter again.")
    a, b = halves["A"], halves["B"]
    rank = _setting(path, config, "r", "rank_pattern", module)
    matrices = len(a.shape) == len(b.shape) == 2
    if not (matrices and a.shape[0] == b.shape[1] == rank and 1 <= rank <= _MOST_RANK):
        raise LlamaExportError(
            f"The adapter {path} has the rank {rank:g} for {module} in {CONFIG}, but lora_A of shape {list(a.shape)} "
            f"and lora_B of shape {list(b.shape)}; take both from the same training."
        )
    alpha = _setting(path, config, "lora_alpha", "alpha_pattern", module)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a, b, scale * weight)


def _setting(path: Path, config: Mapping[str, Any], key: str, pattern_key: str, module: str) -> float:
    """A number of adapter_config.json for one module: that of the first pattern that the module's name ends with, else
    the one for all (peft's get_pattern_key; of its regular expressions only plain names, which are what it writes).
    """
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, Mapping):
        raise LlamaExportError(f"The adapter {path} has no object as {pattern_key} in {CONFIG}; take it again.")
    for pattern in patterns:
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise LlamaExportError(
                f"The adapter {path} has the regular expression {pattern[:80]!r} as a {pattern_key}; write out the "
                f"names of the modules in {CONFIG}."
            )
    named = (value for pattern, value in patterns.items() if f".{module}".endswith(f".{pattern.lstrip('^')}"))
    value = next(named, config.get(key))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise LlamaExportError(
            f"The adapter {path} says {key} is {value!r:.80} for {module}, but a number above 0 is expected; take the "
            "adapter again."
        )
    return value


def _check_targets(path: Path, config: Mapping[str, Any], parts: Mapping[str, LowRank]) -> None:
    """Every module that the config names should be there; names with patterns in them say nothing."""
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}.weight") for name in parts):
            raise LlamaExportError(
                f"The adapter {path} names the module {target} in {CONFIG}, but {WEIGHTS} has nothing for it; take "
                "both from the same training."
            )
