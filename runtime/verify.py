"""Replaying the reference inside a bundle: does this machine compute what PyTorch computed?

Three questions, each with its own gates. Are the stored weights bit for bit those that PyTorch used? Does the graph,
with kernels that compute in full precision, give PyTorch's logits? And do the kernels that ship (int8 activations
inside MatMulNBits) stay close to those full-precision ones? The last cannot see small faults, whose effect drowns in
its own noise, which is why the first two are asked apart.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..errors import LlamaExportError
from ..progress import Progress
from .backend import OnnxRuntimeBackend
from .batch import BatchReplay
from .bundle import Bundle
from .hashes import differing_files
from .onnx_file import with_accuracy_level
from .parity import Comparison, compare
from .reference import Logits, Reference, compress, load_reference
from .session import engine_name, import_onnxruntime, read_graph
from .threads import choose_threads
from .weights import WeightDifference, compare_matrices, compare_weights

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

_HALF_AS_LIKELY = float(np.log(2))


@dataclass(frozen=True)
class Gate:
    """One figure and what it may be: at most `limit`, or at least where `at_least`."""

    name: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return bool(self.measured >= self.limit if self.at_least else self.measured <= self.limit)

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        return (
            f"{mark} {self.name}: {self.measured:.3g} ({'at least' if self.at_least else 'at most'} {self.limit:.3g})"
        )


@dataclass(frozen=True)
class Check:
    """One question: a title, its gates, and what else is worth saying."""

    title: str
    gates: tuple[Gate, ...]
    details: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class Verdict:
    """longest: tokens of the longest text that was replayed; notes: the manifest's."""

    bundle: str
    backend: str
    positions: int
    checks: tuple[Check, ...]
    seconds: float
    longest: int
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def lines(self) -> list[str]:
        """The verdict for people."""
        lines = [f"{self.bundle} on {self.backend}, {self.positions} positions, {self.seconds:.1f} s"]
        for check in self.checks:
            lines += ["", check.title, *(f"  {gate}" for gate in check.gates), *(f"  {text}" for text in check.details)]
        failed = [f"{check.title}: {gate.name}" for check in self.checks for gate in check.gates if not gate.passed]
        told = [
            f"Texts of {self.longest} tokens were replayed; docs/parity.md tells what they cannot reach.",
            *self.notes,
        ]
        return [*lines, "", *told, "", f"FAILED: {'; '.join(failed)}" if failed else "passed"]

    def to_json(self) -> dict[str, object]:
        """The verdict for programs; infinite figures (NaN logits) are null."""
        checks = []
        for check in self.checks:
            gates = [
                {
                    **asdict(gate),
                    "measured": gate.measured if np.isfinite(gate.measured) else None,
                    "passed": gate.passed,
                }
                for gate in check.gates
            ]
            checks.append({"title": check.title, "gates": gates, "details": list(check.details)})
        return {
            "schema_version": 1,
            "bundle": self.bundle,
            "backend": self.backend,
            "positions": self.positions,
            "seconds": round(self.seconds, 3),
            "passed": self.passed,
            "checks": checks,
            "longest": self.longest,
            "notes": list(self.notes),
        }


def verify(bundle: Bundle, *, check_hashes: bool, threads: int | None, progress: Progress) -> Verdict:
    """Replay the bundle's reference here and compare.

    Raises UsageError when `threads` is out of range, and LlamaExportError when the bundle cannot be compared at all:
    it needs another ONNX Runtime, or has no reference. Where files differ from the manifest, that is the verdict.
    """
    began, threads = time.perf_counter(), choose_threads(threads)
    backend = engine_name(import_onnxruntime(bundle.manifest), bundle.manifest)
    checks, positions, longest = [], 0, 0
    if check_hashes:
        progress.stage("Checking the files' hashes")
        checks.append(_files(bundle))
    try:
        reference = load_reference(bundle.path)
        positions = len(reference.logits.logsumexp)
        longest = max(len(prompt.ids) for prompt in reference.index.prompts)
        for check in _replays(bundle, reference, progress, threads):
            checks.append(check)  # noqa: PERF402 (an error leaves those before it)
    except LlamaExportError as error:
        if all(check.passed for check in checks):
            raise
        checks.append(Check("Not compared any further", (), (str(error),)))
    seconds = time.perf_counter() - began
    notes = bundle.manifest.notes
    return Verdict(str(bundle.path), backend, positions, tuple(checks), seconds, longest, notes)


def _replays(bundle: Bundle, reference: Reference, progress: Progress, threads: int) -> Iterator[Check]:
    """The checks against the reference, each as soon as it is made."""
    progress.stage("Comparing the stored weights")
    yield _weights(bundle, reference, progress, threads)
    limits = LIMITS[bundle.manifest.shape.cache_dtype]
    exact = with_accuracy_level(read_graph(bundle), 0)
    progress.stage("Replaying with full-precision kernels")
    compared, kept = _replay_exact(bundle, exact, reference, threads)
    yield _full_precision(compared, reference, limits)
    progress.stage("Replaying with the kernels that ship")
    backend = OnnxRuntimeBackend(bundle, threads=threads)
    yield _shipped(_replay_shipped(backend, reference, kept), limits)
    for adapter in bundle.manifest.choices:
        progress.stage(f"Replaying with the adapter {adapter.name}")
        yield from _adapter(bundle, adapter.name, backend, exact, threads)


def _adapter(bundle: Bundle, name: str, backend: OnnxRuntimeBackend, exact: bytes, threads: int) -> Iterator[Check]:
    """The same questions of an adapter that lies beside the weights."""
    limits, reference = LIMITS[bundle.manifest.shape.cache_dtype], load_reference(bundle.path, name)
    backend.use_adapter(name)
    different = compare_matrices(backend.matrices, reference.index.weights)
    yield _stored(f"Stored matrices of the adapter {name}", len(reference.index.weights), different)
    compared, kept = _replay_exact(bundle, exact, reference, threads, name)
    yield _named(_full_precision(compared, reference, limits), name)
    yield _named(_shipped(_replay_shipped(backend, reference, kept), limits), name)


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


def _replay_shipped(backend: OnnxRuntimeBackend, reference: Reference, exact: list[Logits]) -> Comparison:
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


def _shipped(compared: Comparison, limits: GateLimits) -> Check:
    agreeing = float((compared.shortfall <= _HALF_AS_LIKELY).mean())
    same = float((compared.shortfall == 0).mean())
    return Check(
        "Shipped kernels, cache in place, against the full-precision ones",
        (
            Gate("mean KL divergence", float(compared.kl.mean()), limits.shipped_kl),
            Gate("share of positions that agree on a likely token", agreeing, limits.shipped_agreement, at_least=True),
        ),
        (f"same argmax at {same:.1%} of positions; largest difference {compared.difference.max(initial=0):.3g}",),
    )
