"""How long work tells what it is doing: results go to stdout, all of this goes to stderr."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

from .console import obeys_escapes
from .tables import plain

REDRAW_SECONDS = 0.1
CLEAR_LINE = "\r\x1b[K"
YELLOW, PLAIN = "\x1b[33m", "\x1b[0m"


class Progress(Protocol):
    """What a long step is given to report to; every method returns at once."""

    @property
    def draws(self) -> bool:
        """Whether it draws on a terminal, so that the bars of others may stand there too."""

    def stage(self, title: str) -> None:
        """Begin a step, and with it end the one before."""

    def advance(self, done_bytes: int, total_bytes: int) -> None:
        """Say how much of the current step's bytes are done; may be called often."""

    def share(self, done: float) -> None:
        """Say how much of the current step is done, from 0 to 1, where it is not counted in bytes."""

    def count(self, done: float, total: int, before: int = 0) -> None:
        """Say how many of the current step's parts, which take equally long, are done; `before` were when it began."""

    def warn(self, text: str) -> None:
        """Say something that the user may want to change."""


class Silent:
    """Reports nothing: the default for callers from Python."""

    draws = False

    def stage(self, title: str) -> None:
        pass

    def advance(self, done_bytes: int, total_bytes: int) -> None:
        pass

    def share(self, done: float) -> None:
        pass

    def count(self, done: float, total: int, before: int = 0) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


@dataclass
class _Stage:
    title: str
    began: float
    drawn: float = 0.0
    total_bytes: int = 0


class Terminal:
    """Writes to a stream: one redrawn line where it is a terminal, one plain line at each stage's end elsewhere.

    As a context manager it ends the last stage: with its time, or, after an error, without calling it done.
    `quiet` leaves only warnings. Colour is used on a terminal unless NO_COLOR is set.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._redraws = obeys_escapes(self._stream)
        self._colours = self._redraws and not os.environ.get("NO_COLOR")
        self._quiet = quiet
        self._stage: _Stage | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._end_stage()
        else:
            self._clear()
            self._stage = None

    @property
    def draws(self) -> bool:
        return self._redraws and not self._quiet

    def stage(self, title: str) -> None:
        self._end_stage()
        if self._quiet:
            return
        self._stage = _Stage(plain(title), time.monotonic())
        self._draw(self._stage.title)

    def advance(self, done_bytes: int, total_bytes: int) -> None:
        stage = self._stage
        if stage is None:
            return
        stage.total_bytes = total_bytes
        now = time.monotonic()
        if self._due(stage, now):
            self._draw(f"{stage.title}  {progress_figures(done_bytes, total_bytes, now - stage.began)}")

    def share(self, done: float) -> None:
        stage = self._stage
        if stage is not None and self._due(stage, now := time.monotonic()):
            self._draw(f"{stage.title}  {share_figures(done, now - stage.began)}")

    def count(self, done: float, total: int, before: int = 0) -> None:
        stage = self._stage
        if stage is not None and self._due(stage, now := time.monotonic()):
            self._draw(f"{stage.title}  {count_figures(done, total, before, now - stage.began)}")

    def warn(self, text: str) -> None:
        label = f"{YELLOW}Warning:{PLAIN}" if self._colours else "Warning:"
        self._line(f"{label} {plain(text)}")

    def _due(self, stage: _Stage, now: float) -> bool:
        """Whether to draw again; if so, it counts as drawn."""
        if not self._redraws or now - stage.drawn < REDRAW_SECONDS:
            return False
        stage.drawn = now
        return True

    def _end_stage(self) -> None:
        stage, self._stage = self._stage, None
        if stage is None:
            return
        seconds = time.monotonic() - stage.began
        speed = f", {stage.total_bytes / 1e6 / seconds:,.0f} MB/s" if stage.total_bytes and seconds > 0.5 else ""
        self._line(f"{stage.title}  {seconds:.1f} s{speed}")

    def _line(self, text: str) -> None:
        self._clear()
        self._write(f"{text}\n")
        if self._stage is not None:
            self._draw(self._stage.title)

    def _draw(self, text: str) -> None:
        if self._redraws:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"{CLEAR_LINE}{text[:width]}")

    def _clear(self) -> None:
        if self._redraws:
            self._write(CLEAR_LINE)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def progress_figures(done_bytes: int, total_bytes: int, seconds: float) -> str:
    """ "42 %  118 MB/s  7 s left" for a step that has moved `done_bytes` of `total_bytes` in `seconds`."""
    percent = f"{100 * done_bytes // total_bytes if total_bytes else 100:3d} %"
    if seconds <= 0 or done_bytes <= 0:
        return percent
    speed = done_bytes / seconds
    return f"{percent}  {speed / 1e6:,.0f} MB/s  {clock((total_bytes - done_bytes) / speed)} left"


def share_figures(done: float, seconds: float) -> str:
    """ "42 %  7 s" for a step of which the share `done` is done after `seconds`; its parts are of unequal length."""
    return f"{int(100 * done):3d} %  {clock(seconds)}"


def count_figures(done: float, total: int, before: int, seconds: float) -> str:
    """ "3 of 10  7 s left" where `done` parts less those `before` took `seconds`."""
    counted = f"{int(done):,} of {total:,}"
    if seconds <= 0 or done <= before:
        return counted
    return f"{counted}  {clock(seconds * (total - done) / (done - before))} left"


def clock(seconds: float) -> str:
    """A duration as "7 s", "3:05 min" or "1:02:03 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
