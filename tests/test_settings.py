"""llama-export.toml: what it may say, what wins, and how it is refused."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from llama_export.cli import main
from llama_export.cli_support import Command, Group
from llama_export.settings import FILE_NAME, command_defaults, settings_problem


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> None:
    (folder / FILE_NAME).write_text(text)


def two_commands(seen: list[dict[str, Any]]) -> click.Group:
    """A group whose commands share options and only note what they were called with."""

    @click.group(cls=Group)
    def group() -> None:
        pass

    @group.command()
    @click.option("-m", "--model", required=True)
    @click.option("--precision", type=click.Choice(("fp16", "int4")))
    @click.option("--max-new-tokens", type=click.IntRange(min=1), default=64)
    @click.option("--reference/--no-reference", default=True)
    @click.option("--adapter", multiple=True)
    @click.option("--output", type=click.Path(path_type=Path))
    def make(**options: Any) -> None:
        seen.append(options)

    @group.command()
    @click.option("--max-new-tokens", type=int)
    @click.option("--temperature", type=float)
    @click.option("--quiet", is_flag=True)
    def play(**options: Any) -> None:
        seen.append(options)

    @group.command(cls=Command, uses_settings=False)
    @click.option("--model")
    def aside(**options: Any) -> None:
        seen.append(options)

    return group


def call(arguments: str) -> tuple[dict[str, Any], str]:
    """What a command was called with, or nothing, and what was printed on stderr."""
    seen: list[dict[str, Any]] = []
    result = CliRunner().invoke(two_commands(seen), arguments.split())
    assert result.exit_code == (0 if seen else 2)
    return (seen or [{}])[0], result.stderr


def test_without_a_file_only_the_command_line_counts(folder: Path) -> None:
    options, _ = call("make --model a")
    assert (options["model"], options["max_new_tokens"]) == ("a", 64)


def test_a_key_counts_for_every_command_that_has_the_option(folder: Path) -> None:
    write(folder, 'model = "a"\nmax-new-tokens = 7\ntemperature = 1')
    assert call("make")[0]["max_new_tokens"] == 7
    assert call("make")[0]["model"] == "a"
    assert call("play")[0] == {"max_new_tokens": 7, "temperature": 1.0, "quiet": False}


def test_a_table_wins_over_the_top_and_the_command_line_over_both(folder: Path) -> None:
    write(folder, 'model = "a"\nmax-new-tokens = 7\n[make]\nmax-new-tokens = 8\nprecision = "int4"')
    assert call("make")[0]["max_new_tokens"] == 8
    assert call("play")[0]["max_new_tokens"] == 7
    options, _ = call("make --max-new-tokens 9 --precision fp16 -m b")
    assert (options["max_new_tokens"], options["precision"], options["model"]) == (9, "fp16", "b")


def test_flags_lists_and_paths(folder: Path) -> None:
    write(folder, 'model = "a"\nno-reference = true\nadapter = ["x", "y"]\noutput = "bundles/one"\nquiet = true')
    options, _ = call("make")
    assert (options["reference"], options["adapter"]) == (False, ("x", "y"))
    assert options["output"] == Path("bundles/one")
    assert call("play")[0]["quiet"] is True
    write(folder, 'model = "a"\nreference = false')
    assert call("make")[0]["reference"] is False


def test_a_command_may_keep_out_of_it(folder: Path) -> None:
    write(folder, "this = is not TOML")
    assert call("aside")[0] == {"model": None}


def test_help_is_shown_whatever_the_file_says(folder: Path) -> None:
    write(folder, "this = is not TOML")
    result = CliRunner().invoke(two_commands([]), ["make", "--help"])
    assert result.exit_code == 0
    assert "--max-new-tokens" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modle = "a"', "unknown key 'modle'. Did you mean 'model'? Known: adapter, "),
        ("max_new_tokens = 4", "unknown key 'max_new_tokens'. Did you mean 'max-new-tokens'?"),
        ("[play]\nmodel = 'a'", "[play] has an unknown key 'model'."),
        ("[mak]\nmodel = 'a'", "the table [mak] is not a command. Did you mean 'make'? Commands: make, play."),
        ("[aside]\nmodel = 'a'", "the table [aside] is not a command."),
        ("[model]\na = 1", "the table [model] takes a value, not a table."),
        ("model = 4", "model is 4, but it must be a string"),
        ("max-new-tokens = '4'", "max-new-tokens is '4', but it must be a whole number"),
        ("max-new-tokens = true", "max-new-tokens is True, but it must be a whole number"),
        ("max-new-tokens = 1.5", "max-new-tokens is 1.5, but it must be a whole number"),
        ("max-new-tokens = 0", "max-new-tokens: 0 is not in the range x>=1."),
        ("precision = 'int5'", "precision: 'int5' is not one of 'fp16', 'int4'."),
        ("reference = 'no'", "reference is 'no', but it must be true or false"),
        ("adapter = 'x'\nadapter = 'y'", "is not a TOML file"),
        ("adapter = [1]", "adapter is 1, but it must be a list, each item a string"),
        ("model = ", "is not a TOML file"),
    ],
)
def test_what_is_wrong_is_refused_in_one_sentence(folder: Path, text: str, message: str) -> None:
    write(folder, text)
    options, stderr = call("make --model a")
    assert options == {}
    assert message in stderr
    assert FILE_NAME in stderr
    assert stderr.startswith("Error: ")
    assert "Traceback" not in stderr


def test_a_file_of_another_encoding_or_an_endless_one_is_refused(folder: Path) -> None:
    (folder / FILE_NAME).write_bytes(b"model = '\xff'")
    assert "is not a TOML file" in call("make")[1]
    (folder / FILE_NAME).write_bytes(b"#" * (1 << 21))
    assert "larger than" in call("make")[1]


def test_values_of_other_commands_do_not_disturb_but_the_doctor_sees_them(folder: Path) -> None:
    write(folder, 'model = "a"\n[play]\ntemperature = "hot"')
    assert call("make")[0]["model"] == "a"
    group = two_commands([])
    commands = {name: group.commands[name] for name in ("make", "play")}
    assert "temperature is 'hot', but it must be a number" in (settings_problem(commands, folder) or "")
    write(folder, 'model = "a"')
    assert settings_problem(commands, folder) is None


def test_every_option_of_every_real_command_may_be_given(folder: Path) -> None:
    commands = {name: command for name, command in main.commands.items() if name != "doctor"}
    for command in commands.values():
        assert command_defaults(command, commands, folder) == {}
