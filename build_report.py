"""What a build made, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .export.loss import Loss
from .limits import Allocation
from .runtime.bundle import AdapterRecord, Manifest
from .runtime.quality import Quality
from .tables import size
from .targets.context import ContextChoice
from .targets.engine_process import Built


@dataclass(frozen=True)
class BuildReport:
    """What was made. losses: of tensors that came quantised and could not be kept as they are; stages: seconds by
    stage; engine: what building one took, None where none was built; quality: what quantisation cost, None where that
    was not measured; allocation: what `--precision auto` chose, None for any other.
    """

    output: Path
    manifest: Manifest
    context: ContextChoice
    notes: tuple[str, ...]
    losses: Sequence[Loss]
    stages: Mapping[str, float]
    engine: Built | None = None
    quality: Quality | None = None
    allocation: Allocation | None = None

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.manifest.files.values())

    def lines(self) -> list[str]:
        """The report for people."""
        manifest, seconds = self.manifest, sum(self.stages.values())
        return [
            f"{self.output}: {manifest.model.id}, {manifest.precision}, for {manifest.target}, "
            f"{size(self.bytes)} in {seconds:.1f} s",
            *(_adapter_line(adapter) for adapter in manifest.adapters),
            self.context.reason,
            *(_engine_lines(self.engine)),
            *(() if self.quality is None else (self.quality.told,)),
            *self._prediction_lines(),
            *self.notes,
            f"Licence: {manifest.model.licence_told.rstrip('.')}.",
            *manifest.model.duties,
        ]

    def _prediction_lines(self) -> list[str]:
        if self.allocation is None or self.quality is None:
            return []
        return [self.allocation.checked(self.quality.end.weights.kl.value)]

    def to_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "schema_version": 1,
            "output": str(self.output),
            "bytes": self.bytes,
            "seconds": {name: round(value, 3) for name, value in self.stages.items()},
            "context": asdict(self.context),
            "notes": list(self.notes),
            "engine": None if self.engine is None else asdict(self.engine),
            "quality": None if self.quality is None else json.loads(self.quality.to_json()),
            "allocation": None if self.allocation is None else self.allocation.to_json(),
            "losses": [{**asdict(loss), "relative": loss.relative} for loss in self.losses],
            "manifest": json.loads(self.manifest.to_json()),
        }


def _engine_lines(built: Built | None) -> list[str]:
    if built is None:
        return []
    memory = "" if built.peak_bytes is None else f", with {size(built.peak_bytes)} of memory beside the weights' file"
    return [f"Engine of TensorRT-RTX {built.version}: {size(built.size)}, built in {built.seconds:.1f} s{memory}."]


def _adapter_line(adapter: AdapterRecord) -> str:
    weight = "" if adapter.weight == 1 else f" times {adapter.weight:g}"
    where = "merged into the weights" if adapter.file is None else f"beside the weights: `run --adapter {adapter.name}`"
    return f"Adapter {adapter.name}{weight}, {where}."
