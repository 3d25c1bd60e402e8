"""What every command shares: how errors end it, options that several have, and the check for an extra's packages."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from .console import prepare_streams
from .errors import LlamaExportError, did_you_mean
from .names import BUILT_IN, SHORT_BACKENDS
from .optimize.schemes import AUTO, PRECISIONS, choices_told, scheme_named
from .progress import Terminal
from .runtime.threads import MAX_THREADS
from .settings import command_defaults
from .tables import plain

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # which takes no brackets in older releases

_DEBUG = "llama_export.debug"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Precision(_ParamType):
    """The name of a scheme. automatic: or the word that leaves the choice to a budget."""

    name = "precision"

    def __init__(self, *, automatic: bool = False) -> None:
        self._also = (AUTO,) if automatic else ()

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join((*PRECISIONS, *self._also))}|intB-bN]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if text not in self._also and scheme_named(text) is None:
            self.fail(f"{text!r} is none: {choices_told(text, also=self._also)}", param, ctx)
        return text


class TextFile(_ParamType):
    """The path of a text, or the word for our own."""

    name = "file"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"FILE|{BUILT_IN}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        return BUILT_IN if value == BUILT_IN else Path(value)


class Failure(click.ClickException):
    """An error on its way to the user: click prints "Error: message" on stderr and exits with `code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(plain(message))
        self.exit_code = code  # type: ignore[misc]  # click declares it for the class, and reads it from the instance


class Interrupted(Failure):
    """Ctrl-C: one line, and the exit code that shells give for SIGINT."""

    def __init__(self) -> None:
        super().__init__("Interrupted.", 130)

    def show(self, file: Any = None) -> None:
        # A terminal has just echoed ^C without a line end.
        click.echo("\nInterrupted." if sys.stderr.isatty() else "Interrupted.", file=file, err=True)


def _debug_option() -> click.Option:
    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.meta[_DEBUG] = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        envvar="LLAMA_EXPORT_DEBUG",
        help="Show the traceback of an error.",
    )


class Command(click.Command):
    """A command whose options may come from llama-export.toml, unless it says otherwise."""

    def __init__(self, *args: Any, uses_settings: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.uses_settings = uses_settings
        self.params.append(_debug_option())

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asks_for_help = any(arg in ctx.help_option_names for arg in args)
        if self.uses_settings and not asks_for_help:
            ctx.default_map = command_defaults(self, configurable_commands(ctx), Path.cwd())
        return super().parse_args(ctx, args)


def configurable_commands(ctx: click.Context) -> dict[str, click.Command]:
    """The commands whose options may come from llama-export.toml."""
    group = ctx.find_root().command
    commands = group.commands.items() if isinstance(group, click.Group) else ()
    return {name: command for name, command in commands if isinstance(command, Command) and command.uses_settings}


class Group(click.Group):
    """The pipeline of commands: offers close names, and turns our errors into one sentence and an exit code."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def main(self, *args: Any, **kwargs: Any) -> Any:
        prepare_streams()
        return super().main(*args, **kwargs)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            known = self.list_commands(ctx)
            hint = did_you_mean(name, known)
            raise click.UsageError(f"There is no command {name!r}.{hint} Commands: {', '.join(known)}.", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LlamaExportError as error:
            _fail(ctx, str(error), error.exit_code)
        except BrokenPipeError:
            raise  # click ends quietly: the reader of our output has seen enough
        except OSError as error:
            if error.strerror is None:
                raise
            _fail(ctx, f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}.", 1)
        except MemoryError as error:
            _fail(
                ctx,
                f"There is not enough memory here: {str(error) or 'close other programs, or take a larger machine'}.",
                1,
            )
        except KeyboardInterrupt:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            raise Interrupted from None


def _fail(ctx: click.Context, message: str, code: int) -> NoReturn:
    if ctx.meta.get(_DEBUG):
        traceback.print_exc()
    raise Failure(message, code) from None


def echo_lines(lines: Iterable[str], *, err: bool = False) -> None:
    """Print lines for people, on stdout or stderr; parts of them may come from a checkpoint or a bundle."""
    click.echo("\n".join(map(plain, lines)), err=err)


def json_option(function: _Function) -> _Function:
    """The flag `--json` as the argument `as_json`: the result as one JSON document on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def quiet_option(function: _Function) -> _Function:
    """The flag `--quiet`: nothing on stderr but warnings and errors."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress, only warnings and errors.")(function)


def threads_option(function: _Function) -> _Function:
    """The option `--threads` as the argument `threads`, which is None where it is not given."""
    threads = click.IntRange(1, MAX_THREADS)
    return click.option("--threads", type=threads, help="To compute with; default: the physical cores.")(function)


def backend_options(function: _Function) -> _Function:
    """The options `--backend`, whose short names are written out, and `--engine-dir`: what computes a bundle here."""

    def written_out(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
        return value if value is None else SHORT_BACKENDS.get(value, value)

    backend = click.option(
        "--backend",
        metavar="NAME",
        callback=written_out,
        help="What computes: onnxruntime, tensorrt or tensorrt-rtx; default: the bundle's own, else onnxruntime.",
    )
    return backend(engine_dir_option(function))


def on_terminal() -> bool:
    """Whether somebody can be asked, and can answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def offer_engine(path: Path, engine_dir: Path | None) -> None:
    """On a terminal, ask whether to build the engine that a bundle can have here and has not yet; building takes long,
    so it never begins unasked.
    """
    if not on_terminal():
        return
    from .runtime.bundle import open_bundle  # noqa: PLC0415

    bundle = open_bundle(path)
    if bundle.manifest.engine is None:
        return
    from .engine_report import build_and_verify, can_be_built, lines  # noqa: PLC0415

    if can_be_built(bundle, engine_dir) and click.confirm(
        "This device can have an engine, which is not built yet. Build and verify it now? It takes minutes, and until "
        "then the CPU computes.",
        err=True,
    ):
        with Terminal() as progress:
            made = build_and_verify(bundle, progress, engine_dir=engine_dir)
        echo_lines(lines(made), err=True)


def engine_dir_option(function: _Function) -> _Function:
    """The option `--engine-dir`."""
    folder = click.Path(path_type=Path)
    return click.option("--engine-dir", type=folder, help="Where engines are kept; default: the user's cache folder.")(
        function
    )


def need_build_machine() -> None:
    """Raise LlamaExportError where building does not work at all, whatever is installed."""
    if os.name == "posix" and sys.version_info >= (3, 11):
        return
    raise LlamaExportError(
        f"Building needs Linux or macOS and Python 3.11 or newer, but this is {platform.system()} with Python "
        f"{platform.python_version()}; build on another machine and copy the bundle here."
    )


def need_extra(extra: str, modules: Iterable[str], purpose: str) -> None:
    """Raise LlamaExportError with the pip command unless every one of `modules`, which `extra` installs, is here."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise LlamaExportError(
            f"{purpose} needs packages that are not installed here ({', '.join(missing)}): "
            f"run `pip install 'llama-export[{extra}]'`."
        )
