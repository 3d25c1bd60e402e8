"""Verifying what another tool exported, which has no manifest and no reference of its own.

A graph whose weights are the checkpoint's own is asked whether it is correct. Nothing tells which numbers quantised
weights stand for, so of those PyTorch can only tell what they cost. What can be wrong beside that price is asked apart:
in full precision all ways through the graph have to agree, and the kernels that ship are held to those.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from ...progress import Progress
from ..text import Tokenizer
from .foreign import ForeignFolder, ForeignReplayer, check_reference, open_foreign
from .foreign.replayer import MOST_ROWS, takes_padding
from .gates import COST, FULL, LAYERS, SHIPPED, Limits, limits_of
from .judging import MAX_KL, Judge, Kept, Question, Read, by_prompt, replay, told, ways_of, whole
from .layer_check import layer_figures, layer_gates
from .reference import EXACT, ORIGINAL, Logits, Reference
from .reference_choice import Proof
from .reference_file import load
from .verdict import Check, Verdict
from .ways import ONE_PIECE, WAYS, why_not

_CHUNK = 512
"""Tokens of a piece where no manifest says how prompts are cut."""


@dataclass(frozen=True)
class _Asked:
    """A question. exact: of kernels in full precision, not of those that ship. own: it is compared with what the graph
    itself gives in one piece, not with the reference.
    """

    question: Question
    exact: bool
    own: bool = False


@dataclass(frozen=True)
class _Plan:
    """What is asked, and what is inside where the reference has it."""

    folder: ForeignFolder
    reference: Reference
    asked: tuple[_Asked, ...]
    layers: Limits | None
    notes: tuple[str, ...]

    @property
    def proof(self) -> Proof:
        return Proof(None, self.reference)


def planned_foreign(
    path: Path, references: Sequence[Path], max_kl: float | None
) -> Iterator[tuple[str, str, str, str]]:
    """Check, way, prompt and figure of every gate that `verify_foreign` asks about; raises as it does before it runs
    anything.
    """
    plan = _plan_of(path, references, max_kl)
    for one in plan.asked:
        yield from ((one.question.id, *gate) for gate in one.question.planned())
        if one.question.id == COST and max_kl is not None:
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
    run = _Run(plan, threads, progress, max_kl)
    checks = [check for exact in (True, False) for check in run.checks(exact)]
    index = plan.reference.index
    return Verdict(
        bundle=str(plan.folder.path),
        backend=run.name,
        positions=index.positions,
        checks=tuple(checks),
        seconds=time.perf_counter() - began,
        longest=max(len(prompt.ids) for prompt in index.prompts),
        notes=tuple(dict.fromkeys((f"{plan.folder}.", *run.notes, *plan.notes))),
    )


@dataclass
class _Run:
    """One verification. kept: what is kept of the graph's own logits, in one piece and as precise as it can be."""

    plan: _Plan
    threads: int | None
    progress: Progress
    max_kl: float | None
    name: str = ""
    notes: tuple[str, ...] = ()
    kept: Sequence[Logits] | None = None

    def checks(self, exact: bool) -> Iterator[Check]:
        """What is asked of kernels in full precision, or of those that ship."""
        began, plan = time.perf_counter(), self.plan
        asked = [one for one in plan.asked if one.exact == exact]
        if not asked:
            return
        self.progress.stage(f"Loading {plan.folder.graph.name}")
        replayer = ForeignReplayer(plan.folder, threads=self.threads, exact=exact)
        self.name, self.notes = replayer.name, replayer.notes
        kernels = "full-precision kernels" if exact else "the kernels that ship"
        self.progress.stage(f"Replaying with {kernels}")
        texts, chunk = plan.proof.texts, min(_CHUNK, replayer.chunk)
        if self.kept is None and any(one.own for one in plan.asked):
            kept = Kept(texts)
            replay(replayer, texts, (ONE_PIECE,), chunk, self.progress, kept=kept)
            self.kept = kept.logits
        judges = [self._judge(one) for one in asked]
        replay(replayer, texts, ways_of(judges), chunk, self.progress, judges)
        seconds, read = time.perf_counter() - began, _reader(plan.folder)
        for judge in judges:
            question = judge.question
            details = (*told(judge), *question.details)
            check = Check(question.id, question.title, tuple(judge.cases(read)), details, seconds=seconds)
            if question.id == COST and self.max_kl is not None:
                check = judge.budgeted(check, self.max_kl)
            yield check
        if plan.layers is not None:
            yield self._inside(replayer, plan.layers)

    def _inside(self, replayer: ForeignReplayer, limits: Limits) -> Check:
        began = time.perf_counter()
        self.progress.stage("Looking inside of the graph")
        figures = layer_figures(replayer, self.plan.reference)
        title = "Inside of the graph, layer by layer against PyTorch"
        details = ("Graphs of other tools do not tell which of their values are hidden states.",)
        gates = whole(layer_gates(figures, limits))
        return Check(LAYERS, title, gates, details, figures, seconds=time.perf_counter() - began)

    def _judge(self, asked: _Asked) -> Judge:
        reference = self.plan.reference
        expected = self.kept if asked.own and self.kept is not None else by_prompt(reference)
        return Judge(asked.question, reference.index.prompts, expected)


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
    notes = check_reference(folder, index.identity, index.prompts, index.model_id)
    names = tuple(prompt.name for prompt in index.prompts)
    asked = tuple(_quantised(folder, names) if folder.quantised else _plain(folder, names))
    inside = not folder.quantised and reference.layers is not None
    return _Plan(folder, reference, asked, limits_of(LAYERS, _dtype(folder)) if inside else None, notes)


def _plain(folder: ForeignFolder, prompts: tuple[str, ...]) -> Iterator[_Asked]:
    title = "Full-precision kernels against PyTorch on the same weights"
    yield _Asked(_question(folder, prompts, FULL, title, limits_of(FULL, _dtype(folder))), exact=True)


def _quantised(folder: ForeignFolder, prompts: tuple[str, ...]) -> Iterator[_Asked]:
    if folder.full_precision:
        title = "Full-precision kernels by every way, against the same in one piece"
        question = _question(folder, prompts, FULL, title, limits_of(FULL, folder.cache_dtype), without=ONE_PIECE)
        yield _Asked(question, exact=True, own=True)
        title, setting = "Shipped kernels, against the full-precision ones", folder.cache_dtype
    else:  # they round by what stands in one call
        title, setting = "Shipped kernels by every way, against the same in one piece", "rounded"
    yield _Asked(_question(folder, prompts, SHIPPED, title, limits_of(SHIPPED, setting)), exact=False, own=True)
    title = "What really runs, against PyTorch on the original weights: what quantisation cost"
    yield _Asked(_question(folder, prompts, COST, title, limits_of(COST, folder.weights)), exact=False)


def _question(
    folder: ForeignFolder, prompts: tuple[str, ...], line: str, title: str, limits: Limits, *, without: str = ""
) -> Question:
    """A question in every way that can be gone and has figures, but one."""
    rows = MOST_ROWS if takes_padding(folder) else 1
    reasons = {way: why_not(way, rows, len(prompts)) for way in WAYS if way != without and limits.figures(way)}
    ways = tuple(way for way, why in reasons.items() if why is None)
    return Question(line, title, ways, prompts, limits, tuple(filter(None, reasons.values())), tells=True)


def _dtype(folder: ForeignFolder) -> str:
    """The setting of its limits: narrow weights round as narrow activations do."""
    return folder.cache_dtype if folder.weights == "fp32" else "float16"


def _reader(folder: ForeignFolder) -> Read:
    return "#{}".format if folder.tokenizer is None else Tokenizer.from_file(folder.tokenizer).told
