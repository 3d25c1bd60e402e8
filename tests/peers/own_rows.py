"""Greedy tokens by our runtime: JSON {"bundle", "prompts", "count"} on stdin, a list of token lists on stdout.

"split": how many tokens of a prompt are given first, before the others. With "full_precision" MatMulNBits does not
round activations to 8 bits, so that all versions of ONNX Runtime agree.
"""

import json
import sys
from pathlib import Path

from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.onnx_file import with_accuracy_level

job = json.load(sys.stdin)
bundle = open_bundle(Path(job["bundle"]))
model = with_accuracy_level(bundle.file("model.onnx").read_bytes(), 0) if job.get("full_precision") else None
backend = OnnxRuntimeBackend(bundle, model=model)
rows = []
for prompt in job["prompts"]:
    backend.rewind(0)
    if split := job.get("split"):
        backend.extend(prompt[:split])
    row = [int(backend.extend(prompt[split:])[-1].argmax())]
    while len(row) < job["count"]:
        row.append(int(backend.step(row[-1]).argmax()))
    rows.append(row)
print(json.dumps(rows))
