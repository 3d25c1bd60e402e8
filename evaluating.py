"""`llama-export eval`: a text's perplexity or a file of questions, what was found as JSON and as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cli_support import need_build_machine, need_extra
from .errors import UsageError
from .evaluation_report import Evaluation, of_questions, of_text
from .progress import Progress, Silent
from .runtime.evaluate.choices import score_questions
from .runtime.evaluate.inputs import TextFile, read_text
from .runtime.evaluate.ledger import Ledger
from .runtime.evaluate.questions import read_questions
from .runtime.evaluate.scoring import score_windows
from .runtime.evaluate.windows import tokens_of, windows_of
from .runtime.model import Model, load

if TYPE_CHECKING:
    from .export.evaluate import OriginalModel

WINDOW = 1024
"""Tokens of a window, where the model's context takes as many."""


@dataclass(frozen=True)
class EvalOptions:
    """What `llama-export eval` was asked for. Raises UsageError when the parts do not fit each other.

    text, tasks: one of both. model: the checkpoint to compare with. original_adapters: folders of LoRA adapters that
    it is to have, each with `:weight` or without. window, stride: in tokens, None for `WINDOW` and for the window.
    limit: windows or questions at most. adapter: of those beside the bundle's weights. restart: forget what an earlier
    run computed.
    """

    bundle: Path
    text: Path | None = None
    tasks: Path | None = None
    model: str | None = None
    original_adapters: tuple[str, ...] = ()
    any_model: bool = False
    window: int | None = None
    stride: int | None = None
    limit: int | None = None
    adapter: str | None = None
    backend: str | None = None
    engine_dir: Path | None = None
    threads: int | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if (self.text is None) == (self.tasks is None):
            raise UsageError("Give one of --text FILE and --tasks FILE.")
        if self.tasks is not None:
            asked = {"--model": self.model, "--window": self.window, "--stride": self.stride}
            for name, value in asked.items():
                if value is not None:
                    raise UsageError(f"{name} is for --text; leave it out.")
        if self.model is None and self.original_adapters:
            raise UsageError("--original-adapter is for the model to compare with; add --model.")


def evaluate(options: EvalOptions, progress: Progress | None = None) -> Evaluation:
    """Measure a bundle. Raises UsageError and LlamaExportError, each with one sentence for the user."""
    progress = progress or Silent()
    file = read_text(options.text or options.tasks or Path())
    if options.model is not None:
        need_build_machine()
        need_extra("build", ("torch", "transformers"), "Comparing with the original model")
    progress.stage(f"Loading {options.bundle}")
    model = load(
        options.bundle,
        backend=options.backend,
        engine_dir=options.engine_dir,
        threads=options.threads,
        adapter=options.adapter,
    )
    if model.backend_note is not None:
        progress.warn(model.backend_note)
    run = _text if options.text is not None else _tasks
    return run(options, file, model, progress)


def _text(options: EvalOptions, file: TextFile, model: Model, progress: Progress) -> Evaluation:
    window, stride = _sizes(options, model)
    progress.stage(f"Reading {file.path.name}")
    tokens = tokens_of(file.text, model.tokenizer)
    windows = windows_of(len(tokens.ids), window, stride)
    chosen = windows[: options.limit]
    original, identity = _original(options, model, progress)
    facts = {"window": window, "stride": stride, "original": identity}
    with _ledger(options, file, model, facts, progress) as ledger:
        progress.stage(f"Scoring {len(chosen):,} windows of {file.path.name}")
        scores = score_windows(model.lend_backend(), tokens.ids, chosen, ledger, progress, original)
        resumed = min(ledger.found, len(chosen))
    about = _about(options, file, model) | {
        "original": identity,
        "window": window,
        "stride": stride,
        "bos": model.bundle.manifest.tokens.add_bos,
        "windows": len(chosen),
        "windows_in_file": len(windows),
        "resumed": resumed,
    }
    return of_text(about, tokens, chosen, scores)


def _tasks(options: EvalOptions, file: TextFile, model: Model, progress: Progress) -> Evaluation:
    questions = read_questions(file.text, file.path.name)
    chosen = questions[: options.limit]
    tokens = model.bundle.manifest.tokens
    begin = tokens.bos if tokens.bos is not None else next(iter(tokens.eos), None)
    with _ledger(options, file, model, {}, progress) as ledger:
        progress.stage(f"Answering {len(chosen):,} questions of {file.path.name}")
        scores = score_questions(model.lend_backend(), model.tokenizer, begin, chosen, ledger, progress)
        resumed = min(ledger.found, len(chosen))
    about = _about(options, file, model) | {"questions_in_file": len(questions), "resumed": resumed}
    return of_questions(about, chosen, scores)


def _sizes(options: EvalOptions, model: Model) -> tuple[int, int]:
    """Window and stride. Raises UsageError when they are out of range."""
    window = min(WINDOW, model.capacity) if options.window is None else options.window
    if not 2 <= window <= model.capacity:
        raise UsageError(f"--window must be from 2 to the bundle's context {model.capacity}, not {window}.")
    stride = window if options.stride is None else options.stride
    if not 1 <= stride <= window:
        raise UsageError(f"--stride must be from 1 to the window {window}, not {stride}: a larger one skips tokens.")
    return window, stride


def _ledger(options: EvalOptions, file: TextFile, model: Model, facts: Mapping[str, Any], progress: Progress) -> Ledger:
    """Of all that scores depend on; --limit is not part of it, so that a larger one goes on."""
    kind = "text" if options.text is not None else "tasks"
    computed_by = {
        "llama_export": __version__,
        "bundle": model.bundle.manifest_sha256,
        "backend": model.backend_name,
        "threads": model.threads,
        "adapter": model.adapter,
    }
    return Ledger({"kind": kind, "file": file.sha256, **computed_by, **facts}, progress, restart=options.restart)


def _original(
    options: EvalOptions, model: Model, progress: Progress
) -> tuple[OriginalModel | None, dict[str, Any] | None]:
    """The model to compare with, and the facts that tell it from others; None for both where none was asked for."""
    if options.model is None:
        return None, None
    from .export.evaluate import open_original  # noqa: PLC0415 (imports PyTorch)
    from .export.source import open_source  # noqa: PLC0415

    progress.stage(f"Opening {options.model}")
    source = open_source(
        options.model,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        progress=progress,
    )
    manifest = model.bundle.manifest
    original, sha256 = open_original(
        source, options.original_adapters, manifest, model.adapter, any_model=options.any_model
    )
    return original, {"model": source.model_id, "revision": source.revision, "sha256": sha256}


def _about(options: EvalOptions, file: TextFile, model: Model) -> dict[str, Any]:
    """What was measured, for programs."""
    manifest = model.bundle.manifest
    return {
        "bundle": str(options.bundle),
        "model": manifest.model.id,
        "precision": manifest.precision,
        "adapter": model.adapter,
        "backend": model.backend_name,
        "threads": model.threads,
        "file": str(file.path),
        "file_sha256": file.sha256,
    }
