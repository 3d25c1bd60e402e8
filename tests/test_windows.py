"""What a device runs, held to what Python has on Windows: by reading it, and by running it without the rest.

Nothing here ran on Windows.
"""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_export
import pytest
from llama_export import doctor
from llama_export.runtime.hashes import cache_folder
from llama_export.targets import host
from llama_export.targets.windows_memory import windows_memory
from support.command import environment
from support.portability import device_modules, findings
from support.tiny_bundle import write_bundle
from support.tiny_tensorrt import write_tensorrt_bundle
from support.unix_only import is_unix_only

ROOT = Path(llama_export.__file__).parent
COMMANDS = frozenset({"run", "verify", "inspect", "doctor", "targets", "engine"})

EXPECTED = {
    ("runtime/bundle.py", "replace of a file"): "`seal`: bundles are made on Linux and macOS only",
    ("runtime/files.py", "replace of a file"): "the one that the others are sent to",
    ("runtime/npz.py", "open without encoding"): "of an archive: it gives bytes",
    ("runtime/proof/reference_file.py", "open without encoding"): "of an archive: it gives bytes",
}
"""Findings that are meant, and why."""

DEVICE = device_modules(ROOT, COMMANDS)


def test_the_reader_sees_what_windows_lacks() -> None:
    source = """
import fcntl, os, signal
from os import getuid, path
os.pread(1, 2, 3)
signal.signal(signal.SIGHUP, None)
mmap.mmap(-1, 5, flags=mmap.MAP_PRIVATE)
memory.madvise(1)
ctypes.CDLL(None)
Popen([], preexec_fn=f)
def f():
    return os.sysconf(1)
"""
    found = {line.split(": ")[1] for line in findings(source)}
    assert found == {
        *("fcntl", "os.getuid", "os.pread", "signal.SIGHUP", "mmap.MAP_PRIVATE", "mmap(flags=)", "madvise"),
        *("ctypes.CDLL(None)", "Popen(preexec_fn=)", "os.sysconf"),
    }


def test_the_reader_sees_files_that_depend_on_the_country_or_are_open() -> None:
    source = """
path.read_text(); path.write_text(x); path.open(); open(x); path.open("w")
path.read_text("utf-8"); path.write_text(x, encoding="utf-8"); open(x, "rb"); path.open("wb"); os.open(path, 0)
part.replace(path); part.rename(path); os.replace(a, b); text.replace("a", "b"); dataclasses.replace(x, y=1)
with contextlib.suppress(OSError):
    part.replace(path)
    path.read_text()
"""
    assert [line.split(":")[0] for line in findings(source)] == ["2"] * 3 + ["4"] * 2 + ["7"]


def test_what_asks_before_is_left_alone() -> None:
    source = """
a = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
if sys.platform == "win32":
    pass
else:
    os.getuid()
def f():
    if os.name != "posix":
        return
    os.getuid()
def g():
    assert sys.platform == "linux"
    os.getuid()
try:
    import fcntl
except ImportError:
    fcntl = None
with contextlib.suppress(ImportError):
    import readline
getattr(signal, "SIGKILL", 9)
os.open(p, os.O_RDONLY); os.kill(1, signal.SIGTERM); mmap.mmap(1, 2, access=mmap.ACCESS_READ)
"""
    assert findings(source) == []
    after = "def f():\n    if os.name == 'posix':\n        pass\n    os.getuid()\n"
    assert findings(after) == ["4: os.getuid"]


@pytest.mark.parametrize(
    "name", ["os.O_RDONLY", "os.EX_OK", "os.P_NOWAIT", "os.stat", "signal.SIGINT", "signal.SIG_IGN", "time.monotonic"]
)
def test_what_both_have_is_not_on_the_list(name: str) -> None:
    assert not is_unix_only(*name.split("."))


def test_what_a_device_runs_is_all_found() -> None:
    must = "cli.py doctor.py inspection.py engine_report.py progress.py runtime/tensorrt/engine.py targets/host.py"
    must += " targets/engine.py targets/engine_child.py targets/listing.py runtime/proof/verify.py"
    assert set(must.split()) <= DEVICE.keys()
    assert not {"pipeline.py", "export/destination.py", "export/write.py"} & DEVICE.keys()


def test_what_a_device_runs_asks_before_it_uses_what_windows_lacks() -> None:
    met = set()
    for name, path in DEVICE.items():
        for found in findings(path.read_text(encoding="utf-8")):
            what = next((key for key in EXPECTED if key[0] == name and key[1] in found), None)
            assert what is not None, f"{name}:{found}"
            met.add(what)
    assert met == EXPECTED.keys()


WITHOUT = """
import sys, os, signal, socket, mmap, select, time
import concurrent.futures, subprocess, zipfile, shutil, platform, tempfile, urllib.parse, multiprocessing, types
import click, jinja2, jinja2.sandbox, numpy, numpy.random, onnxruntime, tokenizers
sys.path.insert(0, {tests!r})
from support.unix_only import ATTRIBUTES, METHODS, MODULES, is_unix_only
for module in ATTRIBUTES:
    for name in list(vars(sys.modules[module])):
        if is_unix_only(module, name) and module != "time":
            delattr(sys.modules[module], name)
for name in MODULES:
    sys.modules[name] = None  # an import of it fails
shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40)  # it has another way on Windows
import importlib
for name in {modules!r}:
    importlib.import_module(name)
from llama_export.cli import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as end:
        print(arguments[0], "ended with", end.code)
"""


def test_every_command_of_a_device_runs_without_what_windows_lacks(tmp_path: Path) -> None:
    """In a process of its own, in which the names are gone; libraries have taken what they use before."""
    bundle = str(write_tensorrt_bundle(tmp_path / "bundle", "trt-primitive", reference=True).path)
    other = str(write_bundle(tmp_path / "other").path)
    needs_tensorrt = {f"targets/{name}.py" for name in ("engine", "engine_api", "engine_log")}
    paths = [Path(name).with_suffix("") for name in sorted(DEVICE.keys() - needs_tensorrt - {"__main__.py"})]
    modules = [".".join(("llama_export", *path.parts)).removesuffix(".__init__") for path in paths]
    commands = [
        ["inspect", bundle],
        ["verify", bundle],
        ["run", bundle, "Once", "--max-new-tokens", "3", "--threads", "1"],
        *(["doctor"], ["targets"], ["targets", "rtx-4090"], ["engine", other]),
    ]
    code = WITHOUT.format(tests=str(Path(__file__).parent), modules=modules, commands=commands)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env=environment(XDG_CACHE_HOME=str(tmp_path / "cache")),
        check=False,
    )
    ends = [line for line in done.stdout.splitlines() if " ended with " in line]
    assert ends == [f"{one[0]} ended with {int(one[0] == 'engine')}" for one in commands], done.stderr
    assert "is made for ONNX Runtime and takes no engine" in done.stderr
    assert "Traceback" not in done.stderr


# What Windows tells of itself, and where it keeps what


class Kernel:
    """Stands in for kernel32 on a machine with 16 GB."""

    def __init__(self, *, tells: bool) -> None:
        self.tells = tells

    def GlobalMemoryStatusEx(self, status: Any) -> int:  # noqa: N802
        if self.tells:
            assert status._obj.length == 64
            status._obj.total, status._obj.available = 16_000_000_000, 9_000_000_000
        return int(self.tells)


def test_the_memory_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert windows_memory(Kernel(tells=False)) == (0, 0)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", {"kernel32": Kernel(tells=True)}.__getitem__, raising=False)
    assert host.memory_bytes() == (16_000_000_000, 9_000_000_000)


def test_caches_lie_in_the_local_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "AppData" / "Local"))
    assert cache_folder() == tmp_path / "AppData" / "Local" / "llama-export"
    monkeypatch.delenv("LOCALAPPDATA")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "llama-export"


def test_the_doctor_says_that_nothing_is_built_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.examine()
    there = dataclasses.replace(found, machine=dataclasses.replace(found.machine, system="Windows", flags=()))
    verdict = doctor.verdicts(there)[0]
    assert (verdict.able, verdict.what) == (False, "build: not on Windows")
    assert "not told by this system" in "\n".join(doctor.lines(there))
