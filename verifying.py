"""What `llama-export verify` does: one run for each backend, what is told of them, and the files that are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LlamaExportError, UsageError
from .names import SHORT_BACKENDS
from .progress import Progress
from .runtime.bundle import Bundle, open_bundle
from .runtime.files import written_whole
from .runtime.proof.foreign import is_foreign
from .runtime.proof.reports.html import html_page
from .runtime.proof.reports.junit import junit_xml
from .runtime.proof.reports.table import lines as table_lines
from .runtime.proof.verdict import Check, Verdict, to_json
from .runtime.proof.verify import verify
from .runtime.quality import Quality, load_quality

if TYPE_CHECKING:
    from .export.bisect import Bisection


@dataclass(frozen=True)
class VerifyOptions:
    """Of the command. backends: what computes, one run each; empty for the best that is here. model: the checkpoint
    that `bisect` computes with, None for the weights that the bundle stores.
    """

    references: tuple[Path, ...] = ()
    any_model: bool = False
    backends: tuple[str, ...] = ()
    engine_dir: Path | None = None
    threads: int | None = None
    check_hashes: bool = True
    max_kl: float | None = None
    bisect: bool = False
    model: str | None = None


@dataclass(frozen=True)
class Report:
    """All runs, and where the graph breaks, if that was asked. quality: what quantisation cost where it was built, None
    where the bundle does not say.
    """

    verdicts: tuple[Verdict, ...]
    bisection: Bisection | None = None
    quality: Quality | None = None

    @property
    def passed(self) -> bool:
        """Every gate, and no place where the graph breaks: a bisection sees faults that no gate does."""
        sound = self.bisection is None or self.bisection.passed
        return sound and all(verdict.passed for verdict in self.verdicts)

    def lines(self) -> list[str]:
        """For people; the last line is the outcome."""
        told = table_lines(self.verdicts)
        if self.bisection is None:
            return told
        if not self.bisection.passed and all(verdict.passed for verdict in self.verdicts):
            told[-1] = f"FAILED: {self.bisection.verdict}; no gate sees it"
        return [*self.bisection.lines(), "", *told]

    def json(self) -> str:
        """For programs."""
        quality = None if self.quality is None else json.loads(self.quality.to_json())
        return json.dumps({**to_json(self.verdicts), "quality": quality, **self._bisected()}, indent=2) + "\n"

    def junit(self) -> str:
        """For every CI: one case for each prompt and gate."""
        return junit_xml(self.verdicts)

    def html(self) -> str:
        """For people who look closer: one page that needs nothing else."""
        return html_page(self.verdicts, self._bisected().get("bisection"), self.quality)

    def _bisected(self) -> Mapping[str, Any]:
        return {} if self.bisection is None else {"bisection": self.bisection.to_json()}


def backends_of(value: str | None) -> tuple[str, ...]:
    """The names in --backend, short ones written out. Raises UsageError when one is empty or named twice."""
    names = () if value is None else tuple(name.strip() for name in value.split(","))
    written = tuple(SHORT_BACKENDS.get(name, name) for name in names)
    if "" in written:
        raise UsageError(f"--backend {value!r} has an empty name in it; write names with commas between them.")
    if len(set(written)) < len(written):
        raise UsageError(f"--backend {value!r} names one backend twice; name each once.")
    return written


def report_of(path: Path, options: VerifyOptions, progress: Progress) -> Report:
    """Verify the bundle, or the folder of another tool, at `path`.

    One backend raises as `runtime.proof.verify.verify` does. Where several are named, one that cannot run here is a
    failure of its own run, and the others go on. Raises UsageError when a folder of another tool is asked for what only
    bundles have.
    """
    if is_foreign(path):
        _refuse_for_foreign(path, options)
        return Report((_run(path, None, options, progress),))
    bundle = open_bundle(path)
    if options.model is not None and not options.bisect:
        raise UsageError("-m names the checkpoint that --bisect computes with; add --bisect, or leave it out.")
    if len(options.backends) < 2:
        verdicts = [_run(bundle, options.backends[0] if options.backends else None, options, progress)]
    else:
        verdicts = [_run_or_tell(bundle, backend, options, progress) for backend in options.backends]
    bisection = _bisected(bundle, options, progress) if options.bisect else None
    return Report(tuple(verdicts), bisection, _quality(bundle, progress))


def _quality(bundle: Bundle, progress: Progress) -> Quality | None:
    """What quantisation cost; what is damaged fails the hashes, and is left out here."""
    try:
        return load_quality(bundle)
    except LlamaExportError as error:
        progress.warn(str(error))
        return None


def refuse_outputs(files: Sequence[Path | None]) -> None:
    """Raise UsageError when reports could not be written to these files, None for none, once all has been computed."""
    asked = [file for file in files if file is not None and str(file) != "-"]
    for file in asked:
        if file.is_dir():
            raise UsageError(f"{file} is a folder; name the file that the report becomes.")
        if not file.parent.is_dir():
            raise UsageError(f"The folder of {file} is not there; make it, or name another file.")
    plain = [file.resolve() for file in asked if file.is_file() or not file.exists()]
    if len(set(plain)) < len(plain):
        raise UsageError("Two of --json, --junit and --html name one file; name a file for each.")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; what a link leads to, and a device or a pipe as it is. Raises OSError, as of
    the file itself, when it cannot be written.
    """
    path = path.resolve() if path.is_file() else path
    try:
        if path.exists() and not path.is_file():  # renaming to it would put a file in its place
            path.write_bytes(text.encode())
            return
        with written_whole(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _run(bundle: Bundle | Path, backend: str | None, options: VerifyOptions, progress: Progress) -> Verdict:
    return verify(
        bundle,
        check_hashes=options.check_hashes,
        threads=options.threads,
        progress=progress,
        references=options.references,
        any_model=options.any_model,
        backend=backend,
        engine_dir=options.engine_dir,
        max_kl=options.max_kl,
    )


def _run_or_tell(bundle: Bundle, backend: str, options: VerifyOptions, progress: Progress) -> Verdict:
    progress.stage(f"Verifying on {backend}")
    try:
        return _run(bundle, backend, options, progress)
    except UsageError:
        raise  # of all of them, or a name that is none
    except LlamaExportError as error:
        check = Check(backend, f"On {backend}", error=str(error))
        return Verdict(str(bundle.path), backend, 0, (check,), 0.0, 0, ())


def _bisected(bundle: Bundle, options: VerifyOptions, progress: Progress) -> Bisection:
    from .export.bisect import bisect  # noqa: PLC0415 (a device has none of what it takes)
    from .export.source import open_source  # noqa: PLC0415

    source = None if options.model is None else open_source(options.model, progress=progress)
    return bisect(bundle, source=source, progress=progress, threads=options.threads)


def _refuse_for_foreign(path: Path, options: VerifyOptions) -> None:
    asked: Sequence[tuple[str, object]] = (
        ("--backend", options.backends),
        ("--engine-dir", options.engine_dir),
        ("--any-model", options.any_model),
        ("--bisect", options.bisect),
        ("-m", options.model),
    )
    for name, value in asked:
        if value:
            raise UsageError(
                f"{path} was exported by another tool, and {name} is for bundles; leave it out, or build a bundle."
            )
