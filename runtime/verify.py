"""Replaying the reference inside a bundle: does this machine compute what PyTorch computed?

Three questions, each with its own gates. Are the stored weights bit for bit those that PyTorch used? Does the graph,
with kernels that compute in full precision, give PyTorch's logits? And does what will really run (kernels with int8
activations inside, or an engine of TensorRT) stay close to those full-precision ones? The last cannot see small faults,
whose effect drowns in its own noise, which is why the first two are asked apart.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LlamaExportError
from ..progress import Progress
from .backend import OnnxRuntimeBackend
from .batch import BatchReplay
from .bundle import Bundle
from .choice import Choice, choose_backend, open_backend
from .cpu_graph import rounds_activations
from .hashes import differing_files
from .parity import Comparison, compare
from .reference import Logits, Reference, compress, load_reference
from .sequence import Backend
from .session import engine_name, import_onnxruntime, read_graph
from .threads import choose_threads
from .verdict import Check, Gate, Verdict
from .weights import WeightDifference, compare_matrices, compare_weights

if TYPE_CHECKING:
    from .tensorrt import EngineFile

_TOLD = 5  # of the things that differ


@dataclass(frozen=True)
class GateLimits:
    """difference: of any kept logit, in full precision, or `relative` times the largest logit where that is more, since
    float32 rounds larger logits by more. kl: the largest of any position, in nats. shipped_kl: the mean over positions
    of the shipped kernels against the full-precision ones. shipped_agreement: share of positions with the same argmax,
    where a token at least half as likely as the best counts as the same.
    """

    difference: float
    relative: float
    kl: float
    shipped_kl: float
    shipped_agreement: float


LIMITS: Mapping[str, GateLimits] = {
    "float32": GateLimits(difference=1e-3, relative=3e-5, kl=1e-5, shipped_kl=0.05, shipped_agreement=0.9),
    # float16 has 11 bits of mantissa, float32 24: what float32 rounds at 1e-5 of a logit, float16 does at a few 1e-3.
    "float16": GateLimits(difference=5e-2, relative=5e-3, kl=1e-2, shipped_kl=0.05, shipped_agreement=0.9),
}
"""By the dtype of activations and cache."""


@dataclass(frozen=True)
class RunLimits:
    """Of what really runs against the full-precision kernels, as of `GateLimits`."""

    kl: float
    agreement: float


ENGINE_LIMITS = RunLimits(kl=0.01, agreement=0.95)
"""Of an engine: it computes in float16 what the full-precision kernels do, and rounds no activations to 8 bits."""
ROUNDED_LIMITS = RunLimits(kl=0.25, agreement=0.8)
"""Where the graph itself rounds activations to 8 bits by fixed scales, which has a price (SmolLM2: 0.023 and 0.996 in
int8, several times that on other texts; 0.9 where no projection is left out): beyond it something is broken.
"""

_HALF_AS_LIKELY = float(np.log(2))


def verify(
    bundle: Bundle,
    *,
    check_hashes: bool,
    threads: int | None,
    progress: Progress,
    backend: str | None = None,
    engine_dir: Path | None = None,
    engine: EngineFile | None = None,
) -> Verdict:
    """Replay the bundle's reference here and compare.

    backend, engine_dir: as of `choose_backend`; engine: this one instead. Raises UsageError when the backend is none
    for this bundle or `threads` is out of range, and LlamaExportError when the bundle cannot be compared at all: it
    needs another ONNX Runtime, or has no reference. Where files differ from the manifest, that is the verdict.
    """
    began = time.perf_counter()
    if engine is not None:
        choice = Choice(bundle.manifest.backend, engine, asked=True)
    else:
        choice = choose_backend(bundle, backend, engine_dir)
    run = _Run(bundle, choose_threads(threads), choice, progress)
    checks, positions, longest = [], 0, 0
    if check_hashes:
        progress.stage("Checking the files' hashes")
        checks.append(_files(bundle))
    try:
        reference = load_reference(bundle.path)
        positions = len(reference.logits.logsumexp)
        longest = max(len(prompt.ids) for prompt in reference.index.prompts)
        for check in run.replays(reference):
            checks.append(check)  # noqa: PERF402 (an error leaves those before it)
    except LlamaExportError as error:
        if all(check.passed for check in checks):
            raise
        checks.append(Check("Not compared any further", (), (str(error),)))
    seconds = time.perf_counter() - began
    used = None if bundle.manifest.engine is None else choice.engine is not None
    return Verdict(str(bundle.path), run.name, positions, tuple(checks), seconds, longest, run.notes, used)


class _Run:
    """One verification: of which bundle, and with what it computes."""

    def __init__(self, bundle: Bundle, threads: int, choice: Choice, progress: Progress) -> None:
        self.bundle, self.threads, self.choice, self.progress = bundle, threads, choice, progress
        self.limits = LIMITS[bundle.manifest.shape.cache_dtype]
        self.notes = (*bundle.manifest.notes, *((choice.note,) if choice.note else ()))
        engine = choice.engine
        self.name = f"{engine.module} {engine.version}" if engine else _onnxruntime(bundle)

    def replays(self, reference: Reference) -> Iterator[Check]:
        """The checks against the reference, each as soon as it is made."""
        self.progress.stage("Comparing the stored weights")
        yield _weights(self.bundle, reference, self.progress, self.threads)
        graph, exact = read_graph(self.bundle), _by_prompt(reference)
        missing = self._no_onnxruntime()
        if missing is None:
            self.progress.stage("Replaying with full-precision kernels")
            compared, exact = _replay_exact(self.bundle, graph, reference, self.threads)
            yield _full_precision(compared, reference, self.limits)
        self.progress.stage(
            "Replaying with the engine" if self.choice.engine else "Replaying with the kernels that ship"
        )
        # An engine that does not load is an error here, not a reason to take another backend.
        backend = open_backend(self.bundle, replace(self.choice, asked=True), threads=self.threads).backend
        self.name = backend.name
        yield self._real(graph, _replay_real(backend, reference, exact), missing)
        if isinstance(backend, OnnxRuntimeBackend):
            for adapter in self.bundle.manifest.choices:
                self.progress.stage(f"Replaying with the adapter {adapter.name}")
                yield from self._adapter(adapter.name, backend, graph)

    def _no_onnxruntime(self) -> str | None:
        """Why the full-precision kernels cannot be asked on a device whose engine can; None where they can."""
        if self.choice.engine is None:
            return None
        try:
            _onnxruntime(self.bundle)
        except LlamaExportError as error:
            return str(error)
        return None

    def _real(self, graph: bytes, compared: Comparison, missing: str | None = None) -> Check:
        """missing: why PyTorch's logits take the place of the full-precision kernels', None where they do not."""
        limits = RunLimits(self.limits.shipped_kl, self.limits.shipped_agreement)
        if rounds_activations(graph):
            limits = ROUNDED_LIMITS
        elif self.choice.engine is not None:
            limits = ENGINE_LIMITS
        what = "Shipped kernels, cache in place" if self.choice.engine is None else f"Engine on {self.name}"
        other = "the full-precision ones" if self.choice.engine is None else "the full-precision kernels"
        if missing is not None:
            other = "PyTorch on the same stored weights"
        return _compared_run(f"{what}, against {other}", compared, limits, () if missing is None else (missing,))

    def _adapter(self, name: str, backend: OnnxRuntimeBackend, graph: bytes) -> Iterator[Check]:
        """The same questions of an adapter that lies beside the weights."""
        reference = load_reference(self.bundle.path, name)
        backend.use_adapter(name)
        different = compare_matrices(backend.matrices, reference.index.weights)
        yield _stored(f"Stored matrices of the adapter {name}", len(reference.index.weights), different)
        compared, exact = _replay_exact(self.bundle, graph, reference, self.threads, name)
        yield _named(_full_precision(compared, reference, self.limits), name)
        yield _named(self._real(graph, _replay_real(backend, reference, exact)), name)


def _onnxruntime(bundle: Bundle) -> str:
    """Its name; raises LlamaExportError as `import_onnxruntime` does."""
    return engine_name(import_onnxruntime(bundle.manifest), bundle.manifest)


def _by_prompt(reference: Reference) -> list[Logits]:
    length = len(reference.index.prompts[0].ids)
    return [reference.logits.rows(i * length, (i + 1) * length) for i in range(len(reference.index.prompts))]


def _named(check: Check, adapter: str) -> Check:
    return replace(check, title=f"{check.title}, with the adapter {adapter}")


def _files(bundle: Bundle) -> Check:
    different = differing_files(bundle)
    told = tuple(different.values())[:_TOLD]
    return Check("Files", (Gate("files that differ from the manifest", len(different), 0),), told)


def _weights(bundle: Bundle, reference: Reference, progress: Progress, threads: int) -> Check:
    def advance(done: int, total: int) -> None:
        progress.advance(4 * done, 4 * total)

    records = (*reference.index.weights, *reference.index.tables)
    return _stored("Stored weights", len(records), compare_weights(bundle, records, advance, threads))


def _stored(title: str, tensors: int, different: list[WeightDifference]) -> Check:
    told = [
        f"{one.name}: the root of the sum of squares is {one.norm:.6g}, PyTorch's is {one.expected_norm:.6g}"
        for one in different[:_TOLD]
    ]
    return Check(
        f"{title}, {tensors} tensors dequantised here and compared bit for bit",
        (Gate("tensors that differ from PyTorch's", len(different), 0),),
        tuple(told),
    )


def _replay_exact(
    bundle: Bundle, model: bytes, reference: Reference, threads: int, adapter: str | None = None
) -> tuple[Comparison, list[Logits]]:
    """All prompts as one batch: prefill, then the continuation token by token.

    Returns the comparison with the reference, and for each prompt what is kept of this run's logits.
    """
    prompts = reference.index.prompts
    ids = np.array([prompt.ids for prompt in prompts], np.int64)
    replay = BatchReplay(bundle, len(prompts), model=model, threads=threads, adapter=adapter)
    compared: list[Comparison] = []
    kept: list[list[Logits]] = [[] for _ in prompts]
    for start, stop in _pieces(0, prompts[0].prompt_tokens, ids.shape[1]):
        for row, logits in enumerate(replay.extend(ids[:, start:stop])):
            first = row * ids.shape[1]
            compared.append(compare(reference.logits.rows(first + start, first + stop), logits))
            kept[row].append(compress(np.nan_to_num(logits)))
    return Comparison.joined(compared), [Logits.joined(parts) for parts in kept]


def _replay_real(backend: Backend, reference: Reference, exact: list[Logits]) -> Comparison:
    """Prompt by prompt with the cache in place, as `run` does: prefill in two pieces, then token by token; compared
    with what the full-precision kernels gave.
    """
    compared = []
    for prompt, expected in zip(reference.index.prompts, exact, strict=True):
        backend.rewind(0)
        for start, stop in _pieces(0, prompt.prompt_tokens // 2, prompt.prompt_tokens, len(prompt.ids)):
            logits = backend.extend(prompt.ids[start:stop], keep=stop - start)
            compared.append(compare(expected.rows(start, stop), logits))
    return Comparison.joined(compared)


def _pieces(*bounds: int) -> list[tuple[int, int]]:
    """The ranges between bounds, and after the last but one of them each position by itself."""
    cuts = [*bounds[:-1], *range(bounds[-2] + 1, bounds[-1] + 1)]
    return [(start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]


def _full_precision(compared: Comparison, reference: Reference, limits: GateLimits) -> Check:
    largest = float(np.abs(reference.logits.top_logits).max(initial=0))
    allowed = max(limits.difference, limits.relative * largest)
    # Two logits that may each be off by `allowed` can change places when they are closer than twice that.
    wrong = int((compared.shortfall > 2 * allowed).sum())
    same = int((compared.shortfall == 0).sum())
    proven = sum(prompt.proven for prompt in reference.index.prompts)
    continued = sum(len(prompt.ids) - prompt.prompt_tokens for prompt in reference.index.prompts)
    positions = len(compared.kl)
    return Check(
        "Full-precision kernels against PyTorch on the same stored weights",
        (
            Gate("largest difference of a logit", float(compared.difference.max(initial=0)), allowed),
            Gate("largest KL divergence", float(compared.kl.max(initial=0)), limits.kl),
            Gate("positions with another argmax, near ties aside", wrong, 0),
        ),
        (
            f"same argmax at {same} of {positions} positions, near ties counted as different",
            f"largest logit {largest:.3g}",
            f"greedy text: {proven} of {continued} tokens are PyTorch's own choice",
        ),
    )


def _compared_run(title: str, compared: Comparison, limits: RunLimits, details: tuple[str, ...]) -> Check:
    agreeing = float((compared.shortfall <= _HALF_AS_LIKELY).mean())
    same = float((compared.shortfall == 0).mean())
    told = f"same argmax at {same:.1%} of positions; largest difference {compared.difference.max(initial=0):.3g}"
    return Check(
        title,
        (
            Gate("mean KL divergence", float(compared.kl.mean()), limits.kl),
            Gate("share of positions that agree on a likely token", agreeing, limits.agreement, at_least=True),
        ),
        (told, *details),
    )
