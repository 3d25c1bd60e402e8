"""What `llama-export run` does once a model is loaded: text to stdout as it comes, figures to stderr, or JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..console import printable
from ..errors import LlamaExportError, UsageError, did_you_mean
from ..tables import plain
from .generate import GenerationOptions, Result, Stream
from .model import Model

_END = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
COMMANDS = {"/exit": f"end the conversation (or {_END})", "/reset": "forget it and begin anew"}


@dataclass(frozen=True)
class RunRequest:
    """What to write. Raises UsageError when the parts do not fit each other.

    prompt: the text to continue, or with `chat` the only turn; "-" reads it from stdin; None is a conversation.
    """

    prompt: str | None = None
    chat: bool = False
    system: str | None = None
    options: GenerationOptions = GenerationOptions()  # noqa: RUF009 (it is frozen)
    as_json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.prompt is None and not self.chat:
            raise UsageError("There is nothing to continue; give a PROMPT, or - to read it from stdin, or --chat.")
        if self.system is not None and not self.chat:
            raise UsageError("--system instructs a chat model; add --chat.")
        sampling = self.options.sampling
        if sampling.temperature == 0 and (sampling.top_k, sampling.top_p, sampling.min_p) != (0, 1.0, 0.0):
            raise UsageError(
                "Without --temperature the likeliest token is taken, so --top-k, --top-p and --min-p do "
                "nothing; add --temperature or leave them out."
            )


def run(model: Model, request: RunRequest) -> None:
    """Write what is asked for to stdout. Ctrl-C shows what there is and raises KeyboardInterrupt, in a conversation it
    ends only the answer. Raises as `Model.stream` and `Model.stream_chat` do.
    """
    if request.prompt is None:
        _converse(model, request)
        return
    with _needing_text():
        # `echo text |` ends its line; the text is what was meant.
        prompt = sys.stdin.read().removesuffix("\n") if request.prompt == "-" else request.prompt
    if request.chat:
        text = model.conversation(request.system).say(prompt, request.options)
    else:
        text = model.stream(prompt, request.options)
    if _show(text, model, request).finish_reason == "interrupted":
        raise KeyboardInterrupt


def _converse(model: Model, request: RunRequest) -> None:
    """Answer line after line of stdin until it ends; an error ends only its own turn."""
    conversation = model.conversation(request.system)
    for line in _lines():
        if line in COMMANDS or (line.startswith("/") and line[1:].isalpha()):
            if line == "/exit":
                return
            if line == "/reset":
                conversation.reset()
            else:
                known = ", ".join(f"{name}: {what}" for name, what in COMMANDS.items())
                _say(f"There is no command {line}.{did_you_mean(line, COMMANDS)} {known}.")
            continue
        try:
            _show(conversation.say(line, request.options), model, request)
        except LlamaExportError as error:
            if not sys.stdin.isatty():
                raise
            _say(f"Error: {error}")


def _lines() -> Iterator[str]:
    """Yield the lines of stdin that are not blank, asking for them when a person sits there."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        with _needing_text():
            yield from (line for line in map(str.strip, sys.stdin) if line)
        return
    with contextlib.suppress(ImportError):  # gives `input` its editing keys; Windows has its own
        import readline  # noqa: F401, PLC0415
    _say("Ctrl-C ends an answer. " + " ".join(f"{name}: {what}." for name, what in COMMANDS.items()))
    while True:
        try:
            with _needing_text():
                line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


@contextlib.contextmanager
def _needing_text() -> Iterator[None]:
    """Raise UsageError where stdin is not text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"What stdin gives is not valid {error.encoding}; give the text as UTF-8.") from error


def _show(text: Stream, model: Model, request: RunRequest) -> Result:
    """Print a text as it is written, then its figures; or, for JSON, all of it at its end on one line."""
    try:
        for piece in text:
            if not request.as_json:
                print(_printable(piece.text), end="", flush=True)
    except KeyboardInterrupt:
        text.stop()
    result = text.result
    if request.as_json:
        print(_json(to_json(result, model)), flush=True)
        return result
    print(flush=True)
    if not request.quiet:
        _say(figures(result, model.adapter))
    return result


def _json(value: dict[str, Any]) -> str:
    """One line, readable where stdout's encoding allows it, else with JSON's own escapes: nothing of it may be lost."""
    line = json.dumps(value, ensure_ascii=False)
    return line if printable(line, sys.stdout) else json.dumps(value)


def to_json(result: Result, model: Model) -> dict[str, Any]:
    """Return the object that `run --json` prints; its keys are stable."""
    record = model.bundle.manifest.model
    made_by = {
        "model": record.id,
        "adapter": model.adapter,
        "backend": model.backend_name,
        "threads": model.threads,
    }
    return {**result.to_json(), **made_by}


def figures(result: Result, adapter: str | None = None) -> str:
    """Return one line: tokens, speeds, why the text ended, and with which adapter it was written."""
    reused = f" ({result.reused_tokens} still in the cache)" if result.reused_tokens else ""
    parts = [
        f"prompt {result.prompt_tokens} tokens{reused}{_speed(result.prefill_tokens_per_second)}",
        f"answer {result.new_tokens} tokens{_speed(result.decode_tokens_per_second)}",
        f"loaded in {result.load_seconds:.2f} s",
        f"ended by {result.finish_reason}",
    ]
    if result.first_token_seconds is not None:
        parts.insert(2, f"first token after {result.first_token_seconds:.2f} s")
    if adapter is not None:
        parts.append(f"with the adapter {adapter}")
    return "[" + ", ".join(parts) + "]"


def _speed(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.1f}/s"


def _printable(text: str) -> str:
    """Return `text` without control characters where a terminal would obey them."""
    return plain(text) if sys.stdout.isatty() else text


def _say(line: str) -> None:
    print(plain(line), file=sys.stderr, flush=True)
