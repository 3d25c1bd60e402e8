"""A model larger than the memory that recording takes: weights stream, one decoder layer at a time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CHILD = """
import json, resource
import numpy as np
from llama_export.export.families import classes
from llama_export.export.reference import Exact, Original, Samples, StreamedModel
from llama_export.optimize.formats import FP32
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.tensors import SourceTensor
from llama_export.progress import Silent
from llama_export.runtime.proof.reference import Identity

def shapes_of(layers, hidden, ffn, vocab):
    narrow = 2 * (hidden // 8)
    sizes = {"q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden)}
    inner = {f"self_attn.{one}_proj": size for one, size in sizes.items()}
    inner |= {f"mlp.{one}_proj": (ffn, hidden) for one in ("gate", "up")} | {"mlp.down_proj": (hidden, ffn)}
    inner |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}

def tensor(name, shape):
    def read(start, stop):  # made as it is read, so that nothing but the recorder can hold it
        rows = np.random.default_rng(start).standard_normal((stop - start, *shape[1:]), np.float32)
        return rows * np.float32(0.05)
    return SourceTensor(name, shape, "F32", FP32, read)

def size(shapes):
    return sum(int(np.prod(shape)) * 4 for shape in shapes.values())

def model(layers, hidden, ffn, vocab):
    config = classes("llama").config(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, vocab_size=vocab, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=64)
    shapes = shapes_of(layers, hidden, ffn, vocab)
    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    formats = plan_formats(tensors, "int4")
    sides = (Original(tensors), Exact(tensors, formats, "float32"))
    samples = Samples((0,), ((2,),), Identity("0" * 64, "0" * 64, layers, hidden, 8, 2, hidden // 8, vocab))
    StreamedModel(config, tensors, 64, sides).run([[1, 2, 3]], Silent(), samples)
    return size(shapes), size({name: shape for name, shape in shapes.items() if ".layers.0." in name})

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model(2, 64, 96, 300)
before = peak()
whole, layer = model(24, 768, 2048, 9000)
print(json.dumps({"grown": peak() - before, "model": whole, "layer": layer}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_both_references_take_the_memory_of_a_layer_and_not_of_the_model() -> None:
    pytest.importorskip("torch", reason="references are made where bundles are built")
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["model"] > 600e6
    assert found["model"] > 20 * found["layer"]
    assert found["grown"] < found["model"] / 4, found
