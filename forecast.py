"""What `plan` shows: a model by its config, against one target or all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import LlamaExportError
from .export.config_source import ConfigSource, open_config
from .export.hub import HubOptions
from .progress import Progress, Silent
from .targets.choice import choose
from .targets.devices import Target, load_target, target_names
from .targets.made import what_is_made
from .targets.planner import Assessment, Model, Wish, assess
from .targets.planner_text import detail_lines, table_lines, to_json
from .targets.tensorrt import needs_calibration


@dataclass(frozen=True)
class PlanOptions:
    """What `llama-export plan` was asked for; no targets means all of the catalogue and this machine."""

    model: str
    targets: tuple[str, ...] = ()
    precision: str | None = None
    head_precision: str | None = None
    context: int | None = None
    batch: int = 1
    jetpack: str | None = None
    backend: str | None = None
    cache_precision: str | None = None
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None

    @property
    def wish(self) -> Wish:
        return Wish(self.precision, self.head_precision, self.context, self.batch, cache=self.cache_precision)


@dataclass(frozen=True)
class Forecast:
    """The model, the assessment of each target, and why some targets have none."""

    source: ConfigSource
    options: PlanOptions
    found: tuple[Assessment, ...]
    skipped: tuple[str, ...]

    @property
    def model(self) -> Model:
        return model_of(self.source)

    def lines(self) -> list[str]:
        """For people: the details of one target, else a table."""
        one = len(self.options.targets) == 1
        shown = detail_lines(self.found[0]) if one else table_lines(self.found)
        notes = [f"Read from {self.source.origin}.", *self.source.notes, *self.skipped]
        return [*shown, "", *notes]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        document = to_json(self.model, self.source.origin, self.options.wish, self.found)
        return {**document, "skipped": list(self.skipped), "notes": list(self.source.notes)}


def model_of(source: ConfigSource) -> Model:
    """What the planner takes of a config."""
    return Model(source.name, source.shape, source.tensors, source.native)


def forecast(options: PlanOptions, progress: Progress | None = None) -> Forecast:
    """Plan a model for the targets named, or for all, of which those are skipped that lack what was asked for.

    Raises UsageError and LlamaExportError, each with one sentence for the user.
    """
    hub = HubOptions(options.revision, options.token, options.cache_dir, progress or Silent())
    targets = [_target(name, options) for name in dict.fromkeys(options.targets)]  # a wrong name is told first
    source = open_config(options.model, hub)
    model = model_of(source)
    if targets:
        found = tuple(_assess(target, model, options.wish) for target in targets)
        return Forecast(source, options, found, ())
    return _of_all(source, model, options)


def _of_all(source: ConfigSource, model: Model, options: PlanOptions) -> Forecast:
    found, skipped = list[Assessment](), list[str]()
    problems: list[LlamaExportError] = []
    for name in target_names():
        try:
            found.append(_assess(_target(name, options), model, options.wish))
        except LlamaExportError as error:  # noqa: PERF203 - a handful
            problems.append(error)
            skipped.append(name)
    if not found:
        raise problems[0]
    told = (f"Left out, as they lack what was asked for: {', '.join(skipped)}.",) if skipped else ()
    return Forecast(source, options, tuple(found), told)


def _assess(target: Target, model: Model, wish: Wish) -> Assessment:
    """The size of calibrated weights can be told without calibrating them."""
    calibrated = wish.precision is not None and needs_calibration(target, wish.precision)
    return assess(target, what_is_made(target), model, replace(wish, calibrated=calibrated))


def _target(name: str, options: PlanOptions) -> Target:
    return choose(load_target(name), jetpack=options.jetpack, backend=options.backend)
