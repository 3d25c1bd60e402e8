"""Which input and output of a decoder's graph is what, by the names that exporters give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import LlamaExportError
from .graph import OnnxFile, Port

MOST_LAYERS = 1 << 12

_IDS, _MASK, _POSITIONS, _BRANCH = "input_ids", "attention_mask", "position_ids", "use_cache_branch"
_KEPT = ("logits_to_keep", "num_logits_to_keep")
_NAMES: Mapping[str, str] = {
    "input_ids": _IDS,
    "attention_mask": _MASK,
    "position_ids": _POSITIONS,
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}
"""What genai_config.json calls a role, and the name that optimum and onnxruntime-genai give it."""
_OTHERS: Mapping[str, str] = {
    "inputs_embeds": "takes embeddings in place of tokens; export the decoder whole (without exclude_embeds)",
    "block_table": "has a paged cache, which its own runtime alone fills; export without use_paged_attention",
    "encoder_hidden_states": "is the decoder of an encoder-decoder; only decoders that stand alone can be compared",
    "pixel_values": "reads images; only decoders of text can be compared",
}
"""What graphs are that have these inputs, and what to do."""
_NUMBERS = {"int64": "int64", "int32": "int32"}
_CACHES = ("float32", "float16")


@dataclass(frozen=True)
class Signature:
    """The roles of a graph's inputs and outputs. past, present: of every layer, its keys and its values. branch: tells
    a merged graph of optimum whether there is a cache; keep: of how many last tokens logits are wanted.
    """

    ids: Port
    mask: Port | None
    positions: Port | None
    past: tuple[tuple[Port, Port], ...]
    present: tuple[tuple[str, str], ...]
    logits: Port
    branch: Port | None = None
    keep: Port | None = None

    @property
    def cache_dtype(self) -> str:
        return self.past[0][0].dtype

    @property
    def last_only(self) -> bool:
        """Whether logits are given of the last token alone."""
        return self.keep is None and (len(self.logits.dims) == 2 or self.logits.dims[1] == 1)


def signature(graph: OnnxFile, decoder: Mapping[str, Any], where: str) -> Signature:
    """Find the roles. decoder: of genai_config.json, or empty. where: the file, for messages.

    Raises LlamaExportError, one sentence for whatever keeps this graph from being replayed as a decoder with a cache.
    """
    names = {**_NAMES, **_given(decoder, "inputs"), **_given(decoder, "outputs")}
    inputs, outputs = ({port.name: port for port in ports} for ports in (graph.inputs, graph.outputs))
    for name, what in _OTHERS.items():
        if name in inputs:
            raise LlamaExportError(f"{where} {what}.")
    layers = _layers(names["past_key_names"], inputs)
    if not layers:
        raise LlamaExportError(
            f"{where} has no cache among its inputs, so nothing can be decoded step by step with it; export it with "
            "one (optimum-cli export onnx --task text-generation-with-past)."
        )

    def parts(key: str, value: str, ports: Mapping[str, Port], what: str) -> tuple[tuple[Port, Port], ...]:
        wanted = [(_numbered(names[key], layer), _numbered(names[value], layer)) for layer in range(layers)]
        missing = [name for pair in wanted for name in pair if name not in ports]
        if missing:
            raise LlamaExportError(f"{where} has {layers} layers, but no {what} {missing[0]}; export it again.")
        return tuple((ports[one], ports[other]) for one, other in wanted)

    past = parts("past_key_names", "past_value_names", inputs, "input")
    present = parts("present_key_names", "present_value_names", outputs, "output")
    for name, ports in ((names["input_ids"], inputs), (names["logits"], outputs)):
        if name not in ports:
            raise LlamaExportError(f"{where} has no {name}, so it is no decoder of text that can be compared.")
    found = Signature(
        inputs[names["input_ids"]],
        inputs.get(names["attention_mask"]),
        inputs.get(names["position_ids"]),
        past,
        tuple((one.name, other.name) for one, other in present),
        outputs[names["logits"]],
        inputs.get(_BRANCH),
        next((inputs[name] for name in _KEPT if name in inputs), None),
    )
    _check(found, inputs, where)
    return found


def _given(decoder: Mapping[str, Any], side: str) -> dict[str, str]:
    """The names that genai_config.json gives."""
    names = decoder.get(side)
    known = names.items() if isinstance(names, dict) else ()
    return {role: name for role, name in known if role in _NAMES and isinstance(name, str)}


def _numbered(pattern: str, layer: int) -> str:
    return pattern.replace("%d", str(layer), 1)


def _layers(pattern: str, inputs: Mapping[str, Port]) -> int:
    before, _, after = pattern.partition("%d")
    name = re.compile(re.escape(before) + r"(\d{1,4})" + re.escape(after))
    return min(MOST_LAYERS, sum(name.fullmatch(one) is not None for one in inputs))


def _check(found: Signature, inputs: Mapping[str, Port], where: str) -> None:
    """Raise LlamaExportError unless every input is known and of a type and shape that can be given."""
    single = (found.ids, found.mask, found.positions, found.branch, found.keep)
    caches = [port for pair in found.past for port in pair]
    required = {port.name for port in inputs.values() if not port.optional}
    unknown = required - {port.name for port in (*single, *caches) if port is not None}
    if unknown:
        raise LlamaExportError(
            f"{where} has the input {min(unknown)}, but only {_IDS}, {_MASK}, {_POSITIONS}, {_KEPT[0]} and a cache "
            "(past_key_values.N.key and .value) can be given; export a plain decoder."
        )
    for port in (found.ids, found.mask, found.positions, found.keep):
        if port is not None and port.dtype not in _NUMBERS:
            raise LlamaExportError(f"{where} takes {port.name} as {port.dtype}, but int64 or int32 was expected.")
    for port in caches:
        if port.dtype not in _CACHES or port.dtype != found.cache_dtype or len(port.dims) != 4:
            raise LlamaExportError(
                f"{where} has the cache {port.name} of {port.dtype} with {len(port.dims)} dimensions, but only float32 "
                "or float16 of [rows, heads, tokens, size] can be given; export with a plain cache."
            )
        if port.dims[2] is not None:
            raise LlamaExportError(
                f"{where} has a cache of {port.dims[2]} tokens, no more and no less, which only its own runtime knows "
                "how to fill; export it with a cache that grows."
            )
    if found.logits.dtype not in _CACHES or len(found.logits.dims) not in (2, 3):
        raise LlamaExportError(
            f"{where} gives logits of {found.logits.dtype} with {len(found.logits.dims)} dimensions, but float32 or "
            "float16 of [rows, tokens, vocabulary] were expected; export it again."
        )
