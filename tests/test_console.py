"""Standard streams of every kind. What concerns Windows runs against stand-ins: none of it ran there."""

from __future__ import annotations

import ctypes
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from llama_export.console import obeys_escapes, prepare_streams, printable
from llama_export.runtime import terminal

ESCAPES = 0x0004


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 7


class Console:
    """Stands in for kernel32: a console in a mode, that knows escape sequences or not; mode None is no console."""

    def __init__(self, mode: int | None, *, knows: bool) -> None:
        self.mode, self.knows, self.handles = mode, knows, set[int | None]()

    def GetConsoleMode(self, handle: Any, mode: Any) -> int:  # noqa: N802
        self.handles.add(handle.value)
        mode._obj.value = self.mode or 0
        return int(self.mode is not None)

    def SetConsoleMode(self, handle: Any, mode: Any) -> int:  # noqa: N802
        self.handles.add(handle.value)
        if self.knows:
            self.mode = mode.value
        return int(self.knows)


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.delenv("TERM", raising=False)
    return monkeypatch


def code_page(content: bytes = b"", *, screen: bool = False) -> io.TextIOWrapper:
    """A stream as Python opens it on a western Windows where its output goes to a file."""
    stream = io.TextIOWrapper(io.BytesIO(content), encoding="cp1252", newline="")
    if screen:
        stream.isatty = lambda: True  # type: ignore[method-assign]
    return stream


def written(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    return stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("mode", "knows", "obeys"),
    [(0x0003, True, True), (0x0007, True, True), (0x0003, False, False), (None, True, False)],
)
def test_a_windows_console_is_asked_to_obey(
    mode: int | None, knows: bool, obeys: bool, on_windows: pytest.MonkeyPatch
) -> None:
    console = Console(mode, knows=knows)
    on_windows.setattr(ctypes, "WinDLL", {"kernel32": console}.__getitem__, raising=False)
    on_windows.setitem(sys.modules, "msvcrt", SimpleNamespace(get_osfhandle=lambda number: number << 40))
    assert obeys_escapes(Screen()) is obeys
    assert console.handles == {7 << 40}
    if obeys:
        assert console.mode == 3 | ESCAPES


def test_a_file_or_a_dumb_terminal_obeys_nothing(on_windows: pytest.MonkeyPatch) -> None:
    assert not obeys_escapes(io.StringIO())
    on_windows.setenv("TERM", "dumb")
    assert not obeys_escapes(Screen())


def test_elsewhere_a_terminal_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert obeys_escapes(Screen())


def test_what_an_encoding_lacks_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = code_page()
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    print("日本 Größe", file=sys.stdout)
    assert written(stream) == "?? Größe\n".encode("cp1252")


def test_files_and_pipes_are_utf_8_on_windows(on_windows: pytest.MonkeyPatch) -> None:
    stream = code_page()
    on_windows.setattr(sys, "stdout", stream)
    on_windows.setattr(sys, "stdin", code_page("日本".encode()))
    prepare_streams()
    print("日本", end="", file=sys.stdout)
    assert written(stream) == "日本".encode()
    assert sys.stdin.read() == "日本"


def test_a_console_and_a_chosen_encoding_stay_as_they_are(on_windows: pytest.MonkeyPatch) -> None:
    on_windows.setattr(sys, "stdout", code_page(screen=True))
    on_windows.setattr(sys, "stdin", code_page(screen=True))
    on_windows.setattr(sys, "stderr", code_page(screen=True))
    prepare_streams()
    assert sys.stdout.encoding == "cp1252"
    on_windows.setattr(sys, "stdout", code_page())
    on_windows.setenv("PYTHONIOENCODING", "cp1252")
    prepare_streams()
    assert sys.stdout.encoding == "cp1252"


def test_streams_that_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    prepare_streams()
    print("日本")
    assert sys.stdin.read() == ""


def test_json_keeps_what_stdout_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printable("Größe", code_page())
    assert not printable("日本", code_page())
    assert terminal._json({"text": "日本"}) == '{"text": "日本"}'
    monkeypatch.setattr(sys, "stdout", code_page())
    assert terminal._json({"text": "日本"}) == '{"text": "\\u65e5\\u672c"}'
    assert terminal._json({"text": "Größe"}) == '{"text": "Größe"}'
