"""`llama-export.toml` in the current folder: defaults for the options of every command.

Keys are the options as they are written, without the dashes in front (`max-new-tokens = 64`, `no-reference = true`).
At the top level a key counts for every command that has the option; in a table named after a command (`[build]`) it
counts for that command alone, and wins. What stands on the command line wins over both. A relative path is relative to
the file, which is the current folder. Unknown keys are refused; `max_new_tokens` is one, not another spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .errors import UsageError, did_you_mean
from .targets.toml_file import read_toml

FILE_NAME = "llama-export.toml"

# What click's types accept from TOML, and how to say it.
TOML_TYPES: Mapping[type[Any], tuple[str, tuple[type, ...]]] = {
    click.types.BoolParamType: ("true or false", (bool,)),
    click.types.IntParamType: ("a whole number", (int,)),
    click.types.FloatParamType: ("a number", (int, float)),
}
TEXT: tuple[str, tuple[type, ...]] = ("a string", (str,))


def command_defaults(command: click.Command, commands: Mapping[str, click.Command], folder: Path) -> dict[str, Any]:
    """The defaults that `folder`'s settings give for `command`, by parameter name; empty where there is no such file.

    Raises UsageError for an unknown key or table in any part of the file, and for a wrong value among those it returns.
    """
    path = folder / FILE_NAME
    settings = read_toml(path) if path.exists() else {}
    tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
    top = {key: value for key, value in settings.items() if key not in tables}
    everywhere = {name for known in commands.values() for name in options_of(known)}
    for key, table in tables.items():
        if key not in commands:
            what = "takes a value, not a table" if key in everywhere else "is not a command"
            hint = did_you_mean(key, commands)
            raise UsageError(f"{path}: the table [{key}] {what}.{hint} Commands: {', '.join(sorted(commands))}.")
        _refuse_unknown(table, set(options_of(commands[key])), f"{path}: [{key}]")
    _refuse_unknown(top, everywhere, f"{path}")
    own_options = options_of(command)
    chosen = {key: value for key, value in top.items() if key in own_options}
    chosen |= tables.get(command.name or "", {})
    return dict(_default(own_options[key], key, value, path) for key, value in chosen.items())


def settings_problem(commands: Mapping[str, click.Command], folder: Path) -> str | None:
    """What is wrong with `folder`'s settings for any command, as one sentence; None when they are right or absent."""
    try:
        for command in commands.values():
            command_defaults(command, commands, folder)
    except UsageError as error:
        return str(error)
    return None


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options that settings may give, by their long names without dashes; for on/off options both names."""
    options = {}
    for option in command.params:
        if isinstance(option, click.Option) and not option.is_eager:
            names = [name for name in (*option.opts, *option.secondary_opts) if name.startswith("--")]
            options.update({name[2:]: option for name in names})
    return options


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UsageError(f"{where} has an unknown key {key!r}.{hint} Known: {', '.join(sorted(known))}.")


def _default(option: click.Option, key: str, value: Any, path: Path) -> tuple[str, Any]:
    """The parameter's name and the value as click would have read it, checked like one from the command line."""
    described, types = next((entry for kind, entry in TOML_TYPES.items() if isinstance(option.type, kind)), TEXT)
    values = value if option.multiple and isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, types) or (isinstance(item, bool) and bool not in types):
            listed = "a list, each item " if option.multiple else ""
            raise UsageError(f"{path}: {key} is {item!r}, but it must be {listed}{described}.")
        try:
            option.type.convert(item, option, None)
        except click.BadParameter as error:
            raise UsageError(f"{path}: {key}: {error.message}") from error
    turned_off = f"--{key}" in option.secondary_opts
    final = [not item for item in values] if turned_off else values
    return option.name or key, final if option.multiple else final[0]
