"""Greedy tokens by optimum-onnx: JSON {"bundle", "prompts", "count"} on stdin, a list of token lists on stdout.

Each prompt runs alone: transformers pads batches on the left, which GroupQueryAttention's lengths cannot express.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found, unused-ignore]

job = json.load(sys.stdin)
model = ORTModelForCausalLM.from_pretrained(job["bundle"])
rows = []
for prompt in job["prompts"]:
    result = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=job["count"],
        do_sample=False,
    )
    rows.append(result[0, len(prompt) :].tolist())
print(json.dumps(rows))
