"""The catalogue is complete and sourced, a user's own file is checked, and this machine is read rightly."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.targets import host, listing
from llama_export.targets.devices import Target, load_target, target_names
from llama_export.targets.host import Gpu, Machine, host_target, read_gpus, read_machine
from llama_export.targets.jetpack import JETPACKS, jetpack_of_l4t
from llama_export.targets.made import what_is_made

CATALOGUE_NAMES = [name for name in target_names() if name != "host"]
SOURCED = (
    "compute_capability",
    "memory_gb",
    "reserve_gb",
    "shared_memory",
    "bandwidth_gbs",
    "boost_bandwidth_gbs",
    "native_formats",
    "peak",
    "jetpack",
    "jetpacks",
    "device_tree",
    "gpu_names",
    "backend",
    "default_precision",
)
OWN_FILE = """
title = "A board"
kind = "cpu"
memory_gb = 3
reserve_gb = 0.5
default_precision = "int4"
backend = "onnxruntime"
backends = ["onnxruntime"]
providers = ["CPUExecutionProvider"]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "board.toml"
    path.write_text(text)
    return str(path)


def test_the_catalogue_has_what_the_design_names() -> None:
    assert set(CATALOGUE_NAMES) >= {
        *("jetson-orin", "jetson-orin-nano-4gb", "jetson-orin-nano-8gb", "jetson-orin-nx-8gb", "jetson-orin-nx-16gb"),
        *("jetson-agx-orin-32gb", "jetson-agx-orin-64gb", "jetson-thor-t4000", "jetson-thor-t5000", "dgx-spark"),
        *("rtx-3090", "rtx-4090", "rtx-5090", "rtx", "l4", "a100", "h100", "h200", "cpu", "cuda"),
    }


@pytest.mark.parametrize("name", CATALOGUE_NAMES)
def test_every_fact_of_the_catalogue_has_its_source(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    facts = {item.name for item in fields(Target) if getattr(target, item.name)}
    assert {fact for fact in SOURCED if fact in facts} <= set(target.sources)
    assert set(target.sources) <= facts


@pytest.mark.parametrize("name", CATALOGUE_NAMES)
def test_a_jetson_has_a_jetpack_and_nothing_else_has(name: str) -> None:
    target = load_target(name)
    assert (target.release is not None) == (target.kind == "jetson")


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("jetson-orin-nano-8gb", (8, ("8.7",), "int4", "tensorrt")),
        ("jetson-thor-t5000", (128, ("11.0",), "int4", "tensorrt")),
        ("rtx", (8, ("8.0", "8.6", "8.9", "12.0"), "int4", "tensorrt-rtx")),
        ("dgx-spark", (128, ("12.1",), "int4", "tensorrt-rtx")),
        ("h200", (141, ("9.0",), "fp16", "onnxruntime")),
        ("cpu", (8, (), "int4", "onnxruntime")),
    ],
)
def test_facts_that_builds_depend_on(name: str, facts: tuple[object, ...]) -> None:
    target = load_target(name)
    assert facts == (
        target.memory_gb,
        target.compute_capability,
        target.default_precision,
        target.backend,
    )


@pytest.mark.parametrize("name", CATALOGUE_NAMES)
def test_the_default_backend_is_the_one_that_uses_the_device(name: str) -> None:
    prefixes = {"jetson-": "tensorrt", "rtx": "tensorrt-rtx", "l4": "tensorrt-rtx", "dgx-": "tensorrt-rtx"}
    expected = next((value for prefix, value in prefixes.items() if name.startswith(prefix)), "onnxruntime")
    assert load_target(name).backend == expected


def test_default_jetpacks_and_those_that_a_device_had() -> None:
    orin, thor = load_target("jetson-agx-orin-32gb"), load_target("jetson-thor-t4000")
    assert (orin.jetpack, orin.jetpacks) == ("6.2", ("5.1", "6.0", "6.1", "6.2", "7.2"))
    assert (thor.jetpack, thor.jetpacks) == ("7.1", ("7.0", "7.1", "7.2"))


def test_assumptions_are_told_apart_from_the_vendors_figures() -> None:
    assert [name for name in CATALOGUE_NAMES if load_target(name).is_assumed("memory_gb")] == [
        "cpu",
        "cuda",
        "jetson-orin",
        "rtx",
    ]


@pytest.mark.parametrize("name", ["cuda", "a100", "h100", "h200"])
def test_cuda_targets_compute_in_float16(name: str) -> None:
    made = what_is_made(load_target(name))
    assert made.activations == "float16"
    assert made.providers == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert not made.on_cpu


def test_an_old_jetpack_is_told_to_lack_a_python_for_the_runtime() -> None:
    newer = replace(load_target("jetson-orin"), backend="onnxruntime")
    assert any("Python 3.8" in note for note in what_is_made(replace(newer, jetpack="5.1")).notes)
    assert not any("Python" in note for note in what_is_made(newer).notes)


def test_an_unknown_target_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'jetson-orin'\\?"):
        load_target("jetson-orn")


def test_a_file_of_ones_own_describes_a_target(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, OWN_FILE))
    assert (target.name, target.title, target.usable_gb) == ("board", "A board", 2.5)


def test_a_file_of_ones_own_changes_a_catalogue_target(tmp_path: Path) -> None:
    text = 'base = "jetson-orin-nano-8gb"\nreserve_gb = 1\njetpack = "7.2"\n[sources]\njetpack = "installed"'
    target = load_target(write(tmp_path, text))
    base = load_target("jetson-orin-nano-8gb")
    assert (target.name, target.usable_gb, target.jetpack) == ("board", 7, "7.2")
    assert (target.peak, target.compute_capability) == (base.peak, base.compute_capability)
    assert (target.sources["reserve_gb"], target.sources["jetpack"]) == ("board.toml", "installed")
    assert target.sources["memory_gb"] == base.sources["memory_gb"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "not a TOML file"),
        ("", "the key 'title' is missing; it must be a string"),
        (
            OWN_FILE.replace('kind = "cpu"', ""),
            "'kind' is missing; it must be a string (allowed: cpu, gpu, jetson, spark)",
        ),
        (OWN_FILE.replace('backends = ["onnxruntime"]', ""), "a list of strings (allowed: onnxruntime, tensorrt"),
        (OWN_FILE.replace("0.5", "-0.5"), "reserve_gb is -0.5, but it must be a positive number"),
        (OWN_FILE.replace("= 3", f"= 1{'0' * 400}"), "but it must be a positive number"),
        (OWN_FILE.replace("= 3", "= nan"), "memory_gb is nan"),
        (OWN_FILE + "bandwidth_gbs = 0", "bandwidth_gbs is 0, but it must be above"),
        (OWN_FILE + "[[peak]]\nformat = 'int8'\ntops = 0\nsparse = true", "tops of peak is 0"),
        (OWN_FILE + "[[peak]]\nformat = 'int7'\ntops = 4\nsparse = true", "format has 'int7'. Did you mean 'int8'?"),
        (OWN_FILE + 'compute_capability = ["89"]', "compute_capability has '89', but it must be a number such as"),
        (OWN_FILE.replace('["onnxruntime"]', '["onnxruntime", "tensorrt-rtx"]'), "'compute_capability' is missing"),
        (OWN_FILE + 'jetpack = "6.2"\njetpacks = ["6.2"]', "are for the kind 'jetson', not 'cpu'"),
        (
            'base = "jetson-orin"\njetpack = "7.0"',
            "'7.0' is not among the jetpacks ['5.1', '6.0', '6.1', '6.2', '7.2']",
        ),
        ('base = "jetson-orin"\njetpack = "6.3"', "jetpack has '6.3'. Did you mean '6."),
        ('base = "jetson-orin"\ndevice_tree = 5', "device_tree is 5, but it must be a string"),
        (OWN_FILE + "memory_bg = 4", "unknown key 'memory_bg'. Did you mean 'memory_gb'"),
        (OWN_FILE.replace("= 3", '= "3"'), "memory_gb is '3', but it must be a positive number"),
        (OWN_FILE.replace("= 3", "= true"), "memory_gb is True"),
        (OWN_FILE.replace("= 3", "= -1"), "must be a positive number"),
        (OWN_FILE.replace("= 3", "= inf"), "must be a positive number"),
        (OWN_FILE.replace("= 3", "= 0.25"), "reserve_gb 0.5 must be at least 0 and below memory_gb"),
        (OWN_FILE.replace("int4", "in4"), "default_precision has 'in4'. Did you mean 'int4'? Allowed: fp32"),
        (OWN_FILE.replace('["CPU', '["GPU'), "providers has 'GPUExecutionProvider'"),
        (OWN_FILE.replace('["CPUExecutionProvider"]', '"CPUExecutionProvider"'), "must be a list of strings"),
        (OWN_FILE.replace('["CPUExecutionProvider"]', "[1]"), "must be a list of strings"),
        (OWN_FILE.replace('["CPUE', '["CUDAE'), "must end with 'CPUExecutionProvider'"),
        (OWN_FILE.replace('["onnxruntime"]', '["tensorrt"]'), "'onnxruntime' is not among the backends"),
        (OWN_FILE.replace('"cpu"', '"jetson"'), "a jetson needs the key 'jetpack'"),
        (OWN_FILE + 'jetpack = "6.2"', "jetpack and jetpacks are for the kind 'jetson', not 'cpu'"),
        (OWN_FILE + "peak = [1]", "a list of tables [[peak]] is needed"),
        (OWN_FILE + "[[peak]]\nformat = 'int8'\ntops = 4", "the key 'sparse' is missing"),
        (OWN_FILE + "[sources]\nmemory_gb = 4", "sources is {'memory_gb': 4}, but it must be a table of strings"),
        ('base = "jetson-orn"', "base is 'jetson-orn', which is no target. Did you mean 'jetson-orin'?"),
        ("base = []", "base is [], which is no target"),
        ('base = "cpu"\nsources = "me"', "sources is 'me', but it must be a table of strings"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name_key_and_what_is_allowed(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(LlamaExportError) as caught:
        load_target(write(tmp_path, text))
    assert message in str(caught.value)
    assert "board.toml" in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read: No such file"):
        load_target(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match="not a plain file; name a TOML file"):
        load_target(str(tmp_path / "folder.toml"))
    with pytest.raises(UsageError, match="There is no target"):
        load_target(str(tmp_path))
    path = tmp_path / "board.toml"
    for content in (b"\xff\xfe\x00", b"a = " + b"[" * 10_000, b"a = 1" + b"0" * 5000):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="not a TOML file") as caught:
            load_target(str(path))
        assert "\n" not in str(caught.value)
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="larger than 1048576 bytes"):
        load_target(str(path))


def test_the_table_marks_assumptions_and_the_details_name_sources() -> None:
    table = "\n".join(listing.table_lines([load_target("cpu"), load_target("l4")]))
    assert "8 GB*" in table
    assert "24 GB " in table
    details = "\n".join(listing.detail_lines(load_target("jetson-agx-orin-64gb")))
    for part in (
        "204.8 GB/s",
        "int8 275 TOPS sparse with DLAs",
        "TensorRT 10.3.0",
        "JetPack",
        "by which `llama-export engine` builds the engine on the Jetson",
        "ONNX Runtime",
    ):
        assert part in details


# This machine


Read = Callable[..., Machine]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads a machine that has these system files, whose nvidia-smi prints `gpus`, with onnxruntime-gpu (`cuda`) and
    tensorrt_rtx (`rtx`) or without.
    """

    def read_files(files: dict[str, str], gpus: str = "", *, cuda: bool = False, rtx: bool = False) -> Machine:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(host, "ROOT", tmp_path)
        monkeypatch.setattr(host, "_nvidia_smi", lambda: gpus)
        monkeypatch.setattr(host, "_has_onnxruntime_gpu", lambda: cuda)
        monkeypatch.setattr(host, "_has_module", lambda name: rtx and name == "tensorrt_rtx")
        return read_machine()

    return read_files


MEMINFO = "MemTotal:        7802944 kB\nMemFree:  100 kB\nMemAvailable:    5000000 kB\n"
ARM_CPU = "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd crc32 asimddp i8mm\n\nprocessor\t: 1\n"
JETSON_FILES = {
    "proc/cpuinfo": ARM_CPU,
    "proc/meminfo": MEMINFO,
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
}


def test_a_jetson_is_known_by_its_device_tree_and_memory(read: Read) -> None:
    machine = read(JETSON_FILES)
    assert machine.flags == ("dotprod", "i8mm")
    assert (machine.memory_bytes, machine.available_bytes) == (7802944 * 1024, 5000000 * 1024)
    assert machine.jetson is not None
    assert (machine.jetson.l4t, machine.jetson.jetpack) == ("36.4.3", JETPACKS["6.2"])
    target = host_target(machine)
    assert (target.name, target.compute_capability, target.jetpack) == ("host", ("8.7",), "6.2")
    assert (target.memory_gb, target.bandwidth_gbs) == (8.0, 68), "an Orin Nano, and the 8 GB one"
    assert "Orin Nano" in target.title
    assert (target.backend, target.sources["backend"]) == ("tensorrt", "JetPack 6.2 has TensorRT 10.3.0")


@pytest.mark.parametrize(
    ("release", "jetpack", "backend", "precision"),
    [
        ("R36 (release), REVISION: 3.0", "6.0", "tensorrt", "fp16"),
        ("R35 (release), REVISION: 4.1", "5.1", "onnxruntime", "int4"),
    ],
)
def test_an_older_jetpack_decides_backend_and_precision(
    read: Read, release: str, jetpack: str, backend: str, precision: str
) -> None:
    target = host_target(read({**JETSON_FILES, "etc/nv_tegra_release": f"# {release}, GCID: 1"}))
    assert (target.jetpack, target.backend, target.default_precision) == (jetpack, backend, precision)


def test_an_unknown_jetson_linux_leaves_an_assumed_jetpack(read: Read) -> None:
    target = host_target(read({**JETSON_FILES, "etc/nv_tegra_release": "# R99 (release), REVISION: 1.0, GCID: 1"}))
    assert (target.jetpack, target.backend) == ("6.2", "tensorrt")
    assert target.is_assumed("jetpack")
    assert "99.1.0" in target.sources["jetpack"]


def test_a_jetson_of_an_unknown_kind_counts_as_a_computer(read: Read) -> None:
    files = {**JETSON_FILES, "proc/device-tree/model": "NVIDIA Jetson Xavier NX"}
    target = host_target(read(files))
    assert (target.kind, target.memory_gb) == ("cpu", 8.0)


@pytest.mark.parametrize(
    ("l4t", "version"),
    [("35.4.1", "5.1"), ("36.3.0", "6.0"), ("36.4.0", "6.1"), ("36.4.7", "6.2"), ("36.5", "6.2"), ("38.2.1", "7.0")],
)
def test_jetson_linux_tells_the_jetpack(l4t: str, version: str) -> None:
    found = jetpack_of_l4t(l4t)
    assert found is not None
    assert found.version == version


def test_an_unknown_jetson_linux_tells_none() -> None:
    assert jetpack_of_l4t("32.7.1") is None
    assert jetpack_of_l4t("3") is None


def test_gpus_are_read_from_what_nvidia_smi_prints() -> None:
    printed = "NVIDIA H200, 143771, 9.0, 580.65.06\nNVIDIA GB10, [N/A], 12.1, 580.95.05\nNo devices were found\n"
    assert read_gpus(printed) == (
        Gpu("NVIDIA H200", 150.8, "9.0", "580.65.06"),
        Gpu("NVIDIA GB10", None, "12.1", "580.95.05"),
    )


COMPUTER = {"proc/meminfo": MEMINFO}


def test_a_gpu_counts_only_where_something_can_use_it(read: Read) -> None:
    gpus = "NVIDIA L4, 23034, 8.9, 550.1\n"
    without, with_cuda = (host_target(read(COMPUTER, gpus, cuda=cuda)) for cuda in (False, True))
    assert (without.kind, without.memory_gb, without.default_precision) == ("cpu", 8.0, "int4")
    assert (with_cuda.kind, with_cuda.memory_gb, with_cuda.default_precision) == ("gpu", 24.2, "fp16")
    assert with_cuda.compute_capability == ("8.9",)
    assert not with_cuda.is_assumed("memory_gb")
    assert "nothing is installed" in without.sources["backend"]
    assert (with_cuda.backend, with_cuda.providers[0]) == ("onnxruntime", "CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("gpu", "cuda", "backend", "bandwidth"),
    [
        ("NVIDIA GeForce RTX 4090, 24564, 8.9, 580.1", True, "tensorrt-rtx", 1008),
        ("NVIDIA GeForce RTX 4090 Laptop GPU, 16376, 8.9, 580.1", True, "tensorrt-rtx", None),
        ("NVIDIA A100-SXM4-40GB, 40960, 8.0, 580.1", True, "onnxruntime", 1555),
        ("NVIDIA A100-SXM4-40GB, 40960, 8.0, 580.1", False, "tensorrt-rtx", 1555),
        ("NVIDIA A100-SXM4-80GB, 81920, 8.0, 580.1", True, "onnxruntime", None),
        ("NVIDIA H200, 143771, 9.0, 580.1", True, "onnxruntime", 4800),
        ("NVIDIA GB10, [N/A], 12.1, 580.1", False, "tensorrt-rtx", 273),
    ],
)
def test_a_gpu_has_the_backend_and_the_figures_of_its_card(
    read: Read, gpu: str, backend: str, bandwidth: float | None, *, cuda: bool
) -> None:
    target = host_target(read(COMPUTER, f"{gpu}\n", cuda=cuda, rtx=True))
    assert (target.name, target.backend, target.bandwidth_gbs) == ("host", backend, bandwidth)
    assert target.backend in target.backends
    assert gpu.split(",", maxsplit=1)[0] in target.sources["backend"]


def test_a_gpu_that_tensorrt_rtx_does_not_know_counts_only_with_onnxruntime(read: Read) -> None:
    target = host_target(read(COMPUTER, "NVIDIA H200, 143771, 9.0, 580.1\n", rtx=True))
    assert (target.kind, target.backend) == ("cpu", "onnxruntime")


def test_a_gpu_without_memory_of_its_own_uses_the_computers(read: Read) -> None:
    target = host_target(read(COMPUTER, "NVIDIA GB10, [N/A], 12.1, 580.1\n", cuda=True))
    assert (target.memory_gb, target.shared_memory) == (8.0, True)


def test_a_containers_limit_is_the_memory_that_counts(read: Read) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "sys/fs/cgroup/memory.max": "2000000000\n",
        "sys/fs/cgroup/memory.current": "500000000\n",
    }
    machine = read(files)
    assert (machine.memory_bytes, machine.available_bytes) == (2_000_000_000, 1_500_000_000)
    assert host_target(machine).usable_gb == 1.5


def test_the_driver_is_known_without_nvidia_smi(read: Read) -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12\n"
    files = {"proc/driver/nvidia/version": text}
    assert read(files).nvidia_driver == "580.65.06"


def test_this_machine_is_a_target() -> None:
    target = load_target("host")
    assert target.name == "host"
    assert target.memory_gb > 0.1


@pytest.mark.timeout(30)
def test_a_pipe_is_no_target(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "board.toml")
    with pytest.raises(UsageError, match="not a plain file"):
        load_target(str(tmp_path / "board.toml"))
