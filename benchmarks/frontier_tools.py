"""What makes quantised models for frontier.py: llama-export, onnxruntime-genai, llama.cpp, nvidia-modelopt."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
WORKERS = HERE / "workers"
OURS, GENAI, LLAMACPP, MODELOPT = "llama-export", "onnxruntime-genai", "llama.cpp", "nvidia-modelopt"
GENAI_METHODS = ("default", "rtn", "k_quant", "k_quant_last", "k_quant_mixed")
LLAMACPP_TYPES = ("Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
COUNTED = "counted_bytes.json"
"""In a folder whose weights were quantised and back: the bytes that the tool's own format would take."""
_BESIDE = ("reference", "quality.json", "LICENSE", "NOTICE", "USE_POLICY", "README.md")
"""Files of a model folder that running it does not need."""


@dataclass(frozen=True)
class Original:
    """One model that is quantised: its Hugging Face folder, and a folder for what is made of it once."""

    folder: Path
    work: Path
    threads: int


Make = Callable[[Original, Path], None]
"""Makes the model at a path that does not exist; raises RuntimeError with what the tool said when it fails."""


@dataclass(frozen=True)
class Tool:
    """One way to quantise. `worker` measures what `make` made, in the environment of `python`, which has `package`.

    exact: whether it is also measured with full-precision kernels.
    """

    name: str
    group: str
    python: str
    package: str
    worker: str
    make: Make
    exact: bool = False


def run(command: Sequence[str], threads: int) -> str:
    """Run a command to its end without the net; returns its stdout.

    Raises RuntimeError with the end of what it said when it fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        told = (result.stderr.strip() or result.stdout.strip())[-2000:]
        raise RuntimeError(f"{' '.join(command[:4])} ended with status {result.returncode}:\n{told}")
    return result.stdout


def ours(spec: str, *, exact: bool) -> Tool:
    """A build by its `NAME: OPTIONS`, such as `int4: --precision int4`.

    Raises ValueError for a spec without a name.
    """
    name, colon, options = spec.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"--ours takes 'NAME: OPTIONS', such as 'int4: --precision int4', not {spec!r}")

    def make(original: Original, place: Path) -> None:
        asked = ["-m", str(original.folder), "-o", str(place), "-t", "cpu", "--no-reference", *shlex.split(options)]
        run([sys.executable, "-m", "llama_export", "build", *asked], original.threads)

    return Tool(name.strip(), OURS, sys.executable, "llama-export", "quality_ours.py", make, exact)


def genai(python: str, method: str) -> Tool:
    """onnxruntime-genai's model builder in int4 for the CPU, with a value of its `algo_config`."""

    def make(original: Original, place: Path) -> None:
        folders = ("-m", str(original.folder), "-i", str(original.folder), "-o", str(place))
        options = ("-c", str(original.work / "cache"), "-p", "int4", "-e", "cpu", "--extra_options")
        builder = (python, "-m", "onnxruntime_genai.models.builder")
        run([*builder, *folders, *options, f"algo_config={method}"], original.threads)

    return Tool(f"genai {method}", GENAI, python, "onnxruntime-genai", "quality_genai.py", make)


def llamacpp(python: str, kind: str, importance: Path | None = None) -> Tool:
    """llama.cpp's own quantisation of the float32 GGUF; importance: a text for its importance matrix."""

    def make(original: Original, place: Path) -> None:
        whole = original.work / "original.gguf"
        _once(whole, "gguf_export.py", (str(original.folder), "FILE", "--type", "F32"), original.threads)
        command = [python, str(WORKERS / "llamacpp_quantise.py"), str(whole), str(place), kind]
        if importance is not None:
            matrix = original.work / "importance.npz"
            _once(matrix, "importance.py", (str(original.folder), str(importance), "FILE"), original.threads)
            command += ["--importance", str(matrix)]
        run([*command, "--threads", str(original.threads)], original.threads)

    name = f"llama.cpp {kind}" + (" imatrix" if importance else "")
    return Tool(name, LLAMACPP, python, "llama-cpp-python", "quality_llamacpp.py", make)


def modelopt(python: str, name: str, text: Path) -> Tool:
    """nvidia-modelopt's fake quantisation by one of its configs, calibrated on a text, measured by PyTorch."""

    def make(original: Original, place: Path) -> None:
        worker = str(WORKERS / "modelopt_quantise.py")
        run([python, worker, str(original.folder), str(place), name, "--text", str(text)], original.threads)

    return Tool(f"modelopt {name.removesuffix('_CFG')}", MODELOPT, python, "nvidia-modelopt", "quality_torch.py", make)


def _once(file: Path, script: str, arguments: Sequence[str], threads: int) -> None:
    """Make a file by a script beside this one unless it is there; FILE stands for where it is written meanwhile."""
    if file.exists():
        return
    partial = file.with_name(f"partial-{file.name}")
    named = [str(partial) if word == "FILE" else word for word in arguments]
    run([sys.executable, str(HERE / script), *named], threads)
    partial.rename(file)


def needed_bytes(model: Path) -> int:
    """The bytes of all files that running a model needs: weights, graph, tokenizer, settings."""
    if model.is_file():
        return model.stat().st_size
    counted = model / COUNTED
    if counted.exists():
        return int(json.loads(counted.read_text(encoding="utf-8"))["bytes"])
    files = (path for path in model.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if path.relative_to(model).parts[0] not in _BESIDE)


def measure(
    tool: Tool, model: Path, references: Sequence[Path], threads: int, *, exact: bool
) -> list[dict[str, list[float]]]:
    """The figures of a made model on each text, by its worker. Raises RuntimeError when that fails."""
    python = sys.executable if tool.worker == "quality_torch.py" else tool.python
    command = [python, str(WORKERS / tool.worker), "measure", str(model), *map(str, references)]
    lines = run([*command, "--threads", str(threads), *(["--exact"] if exact else [])], threads).splitlines()
    found: list[dict[str, list[float]]] = [json.loads(line) for line in lines if line.startswith('{"kl"')]
    if len(found) != len(references):
        raise RuntimeError(f"{tool.name} measured {len(found)} of {len(references)} texts")
    return found
