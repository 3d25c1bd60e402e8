"""The `llama-export` command, in this process and as a child."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result
from llama_export.cli import main


def call(*arguments: object) -> Result:
    """Run the command in this process; quick, as what it imports is there already."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def environment(**changes: str) -> dict[str, str]:
    """This process' environment without what would lead a child to the network or to somebody's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "LLAMA_"))}
    return kept | {"HF_HUB_OFFLINE": "1"} | changes


def start(*arguments: object, cwd: Path, **changes: str) -> subprocess.Popen[str]:
    """Start the command as a child in the folder `cwd`, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_export", *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(**changes),
    )


def spawn(*arguments: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a child to its end."""
    with start(*arguments, cwd=cwd, **changes) as child:
        output, errors = child.communicate(timeout=300)
    return subprocess.CompletedProcess(child.args, child.returncode, output, errors)
