"""The `llama-export` command: argument handling and progress, nothing else."""

from __future__ import annotations

import click

from . import __version__


@click.group()
@click.version_option(__version__, prog_name="llama-export")
def main() -> None:
    """Turn a Llama checkpoint into a bundle that a device runs without PyTorch, and prove it there."""
