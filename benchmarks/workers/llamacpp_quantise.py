"""Quantises a GGUF file by llama.cpp itself, as its tool llama-quantize does.

    llamacpp_quantise.py FILE OUTPUT TYPE [--importance FILE.npz] [--threads N]

TYPE is llama.cpp's name (Q4_K_M). --importance: float32 [columns] by tensor name, the mean square of each column of
what the matrix multiplies, as llama-imatrix measures it.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def importance(file: Path) -> Any:
    """llama.cpp's array of importances, which ends with an entry without a name."""
    entries = [(name.encode(), np.ascontiguousarray(values, np.float32)) for name, values in np.load(file).items()]
    array = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
    for entry, (name, values) in zip(array, entries, strict=False):
        entry.name = name
        entry.data = (ctypes.c_float * values.size)(*values)
        entry.size = values.size
    return array


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("type")
    parser.add_argument("--importance", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    job = parser.parse_args()
    kind = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.type}", None)
    if kind is None:
        print(f"llama.cpp has no type {job.type}", file=sys.stderr)
        return 1
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, job.threads
    if job.importance:
        params.imatrix = importance(job.importance)
    return int(llama_cpp.llama_model_quantize(str(job.file).encode(), str(job.output).encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main())
