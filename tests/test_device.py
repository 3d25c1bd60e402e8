"""`pytest --device`: the test files that run where nothing is installed that only building needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.imported import TESTS, imported_packages


@pytest.mark.parametrize(
    "name", ["test_backend", "test_bundle", "test_cli", "test_doctor", "test_generate", "test_run"]
)
def test_what_a_device_runs_is_in(name: str) -> None:
    packages = imported_packages(TESTS / f"{name}.py")
    assert {"llama_export", "pytest"} <= packages
    assert not packages & {"torch", "transformers", "onnx", "onnx_ir", "ml_dtypes", "gguf"}


@pytest.mark.parametrize(
    ("name", "through", "package"),
    [
        ("test_trace", "itself", "torch"),
        ("test_quantise", "the package", "ml_dtypes"),
        ("test_gguf_tokenizer", "the test support", "gguf"),
    ],
)
def test_what_needs_a_build_package_is_out(name: str, through: str, package: str) -> None:
    assert package in imported_packages(TESTS / f"{name}.py"), through


def test_imports_inside_of_functions_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("import a.b\nfrom support import onnx_bytes\ndef f():\n    import c\n")
    found = imported_packages(path)
    assert {"a", "numpy"} <= found
    assert "c" not in found
