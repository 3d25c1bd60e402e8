"""Progress: plain lines where nobody watches, one redrawn line on a terminal, warnings always."""

import io

import pytest
from llama_export.progress import Terminal, clock, count_figures, progress_figures


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def a_real_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_log_has_one_line_for_each_stage_at_its_end() -> None:
    log = io.StringIO()
    with Terminal(log) as progress:
        progress.stage("Reading")
        progress.advance(5, 10)
        assert log.getvalue() == ""
        progress.stage("Writing")
    assert log.getvalue() == "Reading  0.0 s\nWriting  0.0 s\n"


def test_a_failed_stage_is_not_called_done() -> None:
    log = io.StringIO()
    with pytest.raises(ValueError), Terminal(log) as progress:
        progress.stage("Reading")
        raise ValueError
    assert log.getvalue() == ""


def test_quiet_leaves_the_warnings() -> None:
    log = io.StringIO()
    with Terminal(log, quiet=True) as progress:
        progress.stage("Reading")
        progress.advance(1, 2)
        progress.warn("a warning")
    assert log.getvalue() == "Warning: a warning\n"


def test_a_terminal_redraws_one_line_with_percent_speed_and_time() -> None:
    screen = Screen()
    with Terminal(screen) as progress:
        progress.stage("Reading")
        progress.advance(250, 1000)
        progress.warn("a warning")
    text = screen.getvalue()
    assert "\r\x1b[KReading   25 %" in text
    assert " left" in text
    assert text.count("\n") == 2
    assert "\x1b[33mWarning:\x1b[0m a warning\n" in text


@pytest.mark.parametrize("quiet", [False, True])
def test_others_may_draw_only_where_it_draws(quiet: bool) -> None:
    assert Terminal(Screen(), quiet=quiet).draws is not quiet
    assert not Terminal(io.StringIO(), quiet=quiet).draws


def test_a_terminal_is_not_flooded() -> None:
    screen = Screen()
    progress = Terminal(screen)
    progress.stage("Reading")
    for done in range(10_000):
        progress.advance(done, 10_000)
    assert screen.getvalue().count("\r") < 20


def test_what_a_checkpoint_says_is_not_obeyed() -> None:
    screen = Screen()
    with Terminal(screen) as progress:
        progress.stage("Opening a\x1b]0;b\x07")
        progress.warn("c\x1b[2Jd")
    left = screen.getvalue().replace("\r\x1b[K", "").replace("\x1b[33m", "").replace("\x1b[0m", "")
    assert "\x1b" not in left
    assert "\x07" not in left
    assert "Warning: c[2Jd\n" in left


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    Terminal(screen).warn("a warning")
    assert screen.getvalue() == "\r\x1b[KWarning: a warning\n"


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (0, 100, 1.0, "  0 %"),
        (50_000_000, 200_000_000, 0.5, " 25 %  100 MB/s  2 s left"),
        (100, 100, 0.0, "100 %"),
        (0, 0, 1.0, "100 %"),
    ],
)
def test_figures(done: int, total: int, seconds: float, text: str) -> None:
    assert progress_figures(done, total, seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.9, "1:00 min"), (605, "10:05 min"), (3725, "1:02:05 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_parts_are_counted_with_the_time_that_is_left() -> None:
    assert count_figures(3, 10, 0, 6.0) == "3 of 10  14 s left"
    assert count_figures(1003, 2000, 1000, 3.0) == "1,003 of 2,000  16:37 min left"
    assert count_figures(2, 10, 2, 5.0) == "2 of 10"
    screen = Screen()
    with Terminal(screen) as progress:
        progress.stage("Scoring")
        progress.count(4.5, 10)
    assert "Scoring  4 of 10" in screen.getvalue()
