"""Greedy text from a bundle, with onnxruntime, numpy and tokenizers alone: python plain_onnxruntime.py BUNDLE PROMPT"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

bundle, prompt = Path(sys.argv[1]), sys.argv[2]
manifest = json.loads((bundle / "manifest.json").read_bytes())
shape = manifest["shape"]
tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])

empty = np.zeros((1, shape["kv_heads"], 0, shape["head_dim"]), shape["cache_dtype"])
cache = {f"past_key_values.{n}.{part}": empty for n in range(shape["layers"]) for part in ("key", "value")}
ids = new = tokenizer.encode(prompt).ids
for _ in range(32):
    mask = np.ones((1, len(ids)), np.int64)
    feeds = {"input_ids": np.array([new], np.int64), "attention_mask": mask, **cache}
    logits, *present = session.run(None, feeds)  # in the graph's order: logits, then key and value of each layer
    cache = dict(zip(cache, present, strict=True))
    new = [int(logits[0, -1].argmax())]
    if new[0] in manifest["tokens"]["eos"]:
        break
    ids = ids + new
print(tokenizer.decode(ids))
