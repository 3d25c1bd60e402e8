"""The wheel: every module of the tree, nothing else, and it works when it is installed elsewhere."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "",
    *sorted(
        file.parent.relative_to(ROOT).as_posix()
        for part in ROOT.glob("[!.]*/__init__.py")
        for file in part.parent.rglob("__init__.py")
    ),
)
"""Folders of modules, from the root of the tree."""


def copied_tree(folder: Path) -> Path:
    """What belongs to the package, without what an earlier build may have left in the tree."""
    for package in PACKAGES:
        (folder / package).mkdir(parents=True, exist_ok=True)
        for file in (ROOT / package).glob("*.py"):
            (folder / package / file.name).write_bytes(file.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "export" / "published.toml").write_bytes((ROOT / "export" / "published.toml").read_bytes())
    (folder / "targets" / "catalogue").mkdir()
    for file in (ROOT / "targets" / "catalogue").glob("*.toml"):
        (folder / "targets" / "catalogue" / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="the wheel is built by setuptools 77 or newer")
    tree, folder = copied_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-w", folder, tree], check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert listed == [".".join(filter(None, ("llama_export", *package.split("/")))) for package in PACKAGES]


def test_wheel_holds_every_module_and_target(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("llama_export/")}
    expected = {
        f"llama_export/{package}/{file.name}".replace("//", "/")
        for package in PACKAGES
        for file in (ROOT / package).glob("*.py")
    }
    expected |= {f"llama_export/targets/catalogue/{file.name}" for file in (ROOT / "targets/catalogue").glob("*.toml")}
    assert names == expected | {"llama_export/py.typed", "llama_export/export/published.toml"}


def test_wheel_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """Not editable, away from the tree; its dependencies come from the environment of the tests."""
    venv.create(tmp_path / "venv", system_site_packages=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    zipfile.ZipFile(wheel).extractall(site)
    packages = Path(pytest.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(packages)!r})\n"
        "import llama_export.cli\n"
        "assert 'site-packages/llama_export' in llama_export.cli.__file__, llama_export.cli.__file__\n"
        "sys.argv = ['llama-export', 'targets']\n"
        "llama_export.cli.main()"
    )
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "jetson-orin-nano-8gb" in done.stdout
