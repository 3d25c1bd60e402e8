"""What an engine is called: by it the runtime knows whether it was built from this bundle's model, and by whom."""

from __future__ import annotations

import re

SIGNATURE_VERSION = 1
"""Of what is expected of an engine's inputs and outputs, and of how they are used."""

_LABEL = re.compile(r"llama-export ([0-9]{1,9}) ([0-9a-f]{16}) ([0-9a-f]{16})")


def engine_label(graph_sha256: str, data_sha256: str) -> str:
    """The name that a builder gives to a bundle's network.

    graph_sha256, data_sha256: of the bundle's model.onnx and model.onnx.data.
    """
    return f"llama-export {SIGNATURE_VERSION} {graph_sha256[:16]} {data_sha256[:16]}"


def label_problem(name: str, expected: str) -> str | None:
    """What an engine's name tells against it; a name that no builder of ours gave tells nothing."""
    label = _LABEL.fullmatch(name)
    if label is None or name == expected:
        return None
    return "a newer llama-export built it" if int(label[1]) > SIGNATURE_VERSION else "it was built from another model"
