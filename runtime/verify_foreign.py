"""Verifying what another tool exported, which has no manifest and no reference of its own.

Nothing tells which numbers its quantised weights stand for, so what is asked of those is what they cost; a graph whose
weights are the checkpoint's own is asked whether it is correct.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..progress import Progress
from .foreign import ForeignFolder, ForeignReplayer, check_reference, open_foreign
from .foreign.replayer import MOST_ROWS, takes_padding
from .gates import COST, FULL, LAYERS, Limits, limits_of
from .judging import MAX_KL, Judge, Question, Read, told, whole
from .layer_check import layer_figures, layer_gates
from .proofs import Proof
from .reference import EXACT, ORIGINAL, Reference
from .reference_file import load
from .text import Tokenizer
from .verdict import Check, Verdict
from .ways import GREEDY, WAYS, why_not

_CHUNK = 512
"""Tokens of a piece where no manifest says how prompts are cut."""


@dataclass(frozen=True)
class _Plan:
    """What is asked: one question, and what is inside where the reference has it."""

    folder: ForeignFolder
    reference: Reference
    question: Question
    layers: Limits | None
    notes: tuple[str, ...]


def planned_foreign(
    path: Path, references: Sequence[Path], max_kl: float | None
) -> Iterator[tuple[str, str, str, str]]:
    """Check, way, prompt and figure of every gate that `verify_foreign` asks about; raises as it does before it runs
    anything.
    """
    plan = _plan_of(path, references, max_kl)
    yield from ((plan.question.id, *gate) for gate in plan.question.planned())
    if plan.question.id == COST and max_kl is not None:
        yield COST, "", "", MAX_KL
    if plan.layers is not None:
        yield from ((LAYERS, "", "", figure) for figure in ("keys", "values"))


def verify_foreign(
    path: Path,
    references: Sequence[Path],
    *,
    threads: int | None,
    progress: Progress,
    max_kl: float | None = None,
) -> Verdict:
    """Compare a folder that optimum or onnxruntime-genai exported, or another ONNX file of that kind, with a reference.

    Raises UsageError when there is not just one reference, or it is none for this folder; LlamaExportError when the
    reference is damaged or of another model, and when ONNX Runtime cannot run the graph.
    """
    began = time.perf_counter()
    plan = _plan_of(path, references, max_kl)
    folder, reference, question = plan.folder, plan.reference, plan.question
    progress.stage(f"Loading {folder.graph.name}")
    replayer = ForeignReplayer(folder, threads=threads, exact=question.id == FULL)
    logits = [reference.of_prompt(number) for number in range(len(reference.index.prompts))]
    largest = float(np.abs(reference.logits.top_logits).max(initial=0))
    judge = Judge(question, reference.index.prompts, logits, largest)
    progress.stage("Replaying what PyTorch computed")
    proof = Proof(None, reference)
    for done, way in enumerate(question.ways):
        progress.share(done / len(question.ways))
        for piece in WAYS[way](replayer, proof.texts, min(_CHUNK, replayer.chunk)):
            judge.add(way, piece)
    check = Check(question.id, question.title, tuple(judge.cases(_reader(folder))), (*told(judge), *question.details))
    checks = [replace(check, seconds=time.perf_counter() - began)]
    if question.id == COST and max_kl is not None:
        checks = [judge.budgeted(checks[0], max_kl)]
    if plan.layers is not None:
        progress.stage("Looking inside of the graph")
        figures = layer_figures(replayer, reference)
        title = "Inside of the graph, layer by layer against PyTorch"
        told_of = ("Graphs of other tools do not tell which of their values are hidden states.",)
        checks.append(Check(LAYERS, title, whole(layer_gates(figures, plan.layers)), told_of, figures))
    return Verdict(
        bundle=str(folder.path),
        backend=replayer.name,
        positions=reference.index.positions,
        checks=tuple(checks),
        seconds=time.perf_counter() - began,
        longest=max(len(prompt.ids) for prompt in reference.index.prompts),
        notes=tuple(dict.fromkeys((f"{folder}.", *replayer.notes, *plan.notes))),
    )


def _plan_of(path: Path, references: Sequence[Path], max_kl: float | None) -> _Plan:
    folder = open_foreign(path)
    if len(references) != 1:
        raise UsageError(
            f"{folder.path} has no manifest, so it has no reference of its own; pass just one with --reference, which "
            "`llama-export reference -m MODEL -o FILE` makes."
        )
    reference = load(references[0])
    index = reference.index
    if folder.quantised and index.kind == EXACT:
        raise UsageError(
            f"{references[0]} is an exact reference, of weights as a bundle stores them, and nothing tells which "
            f"{folder.path} stores; take an {ORIGINAL} one, which `llama-export reference -m MODEL -o FILE` makes."
        )
    if max_kl is not None and not folder.quantised:
        raise UsageError(f"--max-kl limits what quantisation cost, and {folder.path} is not quantised; leave it out.")
    notes = check_reference(folder, index)
    rows, prompts = MOST_ROWS if takes_padding(folder) else 1, tuple(prompt.name for prompt in index.prompts)
    reasons = {way: why_not(way, rows, len(prompts)) for way in WAYS}
    ways = tuple(way for way, why in reasons.items() if why is None and not (folder.quantised and way == GREEDY))
    details = tuple(filter(None, reasons.values()))
    if folder.quantised:
        title, limits = (
            "Against PyTorch on the original weights: what quantisation cost",
            limits_of(COST, folder.weights),
        )
    else:
        title, limits = "Full-precision kernels against PyTorch on the same weights", limits_of(FULL, _dtype(folder))
    line = COST if folder.quantised else FULL
    question = Question(line, title, ways, prompts, limits, details, tells=True)
    inside = not folder.quantised and reference.layers is not None
    return _Plan(folder, reference, question, limits_of(LAYERS, _dtype(folder)) if inside else None, notes)


def _dtype(folder: ForeignFolder) -> str:
    """The setting of its limits: narrow weights round as narrow activations do."""
    return folder.cache_dtype if folder.weights == "fp32" else "float16"


def _reader(folder: ForeignFolder) -> Read:
    return "#{}".format if folder.tokenizer is None else Tokenizer.from_file(folder.tokenizer).told
