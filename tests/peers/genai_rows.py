"""Greedy tokens by onnxruntime-genai: JSON {"bundle", "prompts", "count"} on stdin, a list of token lists on stdout.

Prompts are rows of one batch, the shorter ones padded on the right with the pad token, as its own encode_batch does.
"split": how many tokens of the prompt are appended first, before the others (for one row alone).
"""

import json
import sys

import numpy as np
import onnxruntime_genai as og

job = json.load(sys.stdin)
model = og.Model(job["bundle"])
pad = og.Tokenizer(model).pad_token_id
longest = max(map(len, job["prompts"]))
rows = np.array([prompt + [pad] * (longest - len(prompt)) for prompt in job["prompts"]], np.int32)
params = og.GeneratorParams(model)
params.set_search_options(batch_size=len(rows), max_length=longest + job["count"], do_sample=False)
generator = og.Generator(model, params)
if split := job.get("split"):
    generator.append_tokens(rows[:, :split])
generator.append_tokens(rows[:, split:])
new = []
while not generator.is_done():
    generator.generate_next_token()
    new.append(generator.get_next_tokens().tolist())
print(json.dumps([list(row) for row in zip(*new, strict=True)]))
