"""Verdicts for the tests of reports, without anything that computes."""

from __future__ import annotations

from llama_export.runtime.proof.verdict import Case, Check, Choice, Gate, LayerFigure, Moment, Verdict

WAYS = ("one_piece", "chunks", "decode", "batch", "rewind")
PROMPTS = ("short", "long", "非拉丁文字", "code")


def gates(*, difference: float = 1.94e-4) -> tuple[Gate, ...]:
    """Those of full-precision kernels in float32."""
    return (
        Gate("difference", "largest difference of a logit", difference, 1.37e-3, reason="another order of sums"),
        Gate("relative", "largest difference, relative to the position's largest logit", 4.21e-6, 3e-4),
        Gate("cosine", "smallest cosine of the logits", 0.99999999993, 0.999999, at_least=True),
        Gate("norm_ratio", "largest deviation of the ratio of norms from 1", 1.13e-6, 1e-4),
        Gate("kl", "largest KL divergence", 4.26e-10, 1e-5),
        Gate("argmax", "positions with another argmax, near ties aside", 0, 0),
        Gate("top10", "mean overlap of the ten likeliest tokens", 0.9988, 0.99, at_least=True),
    )


def moment(position: int, *, token: str = " the", kl: float = 0.01) -> Moment:
    expected = tuple(Choice(number, f" word{number}", 20.0 - number) for number in range(5))
    return Moment(position, token, kl, 0.5, expected, expected[::-1])


def curve(positions: int, height: float) -> tuple[float, ...]:
    """A KL divergence for each position, some of them 0."""
    return tuple(0.0 if number % 7 == 3 else height * (1 + number % 5) for number in range(positions))


def case(way: str, prompt: str, *, positions: int = 12, **changed: float) -> Case:
    worst = (moment(positions - 1), moment(1, kl=0.002))
    return Case(gates(**changed), way, prompt, curve(positions, 1e-10), worst, prompt_tokens=positions // 2)


def full(*, broken: tuple[str, str] | None = None) -> Check:
    """broken: the way and prompt whose difference is too large."""
    cases = [
        case(way, prompt, **({"difference": 0.25} if (way, prompt) == broken else {}))
        for way in WAYS
        for prompt in PROMPTS
    ]
    greedy = Gate("greedy", "prompts whose greedy text parts from PyTorch's", 0, 0)
    title = "Full-precision kernels against PyTorch on the same stored weights"
    return Check("full", title, (*cases, Case((greedy,), "greedy", "short")), ("largest logit 45.5",), seconds=3.25)


def verdict(*, broken: tuple[str, str] | None = None, backend: str = "onnxruntime 1.32.0 cpu") -> Verdict:
    files = Check("files", "Files", (Case((Gate("differing", "files that differ from the manifest", 0, 0),)),))
    layers = tuple(
        LayerFigure(layer, 1e-6 * (layer + 1), 2e-7, None if layer % 2 else 3e-7) for layer in range(0, 30, 3)
    )
    inside = Check("layers", "Cache and hidden states, layer by layer", (Case(()),), layers=layers)
    shipped = Case(
        (Gate("mean_kl", "mean KL divergence", 0.00392, 0.05, reason="int8 activations"),), "decode", "short"
    )
    checks = (files, full(broken=broken), Check("shipped", "Shipped kernels", (shipped,)), inside)
    return Verdict("bundles/tiny", backend, 260, checks, 12.34, 52, ("An `ort` bundle.",))
