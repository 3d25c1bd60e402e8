"""What `--precision auto` is held to, and what it chose: a size, or what quantisation may cost."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from .build_options import BuildOptions
from .errors import LlamaExportError, UsageError
from .optimize.schemes import AUTO
from .tables import listed, size

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]?i?b)?", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


@dataclass(frozen=True)
class Limits:
    """One of the two. budget: bytes of the files that hold the model, model.onnx and model.onnx.data; max_kl: KL
    divergence of the stored weights' predictions from the original's, nats a token.
    """

    budget: int | None = None
    max_kl: float | None = None

    @property
    def told(self) -> str:
        """ "at most 900 MB"."""
        return f"at most {size(self.budget)}" if self.budget is not None else f"a KL divergence of {self.max_kl:g}"


class AboveLimitError(LlamaExportError):
    """What was built costs more than --max-kl. kl: as measured."""

    def __init__(self, limits: Limits, kl: float) -> None:
        super().__init__(
            f"The formats that were chosen for --max-kl {limits.max_kl:g} cost {kl:.3g} nats a token as measured on "
            f"other text, after all rounds; ask for --max-kl {kl * 1.05:.2g}, or for a size with --budget."
        )
        self.kl = kl


@dataclass(frozen=True)
class Part:
    """Matrices that are stored alike. names: of the checkpoint; format: its name, of each if they differ; bytes: of all
    together; kl: predicted of storing these alone so.
    """

    names: tuple[str, ...]
    format: str
    bytes: int
    kl: float


@dataclass(frozen=True)
class Allocation:
    """What was chosen. kl: predicted of all parts together; bytes: at most, of the files that hold the model; tokens:
    that the parts' sensitivity was measured on; round: how often formats were chosen, from 1.
    """

    limits: Limits
    parts: tuple[Part, ...]
    kl: float
    bytes: int
    tokens: int
    round: int = 1

    @property
    def note(self) -> str:
        """A sentence for the manifest."""
        counts = Counter[str]()
        for part in self.parts:
            counts[part.format] += len(part.names)
        chosen = [f"{count} in {format}" for format, count in counts.most_common()]
        return (
            f"Formats were chosen for {self.limits.told}: matrices {listed(chosen)}; predicted KL divergence "
            f"{self.kl:.3g} nats a token, {size(self.bytes)}."
        )

    def check_bytes(self, count: int) -> None:
        """Raises LlamaExportError where the files that hold the model are larger than the budget."""
        if self.limits.budget is not None and count > self.limits.budget:
            raise LlamaExportError(
                f"model.onnx and model.onnx.data take {count:,} bytes, above the {self.limits.budget:,} of --budget, "
                f"where {self.bytes:,} were planned at most; ask for {count - self.limits.budget:,} bytes less, and "
                "report this as a mistake of ours."
            )

    def check_kl(self, kl: float) -> None:
        """Raises AboveLimitError where what was measured is above --max-kl."""
        if self.limits.max_kl is not None and kl > self.limits.max_kl:
            raise AboveLimitError(self.limits, kl)

    def checked(self, kl: float) -> str:
        """The prediction beside what was measured, for people."""
        return f"Predicted KL divergence {self.kl:.3g}, measured {kl:.3g} nats a token."

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return asdict(self)


def limits_of(options: BuildOptions) -> Limits | None:
    """What `--precision auto` is to meet; None for any other precision. Raises UsageError where the options do not go
    together, or are no size or number.
    """
    given = [name for name, value in (("--budget", options.budget), ("--max-kl", options.max_kl)) if value is not None]
    if options.precision != AUTO:
        if given:
            raise UsageError(
                f"{given[0]} is what --precision {AUTO} chooses formats for: add --precision {AUTO}, or leave it out."
            )
        return None
    if len(given) != 1:
        problem = "takes one of --budget and --max-kl, not both" if given else "needs to know what for"
        raise UsageError(
            f"--precision {AUTO} {problem}: give a size, such as --budget 900MB, or what quantisation may cost in nats "
            "a token, such as --max-kl 0.02."
        )
    if options.head_precision == AUTO:
        raise UsageError(f"--head-precision {AUTO} is what --precision {AUTO} does anyway; leave it out.")
    if options.budget is not None:
        return Limits(budget=parsed_size(options.budget))
    assert options.max_kl is not None
    if not (math.isfinite(options.max_kl) and options.max_kl > 0):
        raise UsageError(f"--max-kl is a KL divergence in nats a token above 0, such as 0.02, not {options.max_kl:g}.")
    if not options.quality:
        raise UsageError("--max-kl is checked by measuring, which --no-quality leaves out; leave out one of them.")
    return Limits(max_kl=options.max_kl)


def parsed_size(text: str) -> int:
    """Bytes of "900MB", "1.2 GB", "850MiB" or a plain number. Raises UsageError for anything else, and for 0."""
    match = _SIZE.fullmatch(text.strip())
    count = int(float(match["number"]) * _UNITS[(match["unit"] or "b").lower()]) if match and len(text) < 40 else 0
    if not count:
        raise UsageError(f"--budget is a size above 0, such as 900MB, 1.2GB or 850MiB, not {text!r}.")
    return count


def told_size(count: int) -> str:
    """Bytes as `parsed_size` reads them: rounded up to three digits, so never less, "81.3MB"."""
    for unit in ("GB", "MB", "kB"):
        scale = _UNITS[unit.lower()]
        if count >= scale:
            digits = 2 - math.floor(math.log10(count / scale))
            return f"{math.ceil(round(count / scale * 10**digits, 6)) / 10**digits:g}{unit}"
    return f"{count}B"
