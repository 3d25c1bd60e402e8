"""The doctor's verdicts follow from what it finds, and each fault comes with the command that mends it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from llama_export import doctor, installed
from llama_export.doctor import OnnxRuntime, Surroundings
from llama_export.installed import Package, packages_by_extra, untested_versions
from llama_export.targets.host import Gpu, Jetson, Machine
from llama_export.targets.jetpack import JETPACKS

MACHINE = Machine(
    system="Linux",
    architecture="x86_64",
    cpu="A CPU",
    flags=("avx2", "avx512_vnni"),
    memory_bytes=16_000_000_000,
    available_bytes=9_000_000_000,
    gpus=(),
    nvidia_driver=None,
    jetson=None,
)
HEALTHY = Surroundings(
    machine=MACHINE,
    cpus=8,
    cores=4,
    python=(3, 11, 7),
    packages={"base": (Package("numpy", ">=1.26", "2.4.6"),), "build": (Package("torch", ">=2.13", "2.13.0+cpu"),)},
    untested=(),
    both_runtimes=False,
    onnxruntime=OnnxRuntime("1.32.0", ("CPUExecutionProvider",)),
    free={"/data": 50_000_000_000},
    variables={},
    settings_error=None,
)
L4 = Gpu("NVIDIA L4", 24.2, "8.9", "580.65.06")


def judged(**changes: object) -> tuple[list[str], list[str]]:
    """What is able and what is not, then the remedies."""
    found = doctor.verdicts(replace(HEALTHY, **changes))
    assert all(bool(verdict.remedy) is not verdict.able for verdict in found), "a fault has a remedy, and only a fault"
    return [f"{'ok' if verdict.able else 'no'} {verdict.what}" for verdict in found], [
        verdict.remedy for verdict in found if verdict.remedy
    ]


def test_a_healthy_machine_needs_nothing() -> None:
    assert judged() == (["ok build bundles", "ok run and verify bundles on the CPU, with 4 threads"], [])
    assert "To do:" not in "\n".join(doctor.lines(HEALTHY))


def test_an_old_python_can_run_but_not_build() -> None:
    said, todo = judged(python=(3, 10, 13))
    assert said[0] == "no build: Python 3.10.13 is too old"
    assert said[1].startswith("ok run")
    assert "3.11 to 3.13" in todo[0]


def test_a_newer_python_than_tested_is_told() -> None:
    assert judged(python=(3, 14, 0))[0][0] == "ok build bundles (Python 3.14.0 is newer than what is tested)"


def test_missing_and_old_build_packages_are_named() -> None:
    build = (Package("torch", ">=2.13", None), Package("onnx", ">=1.19", "1.18.0"), Package("gguf", ">=0.17", "0.17"))
    said, todo = judged(packages={"build": build})
    assert said[0] == "no build: torch missing, onnx 1.18.0 too old (needs >=1.19)"
    assert todo == ['pip install "llama-export[build,cpu]"']


def test_without_onnxruntime_nothing_runs() -> None:
    said, todo = judged(onnxruntime=OnnxRuntime(None, (), "onnxruntime is not installed"))
    assert said[1] == "no run and verify: onnxruntime is not installed"
    assert todo == ['pip install "llama-export[cpu]"'] * 2


def test_both_onnxruntimes_are_a_fault_with_a_fix() -> None:
    said, todo = judged(both_runtimes=True)
    assert "both installed" in said[-1]
    assert todo == ["pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"]
    assert judged(both_runtimes=True, machine=replace(MACHINE, gpus=(L4,)))[1][-1].endswith(
        "pip install onnxruntime-gpu"
    )


def test_a_gpu_that_onnxruntime_cannot_use_is_told() -> None:
    with_gpu = replace(MACHINE, gpus=(L4,), nvidia_driver=L4.driver)
    said, todo = judged(machine=with_gpu)
    assert "no run on the GPU: this onnxruntime has no CUDA provider" in said
    assert todo == ['pip uninstall -y onnxruntime && pip install "llama-export[gpu]"']
    cuda = OnnxRuntime("1.32.0", ("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert judged(machine=with_gpu, onnxruntime=cuda)[0][-1] == "ok run bundles for CUDA"
    text = "\n".join(doctor.lines(replace(HEALTHY, machine=with_gpu)))
    assert "NVIDIA L4, 24.2 GB, compute capability 8.9" in text
    assert "580.65.06" in text


def test_a_jetson_is_sent_to_nvidias_wheels() -> None:
    jetson = replace(MACHINE, jetson=Jetson("NVIDIA Jetson Orin Nano Developer Kit", "36.4.3", JETPACKS["6.2"]))
    said, todo = judged(machine=jetson)
    assert "no run on the Jetson's GPU: this onnxruntime has no CUDA provider" in said
    assert "NVIDIA's onnxruntime-gpu wheel" in todo[0]
    assert "Jetson Linux 36.4.3, JetPack 6.2, TensorRT 10.3.0" in "\n".join(
        doctor.lines(replace(HEALTHY, machine=jetson))
    )


def test_a_full_disk_and_wrong_settings_are_told() -> None:
    said, todo = judged(free={"/data": 1_200_000_000}, settings_error="llama-export.toml has an unknown key 'modle'.")
    assert "no only 1.20 GB are free at /data" in said
    assert "no llama-export.toml has an unknown key 'modle'." in said
    assert todo == ["Correct llama-export.toml.", "Make room at /data."]


def test_the_report_shows_what_speed_depends_on() -> None:
    text = "\n".join(doctor.lines(HEALTHY))
    for part in (
        "4 cores, 8 threads",
        "avx2, avx512_vnni",
        "16.0 GB, 9.00 GB available",
        "torch 2.13.0+cpu",
        "1.32.0",
    ):
        assert part in text


def test_json_holds_everything() -> None:
    found = json.loads(json.dumps(doctor.to_json(HEALTHY)))
    assert found["machine"]["flags"] == ["avx2", "avx512_vnni"]
    assert found["packages"]["build"] == [
        {"name": "torch", "specifier": ">=2.13", "installed": "2.13.0+cpu", "fits": True}
    ]
    assert found["verdicts"][0] == {"able": True, "what": "build bundles", "remedy": ""}


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = doctor.examine()
    assert found.variables["HF_TOKEN"] == "set (not shown)"
    assert found.variables["HF_HUB_OFFLINE"] == "1"
    assert "hf_secret" not in json.dumps(doctor.to_json(found)) + "\n".join(doctor.lines(found))


def test_a_broken_onnxruntime_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    assert "does not import (AttributeError" in (doctor.examine().onnxruntime.error or "")
    working = SimpleNamespace(__version__="9.9", get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", working)
    assert doctor.examine().onnxruntime == OnnxRuntime("9.9", ("CPUExecutionProvider",))


def test_a_machine_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    pwd = pytest.importorskip("pwd", reason="users without a home are those of POSIX systems")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert list(doctor.examine().free) == [str(Path.cwd())]


def test_the_disk_of_the_hubs_downloads_is_looked_at(tmp_path: Path) -> None:
    folder, home, cache = (str(tmp_path / name) for name in ("a", "b", "c"))
    everything = {"HF_HUB_CACHE": folder, "HF_HOME": home, "XDG_CACHE_HOME": cache}
    assert doctor.hub_folder(everything) == tmp_path / "a"
    assert doctor.hub_folder({"HF_HOME": home, "XDG_CACHE_HOME": cache}) == tmp_path / "b"
    assert doctor.hub_folder({"XDG_CACHE_HOME": cache}) == tmp_path / "c" / "huggingface"
    assert doctor.hub_folder({}) == Path.home() / ".cache" / "huggingface"


def test_extras_are_read_from_the_packages_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"numpy": "2.0.0", "torch": "2.12.1+cu130", "onnx-ir": "1.1.0"}
    asked = [
        "numpy>=1.26",
        'tomli>=2; python_version < "3.0"',
        'torch>=2.13; extra == "build"',
        "onnx-ir[x]>=0.1.15 ; extra == 'build'",
        'uvicorn; extra == "serve"',
    ]
    monkeypatch.setattr(installed.metadata, "requires", lambda _: asked)
    monkeypatch.setattr(installed, "installed_version", versions.get)
    assert {extra: [str(package) for package in packages] for extra, packages in packages_by_extra().items()} == {
        "base": ["numpy 2.0.0"],
        "build": ["torch 2.12.1+cu130 too old (needs >=2.13)", "onnx-ir 1.1.0"],
        "serve": ["uvicorn missing"],
    }


def test_versions_other_than_the_tested_ones_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = tmp_path / "constraints.txt"
    monkeypatch.setattr(installed, "CONSTRAINTS", pins)
    monkeypatch.setattr(installed, "installed_version", {"torch": "2.13.0+cpu", "numpy": "2.5.0"}.get)
    assert untested_versions() == ()
    pins.write_text("# why\ntorch==2.13.0\nnumpy==2.4.6\nabsent==1.0\n")
    assert untested_versions() == ("numpy 2.5.0 (tested: 2.4.6)",)
