"""One self-contained page of what `verify` found: no scripts, no network, light and dark.

Names, texts of tokens and messages come from bundles and references that anybody may have made: the template escapes
all of them, and the page's own policy forbids whatever could still be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ...quality import Quality
from ..verdict import Case, Check, Gate, Moment, Verdict, number
from . import plots
from .broken import broken
from .costs import costs
from .plots import Picture, Series, log_plot
from .words import WayRow, bound, brief, by_way, distinct, head, outcome, run_names, way_name, whole

if TYPE_CHECKING:
    from jinja2 import Template

_WORST = 5  # positions of a prompt
_SHOWN = 40  # characters of a token
_NAME = 120
_SENTENCE = 600
_MOST_PICTURES = 60  # of a check: prompts beyond are told in the table alone
_VISIBLE = {ord("\n"): "⏎", ord("\r"): "⏎", ord("\t"): "⇥"}


@dataclass(frozen=True)
class Prompt:
    """What the page shows of a prompt in a check. worst: the position with its way."""

    name: str
    picture: Picture | None
    worst: tuple[tuple[str, Moment], ...]


@dataclass(frozen=True)
class Section:
    """What the page shows of a check. whole: gates of no prompt; figures: the columns of the table of the others;
    limits: each figure's gate, for its name, limit and reason.
    """

    check: Check
    whole: tuple[Gate, ...]
    ways: tuple[WayRow, ...]
    figures: tuple[str, ...]
    limits: Mapping[str, Gate]
    prompts: tuple[Prompt, ...]
    layers: Picture | None


def html_page(
    verdicts: Sequence[Verdict], bisection: Mapping[str, Any] | None = None, quality: Quality | None = None
) -> str:
    """The verdicts of one bundle as an HTML document. bisection: what `verify --bisect` found, see `broken`. quality:
    what quantisation cost, where that was measured.
    """
    runs = [
        (name, verdict, [_section(check) for check in verdict.checks])
        for name, verdict in zip(run_names(verdicts), verdicts, strict=True)
    ]
    return _template().render(
        runs=runs,
        outcome=outcome(verdicts),
        passed=bool(verdicts) and all(verdict.passed for verdict in verdicts),
        bundle=verdicts[0].bundle if verdicts else "",
        notes=list(dict.fromkeys(note for verdict in verdicts for note in verdict.notes)),
        broken=None if bisection is None else broken(bisection),
        costs=None if quality is None else costs(quality),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 (only a page needs it)

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=number,
        brief=brief,
        bound=bound,
        head=head,
        way=way_name,
        shown=shown,
        clip=clip,
        seen=lambda text: shown(text, _SENTENCE),
    )
    environment.globals["plots"] = plots
    return environment.from_string(files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8"))


def shown(text: str, most: int = _SHOWN) -> str:
    """A token's text so that all of it is seen: line ends and tabs as signs, what cannot be shown as "�"."""
    seen = text[:most].translate(_VISIBLE)
    visible = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in seen)
    return visible + ("…" if len(text) > most else "")


def clip(name: str) -> str:
    """A name that may be of any length."""
    return shown(name, _NAME)


def _section(check: Check) -> Section:
    gates = [gate for case in check.cases for gate in case.gates if case.way or case.prompt]
    return Section(
        check,
        whole(check),
        tuple(by_way(check)),
        tuple(dict.fromkeys(gate.figure for gate in gates)),
        {gate.figure: gate for gate in (*gates, *whole(check))},
        tuple(_prompts(check)),
        _layers(check),
    )


def _prompts(check: Check) -> list[Prompt]:
    cases: dict[str, list[Case]] = {}
    for case in check.cases:
        if case.kl or case.worst:
            cases.setdefault(case.prompt, []).append(case)
    return [_prompt(name, own) for name, own in list(cases.items())[:_MOST_PICTURES]]


def _prompt(name: str, cases: Sequence[Case]) -> Prompt:
    moments: dict[int, tuple[str, Moment]] = {}
    for case in cases:
        for moment in case.worst:
            if moment.position not in moments or moment.kl > moments[moment.position][1].kl:
                moments[moment.position] = (case.way, moment)
    worst = sorted(moments.values(), key=lambda one: -one[1].kl)[:_WORST]
    drawn = [case for case in cases if case.kl]
    return Prompt(name, _kl_picture(drawn) if drawn else None, tuple(worst))


def _kl_picture(cases: Sequence[Case]) -> Picture:
    limits = [gate.limit for case in cases for gate in case.gates if gate.figure == "kl"]
    names = distinct(way_name(case.way) for case in cases)
    series = [
        Series(name, range(case.first, case.first + len(case.kl)), case.kl)
        for name, case in zip(names, cases, strict=True)
    ]
    return log_plot(
        "KL divergence of each position",
        "position",
        "nats",
        series,
        limit=min(limits, default=None),
        boundary=max((case.first + case.prompt_tokens for case in cases if case.prompt_tokens), default=None),
    )


def _layers(check: Check) -> Picture | None:
    if not check.layers:
        return None
    places = [one.layer for one in check.layers]
    series = [
        Series(name, places, [getattr(one, name) for one in check.layers]) for name in ("hidden", "keys", "values")
    ]
    known = [one for one in series if any(value is not None for value in one.values)]
    return log_plot("Difference from PyTorch by layer", "layer", "relative to the largest number", known)
