"""What the builder says while it builds: every line into a file, the errors kept for the user; and how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engine_api import has_progress, trt

UNUSED = "Unused Input"
_MOST_ERRORS = 20


class BuildLog(trt.ILogger):
    """Writes one line a message: seconds since the start, severity, text.

    TensorRT takes the first logger of a process for all that follows, so a process builds once. Messages come from
    threads of the builder, and nothing may be raised into it.
    """

    def __init__(self, path: Path) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.unused: list[str] = []
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._began, self._lock = time.monotonic(), threading.Lock()

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        with self._lock:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)
                del self.errors[_MOST_ERRORS:]  # the first says why, the last that there is no engine
            if msg.startswith(UNUSED):
                self.unused.append(msg.removeprefix(UNUSED).strip(": "))
            if severity != trt.ILogger.Severity.VERBOSE:  # megabytes, for TensorRT's own developers
                self._write(severity.name, msg)

    def note(self, text: str) -> None:
        """A line of our own."""
        with self._lock:
            self._write("NOTE", text)

    def _write(self, severity: str, text: str) -> None:
        self._file.write(f"{time.monotonic() - self._began:8.2f} {severity:7} {text}\n")
        self._file.flush()  # it is read when the process crashed


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0
    inner: float = 0.0
    """The share of the step under way that phases inside it have done."""


@dataclass
class Phases:
    """How far nested phases are; `told` is given a share from 0 to 1 that never falls, and the outermost title.

    `stopped` says whether the build is to end.
    """

    told: Callable[[float], None]
    stopped: Callable[[], bool]
    _open: dict[str, _Phase] = field(default_factory=dict)
    _share: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._open[name] = _Phase(parent, max(1, steps))

    def step(self, name: str, step: int) -> bool:
        """Whether to go on."""
        with self._lock:
            phase = self._open.get(name)
            if phase is not None:
                phase.done, phase.inner = min(phase.steps, max(phase.done, step + 1)), 0.0
                self._tell(name)
        return not self.stopped()

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._open.pop(name, None)
            if phase is None or phase.parent not in self._open:
                return
            self._open[phase.parent].inner = 1.0
            self._tell(phase.parent)

    def _tell(self, name: str) -> None:
        share = 0.0
        at: str | None = name
        while at in self._open:
            phase = self._open[at]
            phase.inner = max(phase.inner, share) if at != name else phase.inner
            share = min(1.0, (phase.done + phase.inner) / phase.steps)
            at = phase.parent
        if share > self._share:
            self._share = share
            self.told(share)


def monitor(phases: Phases) -> Any | None:
    """An IProgressMonitor that tells `phases`, None for a release that tells no progress."""
    if not has_progress():
        return None

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
