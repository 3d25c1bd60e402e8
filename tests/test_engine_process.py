"""Building engines in a process of its own, against a fake of TensorRT's releases and with TensorRT-RTX itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.progress import Silent
from llama_export.runtime.bundle import Limits, Shape
from llama_export.runtime.recipe import Extent, Profile, Recipe, profiles_of
from llama_export.targets.engine_process import Built, Job, run_builder
from support import fake_builder
from support import onnx_bytes as onnx

pytest.importorskip("polygraphy", reason="polygraphy is not installed (the extras `rtx` and `tensorrt`)")
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (the extra `rtx`)"
)

BOTH = tuple(Profile(name, {"x": Extent((1, 4), (2, 4), (3, 4))}) for name in ("prefill", "decode"))
STRONG = Recipe("tensorrt", "10.3.0", ("8.7",), True, (), (), 1 << 20, 2, 1 << 30, BOTH)
WEAK = dataclasses.replace(
    STRONG,
    version="8.6.2",
    strongly_typed=False,
    flags=("FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS"),
    float32_layers=("/float32/",),
)
RTX = dataclasses.replace(
    STRONG, module="tensorrt_rtx", version="1.7.1", compute_capability=("8.9",), workspace_bytes=0
)


class Heard(Silent):
    def __init__(self) -> None:
        self.shares: list[float] = []

    def share(self, done: float) -> None:
        self.shares.append(done)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a fake release of TensorRT where the builder finds it."""

    def install(version: str, **behaviour: object) -> Path:
        folder = tmp_path / f"tensorrt-{version}"
        fake_builder.install(folder, version, **behaviour)
        monkeypatch.syspath_prepend(folder)
        return folder

    return install


def job(folder: Path, recipe: Recipe, graph: bytes = b"graph", timing: Path | None = None) -> Job:
    (folder / "model.onnx").write_bytes(graph)
    return Job(folder / "model.onnx", "label", recipe, folder / "x.plan", folder / "build.log", timing)


def build(folder: Path, recipe: Recipe, graph: bytes = b"graph", timing: Path | None = None) -> Built:
    return run_builder(job(folder, recipe, graph, timing), Silent())


def refusal(folder: Path, recipe: Recipe, graph: bytes = b"graph") -> str:
    with pytest.raises(LlamaExportError) as caught:
        build(folder, recipe, graph)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not (folder / "x.plan").exists()
    return message


# The releases


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3", "10.16.2", "11.4.1"])
def test_strongly_typed_releases(version: str, tmp_path: Path, release: Callable[..., Path]) -> None:
    folder = release(version)
    built = build(tmp_path, STRONG)
    assert (built.version, built.size) == (version, 4)
    assert (tmp_path / "x.plan").read_bytes() == b"plan"
    told = fake_builder.told(folder)
    assert told["network"] == 2  # STRONGLY_TYPED alone
    assert told == {
        **told,
        "flags": [],
        "layers": {},
        "workspace": 1 << 20,
        "profiles": 2,
        "level": 2,
        "monitor": True,
        "name": "label",
    }


def test_8_6_is_told_types_by_flags_and_layers_and_tells_no_progress(
    tmp_path: Path, release: Callable[..., Path]
) -> None:
    folder = release("8.6.2")
    build(tmp_path, WEAK)
    told = fake_builder.told(folder)
    assert told["network"] == 1  # EXPLICIT_BATCH
    assert told["flags"] == ["PREFER_PRECISION_CONSTRAINTS", "FP16", "INT8"]
    assert told["layers"] == {"norm/float32/Mul": ["float32", "float32"]}
    assert told["monitor"] is False


@pytest.mark.parametrize(
    ("version", "recipe", "reason"),
    [
        ("8.6.2", STRONG, "has no STRONGLY_TYPED networks"),
        ("11.4.1", WEAK, "knows only strongly typed networks"),
        ("10.3.0", dataclasses.replace(STRONG, flags=("FP17",)), "the flag 'FP17', but TensorRT 10.3.0 is given only"),
    ],
)
def test_a_recipe_of_another_kind_of_release(
    version: str, recipe: Recipe, reason: str, tmp_path: Path, release: Callable[..., Path]
) -> None:
    release(version)
    assert reason in refusal(tmp_path, recipe)


@pytest.mark.parametrize(
    ("version", "node"), [("8.6.2", "node 'number 3': "), ("10.3.0", "node 'attn' (Attention): UNSUPPORTED_NODE")]
)
def test_an_unsupported_node_is_named_as_well_as_the_release_can(
    version: str, node: str, tmp_path: Path, release: Callable[..., Path]
) -> None:
    release(version)
    message = refusal(tmp_path, WEAK if version < "9" and version[0] == "8" else STRONG, b"unsupported")
    assert node in message
    assert "no importer found" in message


def test_the_reason_of_a_failed_build_is_the_builders_first_error(tmp_path: Path, release: Callable[..., Path]) -> None:
    release("10.3.0", fail=True)
    assert "could not build the engine: no kernel for mlp/MatMul." in refusal(tmp_path, STRONG)


@pytest.mark.parametrize(("before", "after"), [(b"old", b"old+"), (b"damaged", b"+"), (None, b"+")])
def test_the_timing_cache_is_kept(
    before: bytes | None, after: bytes, tmp_path: Path, release: Callable[..., Path]
) -> None:
    release("10.3.0")
    timing = tmp_path / "timing.cache"
    if before is not None:
        timing.write_bytes(before)
    build(tmp_path, STRONG, timing=timing)
    assert timing.read_bytes() == after
    assert not list(tmp_path.glob("*.part"))


def test_a_timing_cache_that_cannot_be_kept_costs_no_engine(tmp_path: Path, release: Callable[..., Path]) -> None:
    release("10.3.0")
    (tmp_path / "timing.cache").mkdir()
    assert build(tmp_path, STRONG, timing=tmp_path / "timing.cache").size == 4
    assert "what was measured is not kept" in (tmp_path / "build.log").read_text()


# The process


def test_libraries_of_the_builder_find_nothing_on_stdin(tmp_path: Path, release: Callable[..., Path]) -> None:
    """On Windows one that asks what it is would wait there until the build is called off."""
    folder = release("10.3.0")
    with (folder / "tensorrt.py").open("a", encoding="utf-8") as file:
        file.write("\nimport sys\nassert os.path.samestat(os.fstat(0), os.stat(os.devnull)), 'stdin is a pipe'\n")
        file.write("assert sys.stdin.read() == ''\n")
    assert build(tmp_path, STRONG).size == 4


def test_a_builder_killed_for_memory(tmp_path: Path, release: Callable[..., Path]) -> None:
    release("10.3.0", die="SIGKILL")
    message = refusal(tmp_path, STRONG)
    assert "was killed, as systems do when memory runs out (it takes about 1.07 GB)" in message


def test_a_builder_that_crashes_says_its_last_line(tmp_path: Path, release: Callable[..., Path]) -> None:
    release("10.3.0", die="SIGSEGV")
    message = refusal(tmp_path, STRONG)
    assert "crashed (signal 11)" in message
    assert "building" in message


def test_a_module_that_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path / "empty")
    assert "libnvinfer.so.10: cannot open" in refusal(tmp_path, STRONG)


def test_files_of_the_current_folder_are_no_modules(
    tmp_path: Path, release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    release("10.3.0")
    here = tmp_path / "here"
    here.mkdir()
    (here / "json.py").write_text("raise SystemExit(7)\n")
    monkeypatch.chdir(here)
    assert build(tmp_path, STRONG).size == 4


# TensorRT-RTX itself


def graph(nodes: list[bytes], outputs: list[bytes], inputs: list[str] = ["x"], opset: int = 24) -> bytes:  # noqa: B006
    return onnx.model(nodes, [], [onnx.value_info(name, "float16", ["b", 4]) for name in inputs], outputs, opset)


def relu() -> bytes:
    return graph([onnx.node("Relu", ["x"], ["y"])], [onnx.value_info("y", "float16", ["b", 4])])


@needs_rtx
@pytest.mark.parametrize("capabilities", [("8.9",), ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")])
def test_a_plan_for_several_gpus(capabilities: tuple[str, ...], tmp_path: Path) -> None:
    heard = Heard()
    recipe = dataclasses.replace(RTX, compute_capability=capabilities)
    built = run_builder(job(tmp_path, recipe, relu()), heard)
    assert built.size == (tmp_path / "x.plan").stat().st_size > 0
    assert heard.shares == sorted(heard.shares)
    assert 0.5 < heard.shares[-1] <= 1
    assert sys.platform != "linux" or (built.peak_bytes or 0) > 1 << 20
    log = (tmp_path / "build.log").read_text()
    assert "TensorRT-RTX" in log
    assert "Engine generation completed" in log


@needs_rtx
def test_a_capability_that_it_cannot_build_for(tmp_path: Path) -> None:
    message = refusal(tmp_path, dataclasses.replace(RTX, compute_capability=("8.7",)), relu())
    assert "no engines for compute capability 8.7, only for 7.5, 8.0" in message


@needs_rtx
def test_an_operator_that_it_lacks_is_named(tmp_path: Path) -> None:
    nodes = [onnx.node("Relu", ["x"], ["r"]), onnx.node("Bernoulli", ["r"], ["y"])]
    message = refusal(tmp_path, RTX, graph(nodes, [onnx.value_info("y", "float16", ["b", 4])]))
    assert "(Bernoulli): " in message
    assert "model.onnx" in message


@needs_rtx
def test_an_input_that_no_node_reads(tmp_path: Path) -> None:
    profiles = tuple(Profile(one.name, {**one.inputs, "z": one.inputs["x"]}) for one in BOTH)
    model = graph([onnx.node("Relu", ["x"], ["y"])], [onnx.value_info("y", "float16", ["b", 4])], ["x", "z"])
    assert "No node of model.onnx reads the input 'z'" in refusal(
        tmp_path, dataclasses.replace(RTX, profiles=profiles), model
    )


@needs_rtx
def test_an_input_that_the_parser_drops_is_named_with_its_node(tmp_path: Path) -> None:
    """Attention's nonpad_kv_seqlen: padded keys would be attended without a word."""
    names = ("q", "k", "v")
    inputs = [
        *(onnx.value_info(name, "float16", ["b", 2, 8, 16]) for name in names),
        onnx.value_info("n", "int64", ["b"]),
    ]
    node = onnx.node("Attention", [*names, "", "", "", "n"], ["y"])
    model = onnx.model([node], [], inputs, [onnx.value_info("y", "float16", ["b", 2, 8, 16])], 24)
    extents = {name: Extent(*((1, 2, 8, 16),) * 3) for name in names} | {"n": Extent((1,), (1,), (1,))}
    recipe = dataclasses.replace(RTX, profiles=(Profile("decode", extents),))
    message = refusal(tmp_path, recipe, model)
    assert "drops the input 'n' of model.onnx" in message
    assert "(Attention)" in message


@needs_rtx
@pytest.mark.parametrize("damage", [b"", b"nonsense" * 9, relu()[:-9]])
def test_a_damaged_graph(damage: bytes, tmp_path: Path) -> None:
    assert "model.onnx" in refusal(tmp_path, RTX, damage)


@needs_rtx
def test_a_profile_of_another_graph(tmp_path: Path) -> None:
    profiles = tuple(Profile(one.name, {"other": one.inputs["x"]}) for one in BOTH)
    message = refusal(tmp_path, dataclasses.replace(RTX, profiles=profiles), relu())
    assert "profile 'prefill' does not fit model.onnx in other, x" in message


@needs_rtx
def test_ctrl_c_stops_the_builder(tmp_path: Path) -> None:
    """Once it tells progress, so in the midst of building; nothing is left, and no process."""
    began = time.monotonic()

    class Impatient(Silent):
        def share(self, done: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_builder(job(tmp_path, RTX, relu()), Impatient())
    assert not (tmp_path / "x.plan").exists()
    assert time.monotonic() - began < 60


def test_a_killed_parent_takes_the_builder_along(tmp_path: Path, release: Callable[..., Path]) -> None:
    """The builder ends when its stdin does, without a word to stop."""
    release("10.3.0")
    from llama_export.targets import engine_process

    read, write = os.pipe()
    ended = threading.Event()
    pid = os.fork() if hasattr(os, "fork") else pytest.skip("no fork here")
    if pid == 0:
        os.close(read)
        with engine_process._child(job(tmp_path, STRONG)) as child:
            os.write(write, str(child.pid).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    builder = int(os.read(read, 32))
    os.waitpid(pid, 0)
    for _ in range(600):
        try:
            state = Path(f"/proc/{builder}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            state = "X"
        if state in "XZ":
            ended.set()
            break
        time.sleep(0.05)
    assert ended.is_set()


# The progress of nested phases


def test_shares_of_nested_phases_never_fall() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (the extra `rtx`)")
    code = (
        "from llama_export.targets.engine_log import Phases\n"
        "told = []\n"
        "p = Phases(told.append, lambda: False)\n"
        "p.start('a', None, 2); p.start('b', 'a', 4)\n"
        "p.step('b', 1); p.finish('b'); p.step('a', 0); p.start('b', 'a', 4); p.step('b', 0); p.step('unknown', 3)\n"
        "p.finish('b'); p.step('a', 1); p.finish('a')\n"
        "print(told)\n"
    )
    import subprocess

    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[0.25, 0.5, 0.625, 1.0]"


def tiny_profiles(shape: Shape) -> Any:
    return profiles_of("trt", shape, Limits(64, 2, 16))


@needs_rtx
def test_the_graph_of_a_bundle_with_its_own_profiles(tmp_path: Path) -> None:
    from support.tiny_bundle import manifest_for, random_llama
    from support.tiny_tensorrt import tensorrt_files

    llama = random_llama()
    model, data = tensorrt_files(llama, "trt", 64, "float16")
    (tmp_path / "model.onnx.data").write_bytes(data)
    shape = dataclasses.replace(manifest_for(llama).shape, cache_dtype="float16")
    built = build(tmp_path, dataclasses.replace(RTX, profiles=tiny_profiles(shape)), model)
    assert built.size > len(data) // 4
    assert np.isfinite(built.seconds)
