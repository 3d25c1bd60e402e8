"""`quality.json`: what quantisation cost a bundle, measured where it was built."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..errors import LlamaExportError
from ..tables import clipped
from .bundle import QUALITY_FILE, Bundle
from .decode_json import decode

SCHEMA_VERSION = 1
_MOST_BYTES = 8 << 20
"""Of the file; a model of 400 layers takes one."""
_MOST_BITS = 256
"""A value: no block that is padded to its end takes more."""
_NAME = 60
"""Columns of a text's name."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


_Text = str | bytes
"""Beside `Quality.bytes`, which is no type."""


@dataclass(frozen=True)
class MeasuredText:
    """What was measured on. name: of the file, or "built-in"; sha256: of its UTF-8; windows: each read from an empty
    cache; tokens: in all of them.
    """

    name: str
    sha256: str
    windows: int
    tokens: int


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval by the bootstrap over windows; low and high are null where one window alone was
    measured.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Matrix:
    """A stored matrix. layer: null outside of layers; size: how many weights it has; bits: of each, with scales, zero
    points and padding. weight_error: the Frobenius norm of stored - original over that of the original. output_error:
    the same of what the matrix makes of its inputs in the original model, over some of the text's windows: of an
    embedding, the rows of these tokens. Where the original is 0, and the stored is not, an error is 1.
    """

    name: str
    layer: int | None
    format: str
    size: int
    bits: float
    weight_error: float
    output_error: float


@dataclass(frozen=True)
class EndFigures:
    """How far next-token distributions are from the original's. by: what computed; kl: KL(original || this), mean over
    the tokens, nats; kl_p99, kl_max: of its tokens; top1_agreement: the share of tokens where both have the same
    likeliest next one; perplexity: on the same tokens.
    """

    by: str
    kl: Interval
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity: float


@dataclass(frozen=True)
class End:
    """At the end of the model. original_perplexity: of the checkpoint in float32. weights: PyTorch in float32 with the
    stored weights, so that what differs is what quantisation cost. shipped: what runs, whose kernels round activations
    too; null where nothing could run it, and not_shipped says why.
    """

    original_perplexity: float
    weights: EndFigures
    shipped: EndFigures | None
    not_shipped: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What `--precision auto` expected: kl of `End.weights` in nats, bytes of weights."""

    kl: float
    bytes: int


@dataclass(frozen=True)
class Quality:
    """`quality.json`, schema version 1. Instances are always valid: construction raises LlamaExportError otherwise.

    method: how weights were quantised; "own codes" where the checkpoint's were kept. bytes: of stored weights, vectors
    too, by format. files: bytes of the files that hold the model, by name.
    """

    method: str
    text: MeasuredText
    bytes: Mapping[str, int]
    files: Mapping[str, int]
    end: End
    matrices: tuple[Matrix, ...]
    prediction: Prediction | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise LlamaExportError(f"{QUALITY_FILE}: {problem}; build the bundle again.")

    @property
    def bits(self) -> float:
        """Of a weight, over all matrices."""
        return sum(one.bits * one.size for one in self.matrices) / sum(one.size for one in self.matrices)

    @property
    def told(self) -> str:
        """What it cost, in a sentence for people: of what runs, where that was measured."""
        shipped, weights, original = self.end.shipped, self.end.weights, self.end.original_perplexity
        found = weights if shipped is None else shipped
        which = "of the weights alone" if shipped is None else f"as it runs, {weights.kl.value:.3g} of the weights"
        return (
            f"What quantisation cost, on {self.text.tokens:,} tokens of {clipped(self.text.name, _NAME)}: "
            f"KL {_with_interval(found.kl)} {which}; same likeliest token {100 * found.top1_agreement:.1f} %; "
            f"perplexity {original:.4g} -> {found.perplexity:.4g}."
        )

    @staticmethod
    def from_json(text: _Text) -> Quality:
        """Read it. Raises LlamaExportError when it is not JSON, of a newer schema, or in any way not valid."""
        try:
            value = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise LlamaExportError(f"{QUALITY_FILE} is not valid JSON ({error}); build the bundle again.") from error
        version = value.get("schema_version") if isinstance(value, dict) else None
        if type(version) is int and version > SCHEMA_VERSION:
            raise LlamaExportError(
                f"{QUALITY_FILE} has schema version {version}, but this llama-export reads up to {SCHEMA_VERSION}; "
                "upgrade it with `pip install --upgrade llama-export`."
            )
        return decode(Quality, value, QUALITY_FILE)

    def to_json(self) -> str:
        """Indented JSON text with the schema version first, a line for each matrix."""
        value: dict[str, Any] = {"schema_version": self.schema_version, **dataclasses.asdict(self)}
        rows = value.pop("matrices")
        text = json.dumps({**value, "matrices": []}, indent=2, ensure_ascii=False)
        lines = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in rows)
        return text.removesuffix("[]\n}") + (f"[\n{lines}\n  ]\n}}\n" if rows else "[]\n}\n")


def _with_interval(kl: Interval) -> str:
    spread = "" if kl.low is None or kl.high is None else f" ({kl.low:.3g} to {kl.high:.3g})"
    return f"{kl.value:.3g}{spread}"


def load_quality(bundle: Bundle) -> Quality | None:
    """The bundle's; None where it has none. Raises LlamaExportError when it cannot be read or is not valid."""
    if QUALITY_FILE not in bundle.manifest.files:
        return None
    path = bundle.file(QUALITY_FILE)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise LlamaExportError(f"{path} cannot be read: {error.strerror}; copy the bundle again.") from error
    if len(content) > _MOST_BYTES:
        raise LlamaExportError(f"{path} is larger than any model's needs to be; build the bundle again.")
    return Quality.from_json(content)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _problems(quality: Quality) -> Iterator[str]:
    """What is wrong with its values, beyond their types."""
    if quality.schema_version != SCHEMA_VERSION:
        yield f"schema_version must be {SCHEMA_VERSION}, not {quality.schema_version}"
    if not _SHA256.fullmatch(quality.text.sha256):
        yield "text.sha256 must be 64 hexadecimal digits"
    if not quality.matrices:
        yield "matrices must name one at least"
    if (quality.end.shipped is None) != (quality.end.not_shipped is not None):
        yield "end must have one of shipped and not_shipped"
    for name, value, low, high in chain(_counts(quality), _figures(quality.end), _errors(quality.matrices)):
        if not low <= value <= high:  # NaN is in no range
            yield f"{name} must be from {low:g} to {high:g}, not {value!r}"
    for name, one in _ends(quality.end):
        ends = [end for end in (one.kl.low, one.kl.high) if end is not None]
        if len(ends) == 1 or not all(0 <= end <= _LARGEST for end in ends) or ends != sorted(ends):
            yield f"{name}.kl has no interval in [{one.kl.low!r}, {one.kl.high!r}]"


_LARGEST = 1e300
"""Of a figure that may be of any size."""

_Bounded = tuple[str, float, float, float]


def _counts(quality: Quality) -> Iterator[_Bounded]:
    named = {
        "text.windows": quality.text.windows,
        "text.tokens": quality.text.tokens,
        **{f"bytes[{name!r}]": size for name, size in quality.bytes.items()},
        **{f"files[{name!r}]": size for name, size in quality.files.items()},
        **({} if quality.prediction is None else {"prediction.bytes": quality.prediction.bytes}),
    }
    yield from ((name, value, 0, 1 << 62) for name, value in named.items())
    if quality.prediction is not None:
        yield "prediction.kl", quality.prediction.kl, 0, _LARGEST


def _ends(end: End) -> Iterator[tuple[str, EndFigures]]:
    yield "end.weights", end.weights
    if end.shipped is not None:
        yield "end.shipped", end.shipped


def _figures(end: End) -> Iterator[_Bounded]:
    yield "end.original_perplexity", end.original_perplexity, 1, _LARGEST
    for name, one in _ends(end):
        yield from ((f"{name}.{part}", getattr(one, part), 0, _LARGEST) for part in ("kl_p99", "kl_max"))
        yield f"{name}.kl.value", one.kl.value, 0, _LARGEST
        yield f"{name}.top1_agreement", one.top1_agreement, 0, 1
        yield f"{name}.perplexity", one.perplexity, 1, _LARGEST


def _errors(matrices: Sequence[Matrix]) -> Iterator[_Bounded]:
    for one in matrices:
        yield f"{one.name}: layer", one.layer or 0, 0, 1 << 12
        yield f"{one.name}: size", one.size, 1, 1 << 62
        yield f"{one.name}: bits", one.bits, 1, _MOST_BITS
        yield f"{one.name}: weight_error", one.weight_error, 0, _LARGEST
        yield f"{one.name}: output_error", one.output_error, 0, _LARGEST
