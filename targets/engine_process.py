"""Building an engine in a process of its own: a crash of the builder, or its end where memory runs out, becomes one
sentence, what it took is given back, and it does not outlive us.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from ..errors import LlamaExportError
from ..names import MODULES, TENSORRT_RTX
from ..progress import Progress
from ..runtime.recipe import Recipe
from ..tables import size
from .engine_child import STOP

_STOP_SECONDS = 10.0
"""Until a builder that was told to stop is ended: its steps are short, but only between them it looks."""

_LOOK_SECONDS = 0.2
"""How often one who waits for the builder hears Ctrl-C: Windows interrupts no wait for a pipe."""

# The builder waits for orders while it loads libraries. Some of these ask what their stdin is as they are loaded, for
# which Windows lets them wait until a read from it has ended (python/cpython#78961, numpy/numpy#24290): they get none.
_START = (
    "import json, os, sys; orders = os.fdopen(os.dup(0), encoding='ascii'); "
    "os.dup2(os.open(os.devnull, os.O_RDONLY), 0); job = json.loads(orders.readline()); sys.path[:] = job.pop('path'); "
    "from {package}.engine_child import main; main(job, orders)"
)


@dataclass(frozen=True)
class Job:
    """What to build. graph: model.onnx, its weights beside it; label: what the engine is called, by which the runtime
    knows it again; plan, log: to write; timing_cache: to read and write.
    """

    graph: Path
    label: str
    recipe: Recipe
    plan: Path
    log: Path
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """What was built. version: of the module; size: bytes of the plan; peak_bytes: the most memory that the builder
    had for itself, beside files that it mapped; None where the system does not tell.
    """

    version: str
    size: int
    seconds: float
    peak_bytes: int | None


def run_builder(job: Job, progress: Progress) -> Built:
    """Build the engine. Whatever is raised, `job.plan` does not stay behind; the log does.

    Raises LlamaExportError with the builder's reason, or with what ended it. Ctrl-C stops the builder first.
    """
    try:
        with _child(job) as child:
            built = _follow(child, progress)
            code = child.wait()
    except BaseException:
        job.plan.unlink(missing_ok=True)
        raise
    if built is None:
        job.plan.unlink(missing_ok=True)
        raise LlamaExportError(_death(code, job))
    return built


@contextmanager
def _child(job: Job) -> Iterator[subprocess.Popen[str]]:
    package = __name__.rpartition(".")[0]
    # Isolated (-I), so that a file named numpy.py in the current folder is not taken for numpy; it gets our own path.
    command = [sys.executable, "-I", "-c", _START.format(package=package)]
    rtx = job.recipe.module == MODULES[TENSORRT_RTX]
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": str(int(rtx)), "POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, encoding="utf-8"
    )
    message = {key: str(value) if isinstance(value, Path) else value for key, value in vars(job).items()}
    try:
        with suppress(OSError):  # it ended already: told by its exit code
            _say(child, json.dumps({"path": sys.path, **message, "recipe": dataclasses.asdict(job.recipe)}))
        yield child
    except KeyboardInterrupt:
        with suppress(OSError, subprocess.TimeoutExpired):
            _say(child, STOP)
            child.wait(_STOP_SECONDS)
        raise
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):  # what it did not take any more
                assert pipe is not None
                pipe.close()


def _say(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{line}\n")
    child.stdin.flush()


def _follow(child: subprocess.Popen[str], progress: Progress) -> Built | None:
    """Tell the progress until the builder says how it went; None when it ended without."""
    assert child.stdout is not None
    for line in _lines(child.stdout):
        message: dict[str, Any] = json.loads(line)
        if "share" in message:
            progress.share(message["share"])
        elif "error" in message:
            raise LlamaExportError(message["error"])
        elif "built" in message:
            return Built(**message["built"])
    return None


def _lines(pipe: IO[str]) -> Iterator[str]:
    """The lines of a pipe as they come, read in a thread so that whoever waits for them hears Ctrl-C."""
    heard: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        with suppress(OSError, ValueError):  # closed: nobody waits any more
            for line in pipe:
                heard.put(line)
        heard.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        with suppress(Empty):
            line = heard.get(timeout=_LOOK_SECONDS)
            if line is None:
                return
            yield line


def _death(code: int, job: Job) -> str:
    """The sentence for a builder that ended without one of its own."""
    if code == -getattr(signal, "SIGKILL", 9):
        need = job.recipe.build_memory_bytes
        takes = f" (it takes about {size(need)})" if need else ""
        return (
            f"The engine's builder was killed, as systems do when memory runs out{takes}; close other programs, "
            "add swap, or take a larger machine."
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    said = _last_line(job.log)
    return f"The engine's builder crashed ({how}), which is a fault of {job.recipe.module}; it last said: {said}."


def _last_line(log: Path) -> str:
    with suppress(OSError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").split("\n")
        return next((" ".join(line.split()).rstrip(".") for line in reversed(lines) if line.strip()), "nothing")
    return "nothing"
