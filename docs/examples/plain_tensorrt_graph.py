"""Greedy text from a bundle for TensorRT, on the CPU, with onnxruntime, numpy and tokenizers alone:
python plain_tensorrt_graph.py BUNDLE PROMPT
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

bundle, prompt = Path(sys.argv[1]), sys.argv[2]
manifest = json.loads((bundle / "manifest.json").read_bytes())
shape, context = manifest["shape"], manifest["limits"]["context"]
tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])

names = [f"{n}.{part}" for n in range(shape["layers"]) for part in ("key", "value")]
sizes = (1, shape["kv_heads"], context, shape["head_dim"])
cache = {f"past_key_values.{name}": np.zeros(sizes, shape["cache_dtype"]) for name in names}
outputs = ["logits", *(f"present.{name}" for name in names)]
ids = new = tokenizer.encode(prompt).ids
for _ in range(32):
    first, end = len(ids) - len(new), len(ids)
    feeds = {"input_ids": [new], "position_ids": [range(first, end)], "logits_positions": [[len(new) - 1]]}
    logits, *present = session.run(outputs, {name: np.array(value) for name, value in feeds.items()} | cache)
    for past, rows in zip(cache, present, strict=True):
        if manifest["dialect"] == "trt":
            cache[past] = rows  # the whole cache, with the new rows in their places
        else:
            cache[past][:, :, first:end] = rows  # the new rows alone
    new = [int(logits[0, -1].argmax())]
    if new[0] in manifest["tokens"]["eos"]:
        break
    ids = ids + new
print(tokenizer.decode(ids))
