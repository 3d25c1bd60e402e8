"""Who imports whom, by reading every module; and what importing the runtime really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llama_export
import pytest

ROOT = Path(llama_export.__file__).parent
PARTS = ("export", "optimize", "targets", "runtime")

# A build records the reference by running the graph that it wrote, with the parts of the runtime that verify uses.
_RECORDING = {
    *(
        "runtime.arrays",
        "runtime.chat",
        "runtime.onnx_file",
        "runtime.proof.reference",
        "runtime.proof.reference_checks",
    ),
    *("runtime.proof.replayer", "runtime.proof.replayers", "runtime.threads"),
}

# A bisection runs the graph with its inner values as outputs, and reads the weights as the device stores them.
_BISECTING = {
    *("runtime.arrays", "runtime.cpu_graph", "runtime.recipe", "runtime.proof.reference_file"),
    *("runtime.session", "runtime.proof.weights", "runtime.proof.input_scales"),
}

# Quality is measured as an evaluation does it, and told in a file that the runtime reads.
_MEASURING = {
    *("runtime.evaluate.inputs", "runtime.evaluate.intervals", "runtime.evaluate.likelihood", "runtime.quality"),
}

# An evaluation knows the adapters of a bundle's original by the hashes in the manifest.
_EVALUATING = {"runtime.hashing"}

# Engines are built on a device too, as a recipe says, and laid where the runtime looks for them.
_BUILDING = {
    *("runtime.recipe", "runtime.decode_json", "runtime.protobuf", "runtime.tensorrt"),
    *("runtime.hashing", "runtime.requirements", "runtime.files"),
}

ALLOWED = {
    "export": {"export", "optimize", "runtime.bundle", *_RECORDING, *_EVALUATING, *_MEASURING, *_BISECTING},
    "targets": {"targets", "optimize", "runtime.bundle", *_BUILDING},
    "optimize": {"optimize"},
    "runtime": {"runtime"},
}
"""What each part may import of the others."""

SHARED = {"console", "errors", "names", "progress", "tables"}
"""What any part may import of the modules beside them: of the package itself, its version too."""

NOT_ON_THE_DEVICE = {"torch", "onnx", "transformers", "onnxscript", "onnx_ir", "safetensors", "gguf", "ml_dtypes"}
NOT_IN_RUNTIME = NOT_ON_THE_DEVICE | {"click", "huggingface_hub"}


def modules(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Yield the full names of what a module imports, wherever in it: `llama_export.optimize.fuse`, `numpy`."""
    package = ("llama_export", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_reader_of_imports_sees_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "export").mkdir()
    path = tmp_path / "export" / "x.py"
    path.write_text(
        "import a.b, c\nfrom ..optimize.fuse import fuse\ndef f():\n    from . import y\n    from d import e\n"
    )
    found = set(imports(path))
    assert {"a.b", "c", "llama_export.optimize.fuse", "llama_export.export.y", "d", "d.e"} <= found


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_what_it_may(part: str) -> None:
    assert modules(part)
    for path in modules(part):
        for name in imports(path):
            inner = name.removeprefix("llama_export.")
            if inner == name or inner.split(".")[0] not in PARTS:  # see the next test
                continue
            # the module itself, a name in it, or the package it is then taken from (`from ..runtime import bundle`)
            fits = any(f"{inner}.".startswith(f"{may}.") or may.startswith(f"{inner}.") for may in ALLOWED[part])
            assert fits, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_what_is_shared_from_beside_it(part: str) -> None:
    for path in modules(part):
        for name in imports(path):
            first = name.removeprefix("llama_export.").split(".")[0]
            if not name.startswith("llama_export.") or first in PARTS:
                continue
            assert first in SHARED | {"__version__"}, f"{path.relative_to(ROOT)} imports {name}"


def test_what_is_shared_needs_nothing_else() -> None:
    for name in SHARED:
        inner = {one for one in imports(ROOT / f"{name}.py") if one.startswith("llama_export.")}
        assert {one.split(".")[1] for one in inner} <= SHARED, name


@pytest.mark.parametrize("part", PARTS)
def test_no_part_imports_the_command_line(part: str) -> None:
    for path in modules(part):
        for name in imports(path):
            assert not name.startswith(("llama_export.cli", "click")), f"{path.relative_to(ROOT)} imports {name}"


def test_the_runtime_imports_nothing_that_a_device_lacks() -> None:
    for path in modules("runtime"):
        for name in imports(path):
            assert name.split(".")[0] not in NOT_IN_RUNTIME, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("part", PARTS)
def test_inside_the_package_imports_are_relative(part: str) -> None:
    for path in modules(part):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "llama_export" for name in names), path.relative_to(ROOT)


def loaded_by(code: str) -> set[str]:
    code += "\nimport sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    code = "import llama_export.runtime as r\nfor name in r.__all__: getattr(r, name)"
    loaded = loaded_by(code)
    assert "llama_export" in loaded
    assert "numpy" in loaded
    assert not loaded & (NOT_IN_RUNTIME | {"onnxruntime", "tokenizers", "jinja2"})


def test_reading_a_manifest_needs_no_numpy() -> None:
    assert "numpy" not in loaded_by("import llama_export.runtime.bundle, llama_export.runtime.hashes")


def test_every_public_name_exists_and_others_do_not() -> None:
    from llama_export import runtime

    assert all(hasattr(runtime, name) for name in runtime.__all__)
    assert sorted(runtime.__all__) == runtime.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = runtime.nonsense


def test_no_part_is_a_module_of_its_own() -> None:
    code = "import llama_export.runtime.terminal, llama_export.runtime.bundle, llama_export.targets, llama_export.cli"
    assert not loaded_by(code) & set(PARTS)
    assert not set(sys.modules) & set(PARTS)
