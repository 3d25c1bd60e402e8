"""Weights stream: a build's peak memory is that of its tools, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llama_export.export.config import expected_tensors
from support.command import environment
from support.hf_models import write_json, write_llama_folder

MOST_ABOVE_TOOLS = 150
"""MB that a build of any size may take beyond a build of nothing."""
MOST_WITH_QUALITY = 550
"""The same where it also measures what quantisation costs, on 2,048 tokens: their logits and hidden states, two copies
of a decoder layer, and before these the bundle as it runs.
"""

CHILD = """
import sys
from pathlib import Path
from llama_export.cli import main

main(sys.argv[1:], standalone_mode=False)
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


def write_large_folder(path: Path, **sizes: int) -> int:
    """A checkpoint in bfloat16, written without holding it: every tensor repeats the same random numbers. Returns its
    number of parameters.
    """
    write_llama_folder(path)
    config: dict[str, Any] = json.loads((path / "config.json").read_text()) | sizes
    write_json(path / "config.json", config)
    values = np.random.default_rng(0).standard_normal(1 << 20) * 0.02
    tile = values.astype(ml_dtypes.bfloat16).tobytes()
    header: dict[str, Any] = {}
    end = 0
    for name, shape in expected_tensors(config).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            start, stop = entry["data_offsets"]
            whole, rest = divmod(stop - start, len(tile))
            for _ in range(whole):
                file.write(tile)
            file.write(tile[:rest])
    return end // 2


def peak_of_build(folder: Path, output: Path, *options: str) -> float:
    """Peak resident memory in MB of a build to int4 in a process of its own."""
    arguments = ["build", "-m", folder, "-t", "cpu", "-o", output, "--precision", "int4", "--no-reference", "--quiet"]
    arguments += [*options, "--force"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder.parent,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_build_does_not_hold_the_model(tmp_path: Path) -> None:
    tools = peak_of_build(write_llama_folder(tmp_path / "small"), tmp_path / "small-out", "--no-quality")
    count = write_large_folder(
        tmp_path / "large",
        vocab_size=45_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    )
    assert count * 4 > 600e6
    peak = peak_of_build(tmp_path / "large", tmp_path / "large-out", "--no-quality")
    measured = peak_of_build(tmp_path / "large", tmp_path / "large-out")
    (tmp_path / "large" / "model.safetensors").unlink()
    print(f"tools {tools:.0f} MB, a model of {count * 4 / 1e6:.0f} MB in float32 {peak:.0f}, {measured:.0f} MB")
    assert peak < tools + MOST_ABOVE_TOOLS
    assert measured < tools + MOST_WITH_QUALITY
