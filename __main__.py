"""`python -m llama_export`: the same as the `llama-export` command."""

from .cli import main

main()
