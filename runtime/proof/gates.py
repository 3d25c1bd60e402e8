"""What each figure may be: the limits in `gates.toml`, applied to what was compared."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from ...errors import UsageError
from ..decode_json import decode
from .parity import Comparison
from .verdict import Gate
from .ways import GREEDY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES, WEIGHTS, FULL, SHIPPED, ENGINE, COST, LAYERS = "files", "weights", "full", "shipped", "engine", "cost", "layers"
"""The questions. About logits: full-precision kernels against PyTorch on the same weights; the kernels that ship, or an
engine, against those; and what really runs against PyTorch on the original weights. `layers` looks inside the graph.
"""
HALF_AS_LIKELY = float(np.log(2))


@dataclass(frozen=True)
class Figure:
    """id: in files; name: for people; of: its value over all positions of a comparison; at_least: more is better."""

    id: str
    name: str
    of: Callable[[Comparison], float]
    at_least: bool = False


def _largest(name: str) -> Callable[[Comparison], float]:
    return lambda found: float(getattr(found, name).max(initial=0))


FIGURES: Mapping[str, Figure] = {
    figure.id: figure
    for figure in (
        Figure("difference", "largest difference of a logit", _largest("difference")),
        Figure("relative", "largest difference, relative to the position's largest logit", _largest("relative")),
        Figure("cosine", "smallest cosine of the logits", lambda found: float(found.cosine.min(initial=1)), True),
        Figure(
            "norm_ratio",
            "largest deviation of the ratio of norms from 1",
            lambda found: float(np.abs(found.norm_ratio - 1).max(initial=0)),
        ),
        Figure("kl", "largest KL divergence", _largest("kl")),
        Figure("mean_kl", "mean KL divergence", lambda found: float(found.kl.mean())),
        Figure(
            "agreement",
            "share of positions that agree on a likely token",
            lambda found: float((found.shortfall <= HALF_AS_LIKELY).mean()),
            True,
        ),
        Figure("top10", "mean overlap of the ten likeliest tokens", lambda found: float(found.top10.mean()), True),
    )
}
"""Those that one limit judges."""
NEAR_TIES: Mapping[str, str] = {
    "argmax": "positions with another argmax, near ties aside",
    GREEDY: "tokens of greedy text that part from the reference's, near ties aside",
}
"""Those that count tokens, and need to know what a near tie is, see `Limits`."""
HIDDEN: Mapping[str, str] = {
    "hidden": "largest difference of a hidden state, relative to the layer's largest",
    "keys": "largest difference of a key, relative to the layer's largest",
    "values": "largest difference of a value, relative to the layer's largest",
}
"""Those of the line `layers`."""


@dataclass(frozen=True)
class Limits:
    """One table of `gates.toml`. line: one of the questions above. setting: the dtype of activations; for `cost` the
    bits of a weight; or `rounded`, where the graph itself rounds activations to 8 bits.

    limits: by figure. scaled: of `difference`, times the reference's largest logit, where that is more. near_tie: how
    far the reference's logit of another token may lie below its best for both to count as chosen, in nats; None is
    twice the allowed difference. reasons: why, by figure.
    """

    line: str
    setting: str
    limits: Mapping[str, float]
    reasons: Mapping[str, str]
    scaled: float = 0.0
    near_tie: float | None = None

    def allowed_difference(self, largest: float) -> float:
        """largest: magnitude of the reference's logits."""
        return max(self.limits.get("difference", 0.0), self.scaled * largest)

    def tie(self, largest: float) -> float:
        """How close two logits of the reference have to be to change places. Two that may each be off by the allowed
        difference can when they are closer than twice that.
        """
        return self.near_tie if self.near_tie is not None else 2 * self.allowed_difference(largest)

    def figures(self, way: str) -> tuple[str, ...]:
        """The ids of the gates that are asked about a way."""
        return tuple(id for id in self.limits if (id == GREEDY) == (way == GREEDY))

    def judge(self, compared: Comparison, largest: float, way: str = "") -> tuple[Gate, ...]:
        """The gates of one comparison. largest: magnitude of the reference's logits."""
        gates = []
        for id in self.figures(way):
            limit, reason = self.limits[id], self.reasons.get(id, "")
            if id in NEAR_TIES:
                wrong = float((compared.shortfall > self.tie(largest)).sum())
                gates.append(Gate(id, NEAR_TIES[id], wrong, limit, reason=reason))
            else:
                figure = FIGURES[id]
                allowed = self.allowed_difference(largest) if id == "difference" else limit
                gates.append(Gate(id, figure.name, figure.of(compared), allowed, figure.at_least, reason))
        return tuple(gates)


@cache
def all_limits() -> tuple[Limits, ...]:
    """Every table of `gates.toml`."""
    value: Any = tomllib.loads(files(__package__).joinpath("gates.toml").read_text(encoding="utf-8"))
    return tuple(decode(Limits, table, "gates.toml") for table in value["gates"])


def check_budget(max_kl: float | None) -> None:
    """Raise UsageError when the user's own limit of the mean KL divergence, in nats, is none."""
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise UsageError(f"--max-kl must be a number of nats from 0 on, such as 0.05, not {max_kl}.")


def limits_of(line: str, setting: str) -> Limits:
    """The limits of a question in a setting; KeyError when there are none."""
    for limits in all_limits():
        if (limits.line, limits.setting) == (line, setting):
            return limits
    raise KeyError((line, setting))
