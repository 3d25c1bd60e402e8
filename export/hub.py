"""Checkpoints from the Hugging Face hub, or a server that speaks its API (HF_ENDPOINT), through huggingface_hub."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import ModuleType

from ..errors import LlamaExportError, UsageError, did_you_mean
from ..progress import Progress, Silent
from .hub_errors import explain, is_a, is_broken_transfer, is_xet, one_line


def _any_case(name: str) -> str:
    """The pattern of `name` in capitals or not: Llama's licence asks for a "Notice" file, others spell it NOTICE."""
    return "".join(f"[{letter}{letter.lower()}]" if letter.isalpha() else letter for letter in name)


_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "quantize_config.json",
    "quant_config.json",
    "README.md",
    *(_any_case(name) for name in ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")),
)
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "gptq_model-*.safetensors", "model.safetensors.index.json")
_UNWANTED = ("*/*",)  # `*` matches `/` in these patterns: original/model.safetensors would come along
_MODULES = ("huggingface_hub", "huggingface_hub.constants", "huggingface_hub.errors")
_PAUSES = (1, 2, 4)
"""Seconds to wait before each further attempt."""


@dataclass(frozen=True)
class Download:
    """Files of a repository in the local cache: a folder, or one file, and the commit that they are of."""

    path: Path
    revision: str


@dataclass(frozen=True)
class HubOptions:
    """How to reach a repository; None leaves each to huggingface_hub and its environment variables.

    progress: is told of downloads that are tried again; huggingface_hub draws its bars where it draws, too.
    """

    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    progress: Progress = field(default_factory=Silent)


def download_settings(repo: str, options: HubOptions) -> Download:
    """Bring the config, tokenizer and licence files of a repository into the cache.

    Raises UsageError for a name that cannot be one, and LlamaExportError with the reason when they cannot be had.
    """
    hub = _huggingface_hub()
    folder = _snapshot(hub, repo, options, _SETTINGS)
    if not (folder / "config.json").is_file():
        _explain_absent_weights(hub, repo, options)
    return Download(folder, folder.name)


def download_weights(repo: str, settings: Download, options: HubOptions) -> None:
    """Bring the safetensors of the same commit beside the settings. Raises as `download_settings` does."""
    hub = _huggingface_hub()
    folder = _snapshot(hub, repo, replace(options, revision=settings.revision), _WEIGHTS)
    if not any(path for name in _WEIGHTS[:-1] for path in folder.glob(name)):
        _explain_absent_weights(hub, repo, options)


def _snapshot(hub: ModuleType, repo: str, options: HubOptions, patterns: tuple[str, ...]) -> Path:
    def fetch() -> str:
        return str(
            hub.snapshot_download(
                repo,
                revision=options.revision,
                token=options.token,
                cache_dir=options.cache_dir,
                allow_patterns=list(patterns),
                ignore_patterns=list(_UNWANTED),
            )
        )

    with _progress_bars(options.progress), _explained(hub, repo, options):
        return _retried(hub, fetch, options.progress)


def download_file(repo: str, name: str, options: HubOptions) -> Download:
    """Bring one file of a repository into the cache. Raises as `download_settings` does."""
    hub = _huggingface_hub()

    def fetch() -> str:
        return str(
            hub.hf_hub_download(repo, name, revision=options.revision, token=options.token, cache_dir=options.cache_dir)
        )

    try:
        with _progress_bars(options.progress), _explained(hub, repo, options):
            path = _retried(hub, fetch, options.progress)
    except hub.errors.EntryNotFoundError as error:
        files = _files(hub, repo, options, (".gguf",))
        raise LlamaExportError(
            f"The repository {repo} has no file {name!r}; its GGUF files are {', '.join(files) or 'none'}."
            + did_you_mean(name, files)
        ) from error
    return Download(path, path.parents[len(PurePosixPath(name).parts) - 1].name)


def _huggingface_hub() -> ModuleType:
    """Import huggingface_hub with its telemetry off, also when somebody imported it before.

    Xet, its other way to transfer files, asks storage servers that mirrors do not have, and that some firewalls cut
    off; so it is used with the real hub only, unless HF_HUB_DISABLE_XET says otherwise, and gives up soon.
    """
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_XET_TELEMETRY_ENABLED="false")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")  # its default takes minutes to fail
    hub, *_ = map(importlib.import_module, _MODULES)  # only now: they read the variables
    hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    if "HF_HUB_DISABLE_XET" not in os.environ and hub.constants.ENDPOINT != "https://huggingface.co":
        hub.constants.HF_HUB_DISABLE_XET = True
    return hub


def _retried(hub: ModuleType, fetch: Callable[[], str], progress: Progress) -> Path:
    """Call `fetch` again when a connection breaks; files that are complete stay in the cache and are not fetched twice.

    huggingface_hub itself resumes a file after an early end or a timeout, but not after a reset of the connection. What
    Xet cannot get, plain HTTP has to.
    """
    for pause in _PAUSES:
        try:
            return Path(fetch())
        except Exception as error:  # noqa: PERF203 - a turn takes minutes
            if is_xet(error) and not hub.constants.HF_HUB_DISABLE_XET:
                hub.constants.HF_HUB_DISABLE_XET = True
            elif not is_broken_transfer(error):
                raise
            progress.warn(f"The download stopped ({one_line(error)}); trying again.")
            time.sleep(pause)
    return Path(fetch())


@contextlib.contextmanager
def _explained(hub: ModuleType, repo: str, options: HubOptions) -> Iterator[None]:
    """Turn huggingface_hub's errors into one sentence each. A file that the repository lacks is left to the caller."""
    try:
        yield
    except Exception as error:
        if is_a(error, "RemoteEntryNotFoundError"):
            raise
        sentence = explain(
            error,
            repo=repo,
            revision=options.revision,
            endpoint=hub.constants.ENDPOINT,
            cache=str(options.cache_dir or hub.constants.HF_HUB_CACHE),
        )
        if sentence is None:
            raise
        raise (UsageError if is_a(error, "HFValidationError") else LlamaExportError)(sentence) from error


def _explain_absent_weights(hub: ModuleType, repo: str, options: HubOptions) -> None:
    """Say what a repository without safetensors holds instead; offline, the reader of the folder says it is empty."""
    if ggufs := _files(hub, repo, options, (".gguf",)):
        raise LlamaExportError(
            f"The repository {repo} holds GGUF files and no safetensors; name one of them, such as {repo}:{ggufs[0]}."
        )
    if pickles := _files(hub, repo, options, (".bin", ".pth", ".pt")):
        raise LlamaExportError(
            f"The repository {repo} holds its weights as pickle ({pickles[0]}), which can run code and is not read; "
            "take one with safetensors, or convert it with save_pretrained of transformers."
        )


def _files(hub: ModuleType, repo: str, options: HubOptions, endings: tuple[str, ...]) -> list[str]:
    if hub.constants.HF_HUB_OFFLINE:
        return []
    with _explained(hub, repo, options):
        names = hub.list_repo_files(repo, revision=options.revision, token=options.token)
    return sorted(name for name in names if name.lower().endswith(endings))


@contextlib.contextmanager
def _progress_bars(progress: Progress) -> Iterator[None]:
    """Let huggingface_hub draw its bars on stderr where `progress` draws as well."""
    utils = importlib.import_module("huggingface_hub.utils")
    if progress.draws:
        yield
        return
    were_disabled = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            utils.enable_progress_bars()
