"""The command line as a user meets it: help, errors in one sentence, exit codes, and what goes to which stream."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from llama_export import __version__, cli
from llama_export.cli_support import Group, need_build_machine
from llama_export.errors import LlamaExportError, UsageError
from llama_export.progress import Progress


def call(*arguments: str, environment: dict[str, str] | None = None) -> Result:
    return CliRunner(env=environment).invoke(cli.main, list(arguments))


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The real builder replaced by one that notes its options and makes nothing; works in an empty folder."""
    seen: list[Any] = []

    def build(options: Any, *, progress: Progress) -> Any:
        seen.append(options)
        progress.stage("Reading")
        progress.warn("The licence is unknown.")
        return SimpleNamespace(lines=lambda: ["made it"], to_json=lambda: {"bundle": str(options.output)})

    module = ModuleType("llama_export.pipeline")
    module.__dict__["build"] = build
    monkeypatch.setitem(sys.modules, "llama_export.pipeline", module)
    monkeypatch.setattr(cli, "need_build_machine", lambda: None)
    monkeypatch.setattr(cli, "need_extra", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return seen


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for name in cli.main.commands:
        assert f"\n  {name} " in result.output


def test_version() -> None:
    assert call("--version").output == f"llama-export, version {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["targets"]])
def test_start_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy', 'tokenizers', 'huggingface_hub'}"
    script = f"""
import sys
from llama_export.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert end.code == 0
print(sorted({heavy} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[]\n"


def test_an_unknown_command_is_offered_the_nearest() -> None:
    result = call("bild")
    assert result.exit_code == 2
    assert "There is no command 'bild'. Did you mean 'build'? Commands: " in result.stderr


def test_an_unknown_option_is_offered_the_nearest() -> None:
    result = call("build", "--presicion", "int4")
    assert result.exit_code == 2
    assert "--presicion" in result.stderr
    assert "'--precision'" in result.stderr


@pytest.mark.parametrize("missing", ["--model", "--target", "--output"])
def test_build_says_which_option_is_missing(builds: list[Any], missing: str) -> None:
    given = {"--model": "m", "--target": "cpu", "--output": "o"}
    result = call("build", *(word for name, value in given.items() if name != missing for word in (name, value)))
    assert result.exit_code == 2
    assert f"'{missing}'" in result.stderr


def test_build_passes_its_options_on(builds: list[Any]) -> None:
    result = call(
        *("build", "-m", "m", "-t", "cpu", "-o", "out", "--precision", "int8", "--context", "100", "--batch", "2"),
        *("--revision", "r", "--token", "t", "--cache-dir", "c", "--no-reference", "--force"),
        *("--head-precision", "fp16", "--adapter", "a", "--adapter", "b:0.5", "--adapter-mode", "runtime"),
        *("--any-base", "--jetpack", "6.1", "--backend", "tensorrt", "--calibrate", "text", "--prompts", "asked"),
        *("--method", "search", "--cache-precision", "int8", "--no-quality", "--quality-text", "windows"),
    )
    assert result.exit_code == 0
    assert vars(builds[0]) == {
        **{"model": "m", "target": "cpu", "output": Path("out"), "precision": "int8", "context": 100, "batch": 2},
        **{"revision": "r", "token": "t", "cache_dir": Path("c"), "reference": False, "force": True},
        **{"head_precision": "fp16", "adapters": ("a", "b:0.5"), "adapter_mode": "runtime", "any_base": True},
        **{"jetpack": "6.1", "backend": "tensorrt", "calibrate": Path("text"), "prompts": Path("asked")},
        **{"method": "search", "cache_precision": "int8", "quality": False, "quality_text": Path("windows")},
        **{"budget": None, "max_kl": None},
    }


def test_build_leaves_open_what_was_not_said(builds: list[Any]) -> None:
    call("build", "-m", "m", "-t", "cpu", "-o", "out")
    assert vars(builds[0]) == {
        **{"model": "m", "target": "cpu", "output": Path("out"), "precision": None, "context": None, "batch": 1},
        **{"revision": None, "token": None, "cache_dir": None, "reference": True, "force": False},
        **{"head_precision": None, "adapters": (), "adapter_mode": "merge", "any_base": False},
        **{"jetpack": None, "backend": None, "calibrate": None, "prompts": None},
        **{"method": None, "cache_precision": None, "quality": True, "quality_text": None},
        **{"budget": None, "max_kl": None},
    }


@pytest.mark.parametrize(("word", "text"), [("built-in", "built-in"), ("./built-in", Path("built-in"))])
def test_the_text_may_be_our_own(builds: list[Any], word: str, text: object) -> None:
    call("build", "-m", "m", "-t", "cpu", "-o", "out", "--precision", "int4-b64-zeros", "--calibrate", word)
    assert (builds[0].calibrate, builds[0].precision) == (text, "int4-b64-zeros")


def test_a_budget_may_choose_the_weights_but_not_those_of_the_head_alone(builds: list[Any]) -> None:
    call("build", "-m", "m", "-t", "cpu", "-o", "out", "--precision", "auto")
    assert builds[0].precision == "auto"
    result = call("build", "-m", "m", "-t", "cpu", "-o", "out", "--head-precision", "auto")
    assert (result.exit_code, len(builds)) == (2, 1)


def test_a_name_that_is_no_scheme_is_refused_with_families_and_the_nearest() -> None:
    result = call("build", "-m", "m", "-t", "cpu", "-o", "out", "--precision", "int4-b46")
    assert result.exit_code == 2
    told = ("'int4-b46' is none", "w8a8, auto, or int4-bN", "N = 16, 32, 64, 128, 256", "Did you mean 'int4-b64'?")
    for part in told:
        assert part in result.stderr
    assert len(result.stderr) < 700


def test_a_configured_folder_needs_only_the_target(builds: list[Any]) -> None:
    Path("llama-export.toml").write_text('model = "m"\n[build]\noutput = "bundles/m"\ncontext = 512\n')
    assert call("build", "--target", "cpu").exit_code == 0
    assert (builds[0].model, builds[0].target, builds[0].output, builds[0].context) == (
        *("m", "cpu", Path("bundles/m"), 512),
    )


def test_the_bare_words_are_enough_for_a_jetson(builds: list[Any]) -> None:
    Path("llama-export.toml").write_text('model = "meta-llama/Llama-3.2-1B-Instruct"\noutput = "bundle"\n')
    assert call("build", "--target", "jetson-orin").exit_code == 0
    assert (builds[0].target, builds[0].jetpack, builds[0].output) == ("jetson-orin", None, Path("bundle"))


def test_results_go_to_stdout_and_progress_to_stderr(builds: list[Any]) -> None:
    result = call("build", "-m", "m", "-t", "cpu", "-o", "out")
    assert result.stdout == "made it\n"
    assert "Reading" in result.stderr
    quiet = call("build", "-m", "m", "-t", "cpu", "-o", "out", "--quiet", "--json")
    assert json.loads(quiet.stdout) == {"bundle": "out"}
    assert quiet.stderr == "Warning: The licence is unknown.\n"


@pytest.mark.parametrize(("system", "version"), [("nt", (3, 12)), ("posix", (3, 10))])
def test_machines_that_cannot_build_are_told_so(
    monkeypatch: pytest.MonkeyPatch, system: str, version: tuple[int, int]
) -> None:
    monkeypatch.setattr("llama_export.cli_support.os", SimpleNamespace(name=system))
    monkeypatch.setattr("llama_export.cli_support.sys", SimpleNamespace(version_info=version))
    with pytest.raises(LlamaExportError, match=r"needs Linux or macOS and Python 3\.11 or newer, but this is "):
        need_build_machine()


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "need_build_machine", lambda: None)
    monkeypatch.setattr("llama_export.cli_support.importlib.util.find_spec", lambda name: name != "torch" or None)
    result = call("build", "-m", "m", "-t", "cpu", "-o", "out")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Building a bundle needs packages that are not installed here (torch): "
        "run `pip install 'llama-export[build,cpu]'`.\n"
    )


# How an error ends a command


def failing(error: BaseException) -> click.Group:
    @click.group(cls=Group)
    def group() -> None:
        pass

    @group.command()
    def fail() -> None:
        raise error

    return group


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (LlamaExportError("It broke."), 1, "Error: It broke.\n"),
        (UsageError("It is wrong."), 2, "Error: It is wrong.\n"),
        (
            OSError(28, "No space left on device", "out/model.onnx"),
            1,
            "Error: No space left on device: out/model.onnx.\n",
        ),
        (MemoryError(), 1, "Error: There is not enough memory here: close other programs, or take a larger machine.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(error: BaseException, code: int, stderr: str) -> None:
    result = CliRunner().invoke(failing(error), ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", stderr)


@pytest.mark.parametrize(
    ("arguments", "variable"), [(["fail", "--debug"], None), (["--debug", "fail"], None), (["fail"], "1")]
)
def test_debug_shows_the_traceback(arguments: list[str], variable: str | None) -> None:
    runner = CliRunner(env={"LLAMA_EXPORT_DEBUG": variable})
    result = runner.invoke(failing(LlamaExportError("It broke.")), arguments)
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("Error: It broke.\n")


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    result = CliRunner().invoke(failing(ZeroDivisionError("ours")), ["fail"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


TALKATIVE = """
import click
from llama_export.cli_support import Group

@click.group(cls=Group)
def group():
    pass

@group.command()
def talk():
    for number in range(100_000):
        click.echo(f"line {number}")

group()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe of a POSIX system")
def test_a_reader_that_stops_early_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TALKATIVE, "talk"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1


# targets, inspect and doctor, here only as commands


def test_targets_lists_shows_and_speaks_json() -> None:
    assert "jetson-agx-orin-64gb" in call("targets").output
    assert "assumption" in call("targets", "cpu").output
    assert {entry["name"] for entry in json.loads(call("targets", "--json").output)} >= {"cpu", "host", "rtx"}
    assert json.loads(call("targets", "l4", "--json").output)["bandwidth_gbs"] == 300


def test_targets_with_an_unknown_name() -> None:
    result = call("targets", "jetson-orn")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Did you mean 'jetson-orin'?" in result.stderr


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_inspect_refuses_what_is_no_bundle(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "bundle")
    result = call("inspect", str(tmp_path / "bundle"))
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "llama-export build" in result.stderr


def test_doctor_always_ends_well_and_sees_wrong_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama-export.toml").write_text("modle = 1")
    result = call("doctor")
    assert result.exit_code == 0
    assert "unknown key 'modle'. Did you mean 'model'?" in result.output
    assert json.loads(call("doctor", "--json").output)["settings_error"].endswith(".")


def test_an_error_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    result = call("inspect", str(tmp_path / "\x1b[2Ja\x9b"))
    assert result.exit_code == 2
    assert "[2Ja;" in result.stderr
    assert not any(char in result.stderr for char in "\x1b\x9b")


@pytest.mark.parametrize("command", ["run", "verify"])
@pytest.mark.parametrize("threads", ["0", "1025"])
def test_threads_have_one_range(command: str, threads: str) -> None:
    result = call(command, "bundle", "--threads", threads)
    assert result.exit_code == 2
    assert "is not in the range 1<=x<=1024" in result.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_the_shell_closed(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m llama_export targets {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
