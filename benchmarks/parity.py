"""Proves a model in every dialect and precision on this machine, and prints the figures of docs/parity.md.

    python benchmarks/parity.py MODEL... [--precisions fp32,fp16,int8,int4] [--dialects ort,canonical,trt,trt-primitive]
        [--calibrate FILE] [--context 1024] [--json FILE]

MODEL is a checkpoint's folder or a GGUF file. For each a bundle is built in a temporary folder and verified in ONNX
Runtime, the dialects for TensorRT too: no engine is made or run. `canonical` is the traced graph before any dialect, in
float32 alone; int8 for TensorRT on a Jetson rounds activations too and is left out without --calibrate. Each cell is
the largest difference of a logit from PyTorch on the same stored weights, with full-precision kernels, and the largest
KL divergence of any position; for greedy text, the tokens that part from PyTorch's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_export.build_options import BuildOptions
from llama_export.errors import LlamaExportError
from llama_export.export.source import open_source
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.referencing import ReferenceOptions, make_reference
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.proof.gates import FULL
from llama_export.runtime.proof.reference_file import load
from llama_export.runtime.proof.verdict import Case, Gate
from llama_export.runtime.proof.verify import verify
from llama_export.runtime.proof.ways import GREEDY, WAYS

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import report
    from .canonical_graph import canonical_cases
else:
    import report
    from canonical_graph import canonical_cases

CANONICAL = "canonical"
_TOLD = ("difference", "kl")
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "ort": {"target": "cpu"},
    "trt": {"target": "jetson-orin", "jetpack": "7.2"},
    "trt-primitive": {"target": "jetson-orin", "jetpack": "6.2"},
}
"""How a bundle of each dialect is asked for where no engine is built."""
PRECISIONS = ("fp32", "fp16", "int8", "int4")
_SINGLE = {CANONICAL: ("fp32",), "trt": PRECISIONS[1:], "trt-primitive": PRECISIONS[1:]}
"""The precisions of a dialect that has not all of them."""


_CALIBRATED = (("trt", "int8"), ("trt-primitive", "int8"))


@dataclass(frozen=True)
class Asked:
    """What is measured of each model."""

    dialects: Sequence[str]
    precisions: Sequence[str]
    context: int
    calibrate: Path | None

    def combinations(self) -> Iterator[tuple[str, str]]:
        """Dialects and precisions that there are."""
        for dialect in self.dialects:
            for precision in _SINGLE.get(dialect, PRECISIONS):
                uncalibrated = (dialect, precision) in _CALIBRATED and self.calibrate is None
                if (precision in self.precisions or dialect == CANONICAL) and not uncalibrated:
                    yield dialect, precision


@dataclass(frozen=True)
class Cell:
    """One way: the worst of each figure over all prompts, and whether all its gates passed."""

    figures: Mapping[str, float]
    passed: bool

    def __str__(self) -> str:
        told = [f"{value:.1e}" for id, value in self.figures.items() if id in _TOLD]
        parted = [f"{value:.0f}" for id, value in self.figures.items() if id == GREEDY]
        return f"{' / '.join(told or parted)}{'' if self.passed else ' FAILED'}"


@dataclass(frozen=True)
class Row:
    """A model in a dialect and precision. activations: their dtype. cells: by way. other: what each further question
    measured, in words. problem: why there is no figure.
    """

    model: str
    dialect: str
    precision: str
    activations: str
    cells: Mapping[str, Cell]
    other: Mapping[str, str]
    seconds: float
    problem: str | None = None


def cells_of(cases: Sequence[Case]) -> dict[str, Cell]:
    """The worst of all prompts, by way; none where a way was not gone."""
    cells = {}
    for way in WAYS:
        gates = [gate for case in cases if case.way == way for gate in case.gates]
        if gates:
            figures = {gate.figure: gate.measured for gate in _worst(gates)}
            cells[way] = Cell(figures, all(gate.passed for gate in gates))
    return cells


def in_dialect(model: Path, dialect: str, precision: str, asked: Asked, folder: Path) -> Row:
    """Build a bundle in `folder` and verify it."""
    began = time.perf_counter()
    calibrate = asked.calibrate if (dialect, precision) in _CALIBRATED else None
    options = BuildOptions(
        model=str(model),
        output=folder,
        precision=precision,
        context=asked.context,
        calibrate=calibrate,
        force=True,
        **TARGETS[dialect],
    )
    try:
        manifest = build(options, Silent()).manifest
        verdict = verify(
            open_bundle(folder), check_hashes=False, threads=None, progress=Silent(), backend="onnxruntime"
        )
    except LlamaExportError as error:
        return Row(model.name, dialect, precision, "", {}, {}, time.perf_counter() - began, str(error))
    checks = {check.id: check for check in verdict.checks}
    other = {
        id: "; ".join(
            f"{gate.figure} {gate.measured:.2g}"
            for gate in _worst([gate for case in check.cases for gate in case.gates])
        )
        for id, check in checks.items()
        if id != FULL
    }
    seconds, activations = time.perf_counter() - began, manifest.shape.activations
    return Row(model.name, dialect, precision, activations, cells_of(checks[FULL].cases), other, seconds)


def before_dialects(model: Path, context: int, folder: Path) -> Row:
    """The canonical graph, in `folder`, on the texts of a reference that is made for it."""
    began = time.perf_counter()
    file = folder.with_suffix(".npz")
    make_reference(ReferenceOptions(model=str(model), output=file, context=context), Silent())
    cells = cells_of(canonical_cases(model, load(file), context, folder))
    return Row(model.name, CANONICAL, "fp32", "float32", cells, {}, time.perf_counter() - began)


def _worst(gates: Sequence[Gate]) -> Iterator[Gate]:
    """Of each figure the gate that is nearest to its limit, or furthest beyond."""
    for figure in dict.fromkeys(gate.figure for gate in gates):
        same = [gate for gate in gates if gate.figure == figure]
        yield (min if same[0].at_least else max)(same, key=lambda gate: gate.measured)


def rows_of(model: Path, asked: Asked) -> Iterator[Row]:
    """Every combination that was asked for, each as soon as it is measured; no longer texts than the model knows."""
    asked = replace(asked, context=min(asked.context, open_source(str(model)).shape.max_positions))
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        for dialect, precision in asked.combinations():
            if dialect == CANONICAL:
                yield before_dialects(model, asked.context, Path(scratch) / CANONICAL)
            else:
                yield in_dialect(model, dialect, precision, asked, Path(scratch) / "bundle")


def lines(rows: Sequence[Row]) -> str:
    """The table for people."""
    header = ("model", "dialect", "precision", "activations", *WAYS)
    body = [
        (
            row.model,
            row.dialect,
            row.precision,
            row.activations,
            *(str(row.cells.get(way, row.problem or "-")) for way in WAYS),
        )
        for row in rows
    ]
    return report.table(header, body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--dialects", default=",".join(("ort", CANONICAL, "trt", "trt-primitive")))
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    asked = Asked(options.dialects.split(","), options.precisions.split(","), options.context, options.calibrate)
    rows = []
    for model in options.models:
        for row in rows_of(model, asked):
            rows.append(row)
            print(f"{row.model} {row.dialect} {row.precision}: {row.seconds:.0f} s", file=sys.stderr)
    markdown = lines(rows)
    report.write({"machine": report.machine(), "rows": [asdict(row) for row in rows]}, markdown, options.json, None)


if __name__ == "__main__":
    main()
