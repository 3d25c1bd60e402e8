"""The logits of a folder of onnxruntime-genai's by ONNX Runtime, with the session options of its genai_config.json.

genai itself gives the logits of the last token alone; the graph gives all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING or __package__:
    from .quality import Float32, Int64, Logits, main
else:
    from quality import Float32, Int64, Logits, main


def session_options(given: dict[str, Any], threads: int) -> ort.SessionOptions:
    """What genai makes of `session_options`: names of its own for some, configuration entries for the rest."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    for name, value in given.items():
        if name in ("provider_options", "log_id", "intra_op_num_threads", "inter_op_num_threads"):
            continue
        options.add_session_config_entry(name, str(value))
    return options


def load(model: Path, threads: int, length: int, exact: bool) -> Logits:
    decoder = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    options = session_options(decoder["session_options"], threads)
    session = ort.InferenceSession(model / decoder["filename"], options, providers=["CPUExecutionProvider"])
    given = {value.name: value for value in session.get_inputs()}
    size = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past = {name: np.zeros(size, types[value.type]) for name, value in given.items() if name.startswith("past_")}

    def logits(ids: Int64) -> Float32:
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), **past}
        if "position_ids" in given:
            feeds["position_ids"] = np.arange(len(ids))[None]
        result: Float32 = session.run(["logits"], feeds)[0][0].astype(np.float32)
        return result

    return logits


if __name__ == "__main__":
    main(load)
