"""Is what another tool exported the model that PyTorch computes? There is no manifest, and no word on how weights were
quantised, so an original reference is all that it can be held to.

Weights that are not quantised have to give PyTorch's logits, by every way through the graph. Of quantised ones that
comparison is a price (`cost`); what can be wrong beside it are the ways, which have to agree among themselves in full
precision, and the kernels that ship, which are held to those in full precision.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UsageError
from ...progress import Progress
from ..gates import COST, FULL, SHIPPED, Limits, limits_of
from ..judging import Judge, Question, Read, whole
from ..parity import Comparison
from ..reference import ORIGINAL, Logits, Prompt, Reference, compress
from ..reference_file import load
from ..text import Tokenizer
from ..verdict import Check, Gate, Verdict
from ..ways import DECODE, ONE_PIECE, WAYS, Text, why_not
from .folder import ForeignFolder
from .identity import check_reference
from .replayer import ForeignReplayer

MAX_KL = "max_kl"
_CHUNK = 128
"""Tokens of a prompt at a time, by the way that takes it in chunks."""
_ROUNDED, _HALF = "rounded", "float16"


def verify_foreign(
    folder: ForeignFolder,
    files: Sequence[Path],
    *,
    threads: int | None,
    progress: Progress,
    max_kl: float | None = None,
) -> Verdict:
    """Replay a reference in what another tool exported. files: of references, one. max_kl: what the mean KL divergence
    from PyTorch may be.

    Raises UsageError when there is not one original reference, LlamaExportError when it is damaged or of another model,
    or ONNX Runtime cannot load or run the graph.
    """
    began = time.perf_counter()
    reference = _reference(folder, files)
    untold = check_reference(folder, reference.index)
    run = _Run(folder, reference, threads, progress)
    checks = tuple(run.checks(max_kl))
    longest = max(len(prompt.ids) for prompt in reference.index.prompts)
    notes = (f"{folder}.", *untold, *run.notes)
    seconds = time.perf_counter() - began
    return Verdict(str(folder.path), run.name, reference.index.positions, checks, seconds, longest, notes)


def _reference(folder: ForeignFolder, files: Sequence[Path]) -> Reference:
    how = f"make one with `llama-export reference -m MODEL -o FILE --bundle {folder.path}` and pass it with --reference"
    if len(files) != 1:
        told = "has no reference of its own" if not files else f"is compared with one reference, not {len(files)}"
        raise UsageError(f"{folder.path} was exported by another tool and {told}; {how}.")
    reference = load(files[0])
    index = reference.index
    if index.kind != ORIGINAL or index.adapter is not None:
        of = (
            f"of the adapter {index.adapter}" if index.adapter is not None else "of the weights as a bundle stores them"
        )
        raise UsageError(f"{files[0]} is {of}, but {folder.path} can only be held to the original model; {how}.")
    return reference


@dataclass
class _Run:
    """One verification."""

    folder: ForeignFolder
    reference: Reference
    threads: int | None
    progress: Progress
    name: str = ""
    notes: tuple[str, ...] = ()

    def checks(self, max_kl: float | None) -> Iterator[Check]:
        """Each question, as soon as it is answered."""
        expected = [self.reference.of_prompt(number) for number in range(len(self.prompts))]
        if not self.folder.quantised:
            title = "Every way through the graph, against PyTorch on the original weights"
            limits = limits_of(FULL, _setting(self.folder))
            yield self._answered(self._open(exact=True), FULL, title, limits, expected, max_kl=max_kl)
            return
        rounded = self.folder.rounds_activations
        replayer = self._open(exact=not rounded)
        title = "Every way through the graph, against one piece" + ("" if rounded else ", with full-precision kernels")
        limits = limits_of(SHIPPED, _ROUNDED) if rounded else limits_of(FULL, self.folder.cache_dtype)
        own = self._one_piece(replayer)
        yield self._answered(replayer, FULL, title, limits, own, without=ONE_PIECE)
        if not rounded:
            replayer = self._open(exact=False)
            title = "Shipped kernels, against the full-precision ones"
            yield self._answered(replayer, SHIPPED, title, limits_of(SHIPPED, self.folder.cache_dtype), own)
        title = "What really runs, against PyTorch on the original weights: what quantisation cost"
        limits = limits_of(COST, self.folder.weights)
        yield self._answered(replayer, COST, title, limits, expected, only=DECODE, max_kl=max_kl)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.reference.index.prompts

    @property
    def _texts(self) -> list[Text]:
        return [Text(prompt.ids, prompt.prompt_tokens) for prompt in self.prompts]

    def _open(self, *, exact: bool) -> ForeignReplayer:
        self.progress.stage("Loading the graph")
        replayer = ForeignReplayer(self.folder, threads=self.threads, exact=exact)
        self.name, self.notes = replayer.name, replayer.notes
        return replayer

    def _one_piece(self, replayer: ForeignReplayer) -> list[Logits]:
        """What is kept of the logits of each text, read in one piece."""
        self.progress.stage("Replaying in one piece")
        kept: dict[int, list[Logits]] = {}
        for piece in WAYS[ONE_PIECE](replayer, self._texts, _CHUNK):
            kept.setdefault(piece.text, []).append(compress(np.nan_to_num(piece.logits)))
        return [Logits.joined(kept[number]) for number in range(len(self.prompts))]

    def _answered(
        self,
        replayer: ForeignReplayer,
        line: str,
        title: str,
        limits: Limits,
        expected: Sequence[Logits],
        *,
        without: str = "",
        only: str = "",
        max_kl: float | None = None,
    ) -> Check:
        """One question. without, only: of the ways."""
        began, texts = time.perf_counter(), self._texts
        wanted = [way for way in WAYS if way != without and only in ("", way) and limits.figures(way)]
        reasons = {way: why_not(way, replayer.most_rows, len(texts)) for way in wanted}
        ways = tuple(way for way in wanted if reasons[way] is None)
        names = tuple(prompt.name for prompt in self.prompts)
        question = Question(line, title, ways, names, limits, tuple(filter(None, reasons.values())), tells=True)
        largest = max(float(np.abs(one.top_logits).max(initial=0)) for one in expected)
        judge = Judge(question, self.prompts, expected, largest)
        for way in ways:
            self.progress.stage(f"Replaying: {title[0].lower()}{title[1:]} ({way.replace('_', ' ')})")
            for piece in WAYS[way](replayer, texts, min(_CHUNK, replayer.chunk)):
                judge.add(way, piece)
        cases = tuple(judge.cases(self._read()))
        decoded = judge.compared(DECODE)
        if max_kl is not None and decoded is not None:
            measured = float(decoded.kl.mean())
            reason = "the limit that --max-kl set"
            cases += whole([Gate(MAX_KL, "mean KL divergence from PyTorch", measured, max_kl, reason=reason)])
        details = (*question.details, *_details(decoded, largest))
        return Check(line, title, cases, details, seconds=time.perf_counter() - began)

    def _read(self) -> Read:
        """How a token reads; its number where there is no tokenizer."""
        if self.folder.tokenizer is None:
            return str
        tokenizer = Tokenizer.from_file(self.folder.tokenizer)
        return lambda token: tokenizer.decode([token]) or str(token)


def _setting(folder: ForeignFolder) -> str:
    """The limits of weights that are not quantised: float16 ones round what the checkpoint may have more exactly."""
    return folder.cache_dtype if folder.weights == "fp32" else _HALF


def _details(compared: Comparison | None, largest: float) -> Iterator[str]:
    if compared is not None:
        same = float((compared.shortfall == 0).mean())
        yield f"same argmax at {same:.1%} of {len(compared)} positions; mean KL {compared.kl.mean():.2g}"
    yield f"largest logit {largest:.3g}"
