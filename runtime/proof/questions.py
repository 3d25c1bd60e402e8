"""What will be asked of a bundle, known before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import LlamaExportError, UsageError
from ..bundle import Bundle
from ..choice import Choice
from ..cpu_graph import rounds_activations
from ..session import import_onnxruntime
from .gates import COST, ENGINE, FULL, HIDDEN, LAYERS, SHIPPED, Limits, limits_of
from .hidden_states import hidden_values
from .judging import MAX_KL, Question
from .reference import Reference
from .reference_choice import Proof
from .replayers import most_rows
from .ways import DECODE, WAYS, why_not

ROUNDED = "rounded"
_BITS: Mapping[str, str] = {"fp32": "fp32", "fp16": "fp16", "int8": "8", "fp8": "8", "int4": "4", "nvfp4": "4"}
_FEWEST = "4"
_LONGEST_FORMAT = 4


@dataclass(frozen=True)
class Plan:
    """What is asked about one proof. missing: why the full-precision kernels cannot be asked. real: what really runs,
    against the full-precision run or else against `exact`. hidden: the layers whose states the graph shows. untold: why
    some of the questions are not asked, sentences for people.
    """

    proof: Proof
    weights: bool
    full: Question | None
    real: Question | None
    cost: Question | None
    layers: Limits | None
    hidden: tuple[int, ...]
    max_kl: float | None
    untold: tuple[str, ...]
    missing: str | None

    @property
    def asked(self) -> tuple[Question, ...]:
        return tuple(one for one in (self.full, self.real, self.cost) if one is not None)

    def id(self, line: str) -> str:
        return named(line, self.proof.adapter)


def named(line: str, adapter: str | None) -> str:
    """The id of a check."""
    return line if adapter is None else f"{line}:{adapter}"


def plan_of(bundle: Bundle, proof: Proof, choice: Choice, graph: bytes, max_kl: float | None) -> Plan:
    """graph: the bundle's model.onnx. Raises LlamaExportError when the graph is no protobuf message."""
    dtype, exact = bundle.manifest.shape.activations, proof.exact
    missing = _no_onnxruntime(bundle, choice)
    prompts = tuple(prompt.name for prompt in proof.prompts)
    ending = "" if proof.adapter is None else f", with the adapter {proof.adapter}"
    rows = most_rows(bundle.manifest.shape, bundle.manifest.limits.context)
    full = real = None
    untold = []
    if exact is not None and missing is None:
        ways, details = _ways(rows, len(prompts))
        title = f"Full-precision kernels against PyTorch on the same stored weights{ending}"
        full = Question(named(FULL, proof.adapter), title, ways, prompts, limits_of(FULL, dtype), details, tells=True)
    if exact is None and not proof.other_ids:
        untold.append("There is no exact reference, so stored weights and the graph are not compared with PyTorch's.")
    if not proof.other_ids and (exact is not None or missing is None):
        ways, details = _ways(real_rows(bundle, choice), len(prompts))
        real = _real(bundle, choice, graph, missing, proof.adapter, ending)
        details = (*details, *([missing] if missing else []))
        real = replace(real, ways=ways, prompts=prompts, details=details)
    shown = tuple(hidden_values(graph))
    layers = limits_of(LAYERS, dtype) if full is not None and exact is not None and exact.layers is not None else None
    return Plan(
        proof=proof,
        weights=exact is not None,
        full=full,
        real=real,
        cost=_cost(bundle, proof, prompts, ending),
        layers=layers,
        hidden=tuple(layer for layer in exact.index.layers if layer in shown) if layers and exact else (),
        max_kl=max_kl if proof.original is not None else None,
        untold=tuple(untold),
        missing=missing,
    )


def gates_of(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """Check, way, prompt and figure of every gate of a plan, in the order of the verdict."""
    if plan.weights:
        yield plan.id("weights"), "", "", "different"
    for question in plan.asked:
        yield from ((question.id, *gate) for gate in question.planned())
        if question is plan.full and plan.layers is not None:
            figures = [one for one in HIDDEN if one != "hidden" or _all_shown(plan)]
            yield from ((plan.id(LAYERS), "", "", figure) for figure in figures if figure in plan.layers.limits)
        if question is plan.cost and plan.max_kl is not None:
            yield question.id, "", "", MAX_KL


def _all_shown(plan: Plan) -> bool:
    return plan.proof.exact is not None and set(plan.hidden) == set(plan.proof.exact.index.layers)


def require_original(proofs: Sequence[Proof], max_kl: float | None) -> None:
    """Raise UsageError when a price is limited and none can be found out."""
    if max_kl is not None and not any(proof.original is not None for proof in proofs):
        raise UsageError(
            "--max-kl limits what quantisation cost, and there is no original reference to tell; make one with "
            "`llama-export reference` and pass it with --reference."
        )


def real_rows(bundle: Bundle, choice: Choice) -> int:
    """Texts at once of what really runs: an engine has a profile for them."""
    return bundle.manifest.limits.batch if choice.engine is not None else 1


def _ways(rows: int, texts: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those that can be gone, and why the others cannot."""
    reasons = {way: why_not(way, rows, texts) for way in WAYS}
    return tuple(way for way, why in reasons.items() if why is None), tuple(filter(None, reasons.values()))


def _no_onnxruntime(bundle: Bundle, choice: Choice) -> str | None:
    """Why the full-precision kernels cannot be asked on a device whose engine can; None where they can."""
    if choice.engine is None:
        return None
    try:
        import_onnxruntime(bundle.manifest)
    except LlamaExportError as error:
        return str(error)
    return None


def _real(
    bundle: Bundle, choice: Choice, graph: bytes, missing: str | None, adapter: str | None, ending: str
) -> Question:
    line = ENGINE if choice.engine is not None else SHIPPED
    setting = ROUNDED if rounds_activations(graph) else bundle.manifest.shape.cache_dtype
    if choice.engine is None:
        title = "Shipped kernels, cache in place, against the full-precision ones"
    else:
        other = "the full-precision kernels" if missing is None else "PyTorch on the same stored weights"
        title = f"Engine of {choice.engine.module} {choice.engine.version}, against {other}"
    return Question(named(line, adapter), f"{title}{ending}", (), (), limits_of(line, setting))


def _cost(bundle: Bundle, proof: Proof, prompts: tuple[str, ...], ending: str) -> Question | None:
    if proof.original is None:
        return None
    limits = limits_of(COST, bits_of(bundle, proof.exact))
    title = f"What really runs, against PyTorch on the original weights: what quantisation cost{ending}"
    return Question(named(COST, proof.adapter), title, (DECODE,), prompts, limits, tells=True)


def bits_of(bundle: Bundle, exact: Reference | None) -> str:
    """The setting of `cost`: "fp32", "fp16", or the bits of quantised weights."""
    if rounded := _BITS.get(bundle.manifest.precision):
        return rounded
    formats = {record.format for record in exact.index.weights} if exact is not None else set()
    dense = formats and all(len(name) <= _LONGEST_FORMAT and name.startswith(("fp", "bf")) for name in formats)
    eights = formats and not any(name.startswith(("int4", "nvfp4")) for name in formats)
    return "fp16" if dense else "8" if eights else _FEWEST
