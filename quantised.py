"""Between a plan and its bundle: the tensors that are written, where codes of our own stand for the checkpoint's."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .export.destination import require_space, signals_raise
from .limits import AboveLimitError
from .names import GPTQ, RTN, SEARCH
from .optimize.tensors import SourceTensor
from .planning import BuildPlan
from .progress import Progress
from .runtime.bundle import Quantisation

Begin = Callable[[str, str], None]
"""Begins a stage: its name, and its title for people."""

_STATE_BYTES = 16
"""On the disk, for each number of a token's hidden states: two streams in float32, old and new."""


@dataclass(frozen=True)
class Quantised:
    """What is written in place of the checkpoint's tensors. record: what made its codes, None where nothing did."""

    tensors: Mapping[str, SourceTensor]
    record: Quantisation | None = None


@contextlib.contextmanager
def quantised(
    plan: BuildPlan, tensors: Mapping[str, SourceTensor], place: Path, begin: Begin, progress: Progress
) -> Iterator[Quantised]:
    """`tensors` with the codes of the plan's method, to be read as long as the block lasts.

    place: of the bundle. A method that takes long keeps what it has finished beside it, until the block ends well;
    where it does not, that stays for the next build, and the user is told.
    """
    if plan.method == GPTQ and plan.calibration is not None:
        with _calibrated(plan, tensors, place, begin, progress) as found:
            yield found
    elif plan.method == SEARCH:
        yield _searched(plan, tensors, begin, progress)
    else:
        yield Quantised(tensors, _rounded(plan))


def _rounded(plan: BuildPlan) -> Quantisation | None:
    """Rounding to nearest, of what a text may have moved channel scales into."""
    if plan.method is None:
        return None
    text = plan.calibration
    return Quantisation(RTN, 1) if text is None else Quantisation(RTN, 1, text.sha256, text.tokens)


def _searched(plan: BuildPlan, tensors: Mapping[str, SourceTensor], begin: Begin, progress: Progress) -> Quantised:
    from .export.quantising.importance import known  # noqa: PLC0415 (torch takes seconds)
    from .export.quantising.solvers import searching  # noqa: PLC0415
    from .optimize.equivalence import scaled  # noqa: PLC0415
    from .optimize.overlay import searched  # noqa: PLC0415

    begin("importance", "Finding which weights count most")
    source, dtype = plan.source.with_other(tensors=tensors), plan.made.activations
    found = known(source, plan.formats, plan.context.context, progress, scaling=not plan.beside)
    method = searching(found.importances)
    overlay = searched(scaled(tensors, found.scales), plan.formats, method.rows, dtype)
    return Quantised(overlay, Quantisation(method.name, method.version))


@contextlib.contextmanager
def _calibrated(
    plan: BuildPlan, tensors: Mapping[str, SourceTensor], place: Path, begin: Begin, progress: Progress
) -> Iterator[Quantised]:
    from .export.quantising import Run, calibrated, opened_work, solvers, work_path  # noqa: PLC0415

    text, work = plan.calibration, work_path(place)
    assert text is not None
    run = Run(
        source=plan.source.with_other(tensors=tensors),
        sha256=plan.sha256,
        formats=plan.formats,
        scale_dtype=plan.made.activations,
        text=text,
        context=plan.context.context,
        method=solvers.GPTQ,
        scaling=not plan.beside,
        data_free=solvers.searching({}),
    )
    require_space(work.parent, plan.stored + _STATE_BYTES * text.tokens * plan.source.shape.hidden)
    record = Quantisation(run.method.name, run.method.version, text.sha256, text.tokens)
    opened = False
    try:
        with signals_raise(), opened_work(work, run.key) as folder:
            opened = True
            begin("quantise", f"Quantising over {text.tokens:,} tokens of {text.name}")
            yield Quantised(calibrated(run, folder, progress).tensors, record)
    except AboveLimitError:  # other formats come next, if any, for which nothing of this helps
        shutil.rmtree(work, ignore_errors=True)
        raise
    except BaseException:
        if opened and work.exists():
            progress.warn(
                f"The layers that are quantised stay in {work}: the same build goes on after them and removes them at "
                "its end."
            )
        raise
