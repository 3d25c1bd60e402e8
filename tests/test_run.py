"""`llama-export run`: what goes to stdout and what to stderr, JSON, conversations, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from llama_export.cli import main
from llama_export.runtime import terminal
from llama_export.runtime.generate import Stream
from support.tiny_bundle import random_llama, write_bundle

pytest.importorskip("onnxruntime", reason="a bundle needs ONNX Runtime")

KEYS = [
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "reused_tokens",
    "new_tokens",
    "load_seconds",
    "first_token_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "model",
    "adapter",
    "backend",
    "threads",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("run") / "bundle", random_llama(6)).path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def run(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, args)], input=stdin)


def answer(*args: object, stdin: str | None = None) -> dict[str, Any]:
    result = run(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_text_to_stdout_and_figures_to_stderr(folder: Path) -> None:
    result = run(folder, "Once", "--max-new-tokens", 5, "--threads", 1)
    assert result.exit_code == 0
    assert result.stdout == answer(folder, "Once", "--max-new-tokens", 5)["text"] + "\n"
    assert "[prompt 5 tokens at " in result.stderr
    assert "ended by length]" in result.stderr
    assert run(folder, "Once", "--max-new-tokens", 5, "--quiet").stderr == ""


def test_json_has_stable_keys(folder: Path) -> None:
    value = answer(folder, "Once", "--max-new-tokens", 5, "--threads", 1)
    assert list(value) == KEYS
    assert (value["prompt_tokens"], value["new_tokens"], value["threads"]) == (5, 5, 1)
    assert value["model"] == "tests/tiny"


@pytest.mark.parametrize("stdin", ["Once", "Once\n"])
def test_prompt_from_stdin(folder: Path, stdin: str) -> None:
    """`echo` ends its line, which is no part of the text."""
    assert answer(folder, "-", stdin=stdin)["token_ids"] == answer(folder, "Once")["token_ids"]


@pytest.mark.parametrize("args", [("-",), ("--chat",), ("-", "--chat")])
def test_stdin_that_is_no_text(folder: Path, args: tuple[str, ...]) -> None:
    result = run(folder, *args, stdin=b"caf\xe9\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: What stdin gives is not valid utf-8; give the text as UTF-8.\n"


def test_options_reach_the_sampler(folder: Path) -> None:
    sampled = ("--temperature", 2, "--top-k", 100, "--top-p", 0.99, "--min-p", 0.001, "--repetition-penalty", 1.1)
    first = answer(folder, "x", *sampled, "--seed", 1)["token_ids"]
    assert answer(folder, "x", *sampled, "--seed", 1)["token_ids"] == first
    assert answer(folder, "x", *sampled, "--seed", 2)["token_ids"] != first
    assert answer(folder, "x")["token_ids"] != first


def test_stop_strings(folder: Path) -> None:
    whole = answer(folder, "Once", "--max-new-tokens", 20)["text"]
    middle = next(char for char in whole[3:] if char != "�")
    value = answer(folder, "Once", "--max-new-tokens", 20, "--stop", "never said", "--stop", middle)
    assert value["finish_reason"] == "stop_string"
    assert value["text"] == whole.split(middle)[0]


def test_one_turn_of_chat(folder: Path) -> None:
    value = answer(folder, "Hi", "--chat", "--system", "Be odd.", "--max-new-tokens", 3)
    assert value["prompt_tokens"] == len("_[system]Be odd._[user]Hi_[assistant]")


def test_a_conversation_from_a_pipe(folder: Path) -> None:
    lines = "a\n\n/reset\nb\n/nonsense\nc\n/exit\nnever\n"
    result = run(folder, "--chat", "--json", "--max-new-tokens", 3, stdin=lines)
    assert result.exit_code == 0
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["reused_tokens"] > 0 for turn in turns] == [False, False, True]
    assert "no command /nonsense" in result.stderr
    assert turns[0]["prompt_tokens"] == len("_[user]a_[assistant]")


def test_a_close_command_is_offered(folder: Path) -> None:
    assert "Did you mean '/exit'?" in run(folder, "--chat", stdin="/exti\n").stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "nothing to continue; give a PROMPT"),
        (("x", "--system", "y"), 2, "add --chat"),
        (("x", "--top-p", 0.5), 2, "add --temperature"),
        (("x", "--temperature", -1), 2, "temperature must be 0, or from 0.001"),
        (("x", "--temperature", 1, "--top-p", 7), 2, "top_p must be above 0"),
        (("x", "--max-new-tokens", 0), 2, "max-new-tokens"),
        (("x", "--tempratur", 1), 2, "--temperature"),
        (("x" * 64,), 2, "has 65 tokens, but the context of this bundle is 64"),
    ],
)
def test_mistakes(folder: Path, args: tuple[object, ...], code: int, message: str) -> None:
    result = run(folder, *args)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_no_bundle_and_no_template(tmp_path: Path) -> None:
    result = run(tmp_path / "absent", "x")
    assert (result.exit_code, "There is no bundle" in result.stderr) == (2, True)
    plain = write_bundle(tmp_path / "plain", random_llama(6), template=None).path
    for args in ([plain, "x", "--chat"], [plain, "--chat"]):
        result = run(*args, stdin="hello\n")
        assert result.exit_code == 1
        assert "has no chat template" in result.stderr


def test_a_damaged_bundle_is_noticed(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", random_llama(6)).path
    assert run(path, "x", "--max-new-tokens", 1).exit_code == 0
    weights = path / "model.onnx.data"
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[1000] ^= 64
    weights.write_bytes(data)
    result = run(path, "x")
    assert result.exit_code == 1
    assert "model.onnx.data is damaged" in result.stderr
    data[1000] ^= 64
    weights.write_bytes(data)
    assert run(path, "x", "--max-new-tokens", 1).exit_code == 0
    data[1000] ^= 64
    weights.write_bytes(data)
    stamped = weights.stat()
    assert stamped.st_ino == before.st_ino
    assert run(path, "x", "--check-hashes").exit_code == 1


class InterruptedStream:
    """Raises KeyboardInterrupt at the third piece of every text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest, self.count = Stream.__next__, 0

        def interrupted(stream: Stream) -> Any:
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt
            return honest(stream)

        monkeypatch.setattr(Stream, "__next__", interrupted)


def test_ctrl_c_shows_what_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    InterruptedStream(monkeypatch)
    result = run(folder, "Once", "--json")
    assert result.exit_code == 130
    value = json.loads(result.stdout)
    assert value["finish_reason"] == "interrupted"
    assert value["text"] != ""


def test_ctrl_c_ends_an_answer_but_not_the_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    InterruptedStream(monkeypatch)
    result = run(folder, "--chat", "--json", "--max-new-tokens", 9, stdin="a\nb\n")
    assert result.exit_code == 0
    reasons = [json.loads(line)["finish_reason"] for line in result.stdout.splitlines()]
    assert reasons == ["interrupted", "length"]


class FakeTerminal:
    """Stands in for sys.stdin: a person who types these lines, then Ctrl-D."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
        left = iter(lines)

        def typed(prompt: str) -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", typed)
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)


def test_a_person_sees_an_error_and_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama_export.runtime import GenerationOptions, load

    FakeTerminal(monkeypatch, ["x" * 100, "", "b"])
    request = terminal.RunRequest(chat=True, options=GenerationOptions(2))
    terminal.run(load(folder, threads=1), request)
    captured = capsys.readouterr()
    assert "Error: The prompt has" in captured.err
    assert "answer 2 tokens" in captured.err
    assert "/reset" in captured.err


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[31mb\x07\tc\n\x9b\x7fé"
    assert terminal._printable(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal._printable(text) == "a[31mb\tc\né"


def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    command = f'"{sys.executable}" -m llama_export run "{folder}" Once --max-new-tokens 50 | head -c 1'
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
