"""Replaying references on a bundle: does this machine compute what PyTorch computed, and what did quantisation cost?

Questions with gates of their own, see `gates`. Are the stored weights bit for bit those that PyTorch used? Does the
graph, with kernels that compute in full precision, give PyTorch's logits, and what PyTorch has inside? Does what will
really run (kernels with int8 activations inside, or an engine of TensorRT) stay close to those full-precision ones? It
cannot see small faults, whose effect drowns in its own noise, which is why the first two are asked apart. And how far
is what really runs from the original weights? Each is asked in all ways that texts take through a graph, see `ways`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LlamaExportError
from ...progress import Progress
from ..backend import OnnxRuntimeBackend
from ..bundle import Bundle, open_bundle
from ..choice import Choice, choose_backend, open_backend, open_rows
from ..hashes import differing_files
from ..recipe import read_recipe
from ..sequence import Backend
from ..session import engine_name, import_onnxruntime, read_graph
from ..text import Tokenizer
from ..threads import choose_threads
from .cache_scales import compare_cache
from .foreign import is_foreign
from .gates import FILES, LAYERS, WEIGHTS, check_budget
from .input_scales import InputDifference, compare_inputs
from .judging import Judge, Kept, Read, by_prompt, replay, told, ways_of, whole
from .layer_check import layer_figures, layer_gates
from .questions import Plan, gates_of, named, plan_of, real_rows, require_original
from .reference import Logits
from .reference_choice import Proof, proofs_of, unproven
from .reference_file import load_index
from .replayer import Replayer
from .replayers import BackendReplayer, ExecutorReplayer, GraphReplayer
from .verdict import Check, Gate, Verdict
from .verify_foreign import planned_foreign, verify_foreign
from .ways import BATCH, ONE_PIECE, Text
from .weights import WeightDifference, compare_matrices, compare_weights

if TYPE_CHECKING:
    from ..tensorrt import EngineFile

_TOLD = 5  # of the things that differ
_DIFFERENT, _RECIPE = "different", "recipe"


@dataclass(frozen=True)
class PlannedGate:
    """A gate that will be asked about. check, way, prompt, figure: as in `Check`, `Case` and `Gate`."""

    check: str
    way: str
    prompt: str
    figure: str


def planned(
    bundle: Bundle | Path,
    *,
    references: Sequence[Path] = (),
    any_model: bool = False,
    backend: str | None = None,
    engine_dir: Path | None = None,
    check_hashes: bool = True,
    max_kl: float | None = None,
    threads: int | None = None,
) -> tuple[PlannedGate, ...]:
    """The gates that `verify` with the same arguments asks about, in its order; nothing of the model is loaded.

    Raises as `verify` does where that ends before anything runs.
    """
    check_budget(max_kl)
    if not isinstance(bundle, Bundle) and is_foreign(bundle):
        return tuple(PlannedGate(*gate) for gate in planned_foreign(bundle, references, max_kl))
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    choose_threads(threads)
    choice = choose_backend(bundle, backend, engine_dir)
    proofs = proofs_of(bundle, references, any_model=any_model)
    require_original(proofs, max_kl)
    graph = read_graph(bundle)
    found = [(FILES, "", "", figure) for figure in _asked_of_files(bundle, check_hashes)]
    for proof in proofs:
        found += gates_of(plan_of(bundle, proof, choice, graph, max_kl))
    return tuple(PlannedGate(*gate) for gate in found)


def verify(
    bundle: Bundle | Path,
    *,
    check_hashes: bool,
    threads: int | None,
    progress: Progress,
    references: Sequence[Path] = (),
    any_model: bool = False,
    backend: str | None = None,
    engine_dir: Path | None = None,
    engine: EngineFile | None = None,
    max_kl: float | None = None,
) -> Verdict:
    """Replay references here and compare.

    bundle: also the path of one, or of a folder that another tool exported, which needs a reference. references: files
    in place of the bundle's own, and any_model: see `proofs_of`. backend, engine_dir: as of `choose_backend`; engine:
    this one instead. max_kl: the most that quantisation may cost, as the mean KL divergence in nats.

    Raises UsageError when the backend is none for this bundle, a file is no reference for it or `threads` is out of
    range, and LlamaExportError when the bundle cannot be compared at all: it needs another ONNX Runtime, or has no
    reference. Where files differ from the manifest, or a gate has failed before, that is the verdict.
    """
    check_budget(max_kl)
    if not isinstance(bundle, Bundle) and is_foreign(bundle):
        return verify_foreign(bundle, references, threads=threads, progress=progress, max_kl=max_kl)
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    began = time.perf_counter()
    if engine is not None:
        choice = Choice(bundle.manifest.backend, engine, asked=True)
    else:
        choice = choose_backend(bundle, backend, engine_dir)
    run = _Run(bundle, choose_threads(threads), choice, progress, max_kl)
    checks: list[Check] = []
    proofs: tuple[Proof, ...] = ()
    try:
        if asked := _asked_of_files(bundle, check_hashes):
            progress.stage("Checking the files")
            checks.append(_files(bundle, asked))
        proofs = proofs_of(bundle, references, any_model=any_model)
        require_original(proofs, max_kl)
        run.untold += unproven(bundle, proofs)
        for check in run.checks(proofs):
            checks.append(check)  # noqa: PERF402 (an error leaves those before it)
    except LlamaExportError as error:
        if all(check.passed for check in checks):
            raise
        checks.append(Check(run.asking, "Not compared any further", error=str(error)))
    used = None if bundle.manifest.engine is None else choice.engine is not None
    return Verdict(
        bundle=str(bundle.path),
        backend=run.name,
        positions=sum(proof.main.index.positions for proof in proofs if proof.adapter is None),
        checks=tuple(checks),
        seconds=time.perf_counter() - began,
        longest=max((len(prompt.ids) for proof in proofs for prompt in proof.prompts), default=0),
        notes=(*run.notes, *_given(references), *dict.fromkeys(run.untold)),
        engine=used,
    )


class _Run:
    """One verification: of which bundle, and with what it computes. asking: the id of the check that is being made."""

    def __init__(self, bundle: Bundle, threads: int, choice: Choice, progress: Progress, max_kl: float | None) -> None:
        self.bundle, self.threads, self.choice, self.progress, self.max_kl = bundle, threads, choice, progress, max_kl
        self.notes = (*bundle.manifest.notes, *((choice.note,) if choice.note else ()))
        self.untold: list[str] = []
        self.asking = FILES
        engine = choice.engine
        self.name = f"{engine.module} {engine.version}" if engine else _onnxruntime(bundle)
        self._read = _reader(bundle)

    def checks(self, proofs: Sequence[Proof]) -> Iterator[Check]:
        """The checks against all references, each as soon as it is made."""
        graph, backend = read_graph(self.bundle), None
        for proof in proofs:
            plan = plan_of(self.bundle, proof, self.choice, graph, self.max_kl)
            self.untold += plan.untold
            if plan.weights and proof.adapter is None:
                self._begin(WEIGHTS, "Comparing the stored weights")
                yield _weights(self.bundle, graph, plan, self.progress, self.threads)
            elif plan.weights:
                # An adapter's matrices are read into the graph's inputs, and compared there.
                backend = backend or self._open()
                yield _matrices(backend, plan)
            kept = None
            if plan.missing is None and plan.real is not None:
                kept = yield from self._full(plan, graph)
            backend = backend or self._open()
            yield from self._real(plan, backend, kept)

    def _begin(self, check: str, stage: str) -> None:
        self.asking = check
        self.progress.stage(stage)

    def _open(self) -> Backend:
        """What really runs. An engine that does not load is an error here, not a reason to take another backend."""
        backend = open_backend(self.bundle, replace(self.choice, asked=True), threads=self.threads).backend
        self.name = backend.name
        return backend

    def _full(self, plan: Plan, graph: bytes) -> Generator[Check, None, list[Logits]]:
        """The graph in full precision; returns what is kept of its logits."""
        proof, began = plan.proof, time.perf_counter()
        self._begin(plan.id("full"), f"Replaying with full-precision kernels{_with(proof)}")
        replayer = GraphReplayer(
            self.bundle, graph, self.threads, exact=True, adapter=proof.adapter, layers=plan.hidden
        )
        kept = Kept(proof.texts)
        if plan.full is None or proof.exact is None:
            self._replay(replayer, proof.texts, (ONE_PIECE,), kept=kept)
            return kept.logits
        judge = Judge(plan.full, proof.prompts, by_prompt(proof.exact))
        self._replay(replayer, proof.texts, plan.full.ways, [judge], kept)
        yield replace(self._asked(judge), seconds=time.perf_counter() - began)
        if plan.layers is not None:
            began = time.perf_counter()
            self._begin(plan.id(LAYERS), f"Looking inside of the graph{_with(proof)}")
            figures = layer_figures(replayer, proof.exact)
            title = f"Inside of the graph, layer by layer against PyTorch{_with(proof)}"
            details = () if plan.hidden else ("The graph does not tell which of its values are hidden states.",)
            gates = layer_gates(figures, plan.layers)
            yield Check(plan.id(LAYERS), title, whole(gates), details, figures, seconds=time.perf_counter() - began)
        return kept.logits

    def _real(self, plan: Plan, backend: Backend, kept: Sequence[Logits] | None) -> Iterator[Check]:
        """What really runs, against the full-precision run and what the original weights give.

        kept: of the full-precision run; None for the exact reference's.
        """
        proof, began = plan.proof, time.perf_counter()
        judges = []
        if plan.real is not None:
            judges.append(Judge(plan.real, proof.prompts, kept or by_prompt(proof.main)))
        if plan.cost is not None and proof.original is not None:
            judges.append(Judge(plan.cost, proof.prompts, by_prompt(proof.original)))
        if not judges:
            return
        what = "the engine" if self.choice.engine else "the kernels that ship"
        self._begin(judges[0].question.id, f"Replaying with {what}{_with(proof)}")
        backend.use_adapter(proof.adapter)
        ways = ways_of(judges)
        self._replay(BackendReplayer(backend), proof.texts, [way for way in ways if way != BATCH], judges)
        if BATCH in ways:
            rows = real_rows(self.bundle, self.choice)
            replayer = ExecutorReplayer(self.bundle, open_rows(self.bundle, self.choice, rows))
            self._replay(replayer, proof.texts, (BATCH,), judges)
        seconds = time.perf_counter() - began
        for judge in judges:
            check = self._asked(judge)
            if judge.question is plan.cost:
                yield check if plan.max_kl is None else judge.budgeted(check, plan.max_kl)
            else:
                yield replace(check, seconds=seconds)

    def _replay(
        self,
        replayer: Replayer,
        texts: Sequence[Text],
        ways: Sequence[str],
        judges: Sequence[Judge] = (),
        kept: Kept | None = None,
    ) -> None:
        replay(replayer, texts, ways, self.bundle.manifest.limits.prefill_chunk, self.progress, judges, kept)

    def _asked(self, judge: Judge) -> Check:
        question = judge.question
        return Check(question.id, question.title, tuple(judge.cases(self._read)), (*told(judge), *question.details))


def _onnxruntime(bundle: Bundle) -> str:
    """Its name; raises LlamaExportError as `import_onnxruntime` does."""
    return engine_name(import_onnxruntime(bundle.manifest), bundle.manifest)


def _given(references: Sequence[Path]) -> Iterator[str]:
    """Which references are not the bundle's own."""
    for path in references:
        index = load_index(path)
        yield (
            f"The {index.kind} reference is {path}, {len(index.prompts)} prompts of {index.model_id}; other questions "
            "are answered by the bundle's own."
        )


def _reader(bundle: Bundle) -> Read:
    """The texts of tokens, or their numbers where the tokenizer is damaged."""
    try:
        return Tokenizer.load(bundle.file("tokenizer.json"), bundle.manifest.tokens).told
    except LlamaExportError:
        return "#{}".format


def _with(proof: Proof) -> str:
    return "" if proof.adapter is None else f", with the adapter {proof.adapter}"


def _asked_of_files(bundle: Bundle, hashed: bool) -> tuple[str, ...]:
    """The figures: hashes, if they are asked for, and the recipe of engines, which nothing else on a CPU reads."""
    figures = {_DIFFERENT: hashed, _RECIPE: bundle.manifest.engine is not None}
    return tuple(figure for figure, asked in figures.items() if asked)


def _files(bundle: Bundle, asked: Sequence[str]) -> Check:
    gates, told = [], []
    if _DIFFERENT in asked:
        different = differing_files(bundle)
        told += list(different.values())[:_TOLD]
        gates.append(Gate(_DIFFERENT, "files that differ from the manifest", len(different), 0))
    if _RECIPE in asked:
        wrong = _recipe_problem(bundle)
        told += wrong
        gates.append(Gate(_RECIPE, "recipes that do not follow from the manifest", len(wrong), 0))
    return Check(FILES, "Files", whole(gates), tuple(told))


def _recipe_problem(bundle: Bundle) -> list[str]:
    """Why engines would not be built as the manifest says; nothing where they would."""
    try:
        read_recipe(bundle)
    except LlamaExportError as error:
        return [str(error)]
    return []


def _weights(bundle: Bundle, graph: bytes, plan: Plan, progress: Progress, threads: int) -> Check:
    def advance(done: int, total: int) -> None:
        progress.advance(4 * done, 4 * total)

    assert plan.proof.exact is not None
    began, index = time.perf_counter(), plan.proof.exact.index
    records = (*index.weights, *index.tables)
    different = compare_weights(bundle, records, advance, threads)
    check = _stored(
        plan, "Stored weights", len(records), (*different, *compare_inputs(graph, index), *compare_cache(graph, index))
    )
    if index.inputs:
        check = replace(check, title=f"{check.title}, and the scales of {len(index.inputs)} rounded inputs")
    return replace(check, seconds=time.perf_counter() - began)


def _matrices(backend: Backend, plan: Plan) -> Check:
    assert plan.proof.exact is not None and isinstance(backend, OnnxRuntimeBackend)
    adapter, records = plan.proof.adapter, plan.proof.exact.index.weights
    backend.use_adapter(adapter)
    title = f"Stored matrices of the adapter {adapter}"
    return _stored(plan, title, len(records), compare_matrices(backend.matrices, records))


def _stored(plan: Plan, title: str, tensors: int, different: Sequence[WeightDifference | InputDifference]) -> Check:
    return Check(
        named(WEIGHTS, plan.proof.adapter),
        f"{title}, {tensors} tensors dequantised here and compared bit for bit",
        whole([Gate("different", "tensors that differ from PyTorch's", len(different), 0)]),
        tuple(one.told for one in different[:_TOLD]),
    )
