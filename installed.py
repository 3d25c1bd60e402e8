"""Which packages each extra asks for, which are here, and what to do about those that are not."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .runtime.requirements import parse_version

DISTRIBUTION = "llama-export"
BASE = "base"
CONSTRAINTS = Path(__file__).parent / "constraints.txt"
"""The versions that are tested together; there in a source tree, not in a wheel."""

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?\s*(?P<specifier>[^;]*)(?:;(?P<marker>.*))?"
)
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_PYTHON_BELOW = re.compile(r"""python_version\s*<\s*["'](\d+)\.(\d+)["']""")
_AT_LEAST = re.compile(r">=\s*([\d.]+)")


@dataclass(frozen=True)
class Package:
    """A package that an extra asks for. specifier: as in pyproject.toml; installed: its version, or None."""

    name: str
    specifier: str
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is here and no older than asked for."""
        if self.installed is None:
            return False
        return all(parse_version(self.installed) >= parse_version(low) for low in _AT_LEAST.findall(self.specifier))

    def __str__(self) -> str:
        if self.installed is None:
            return f"{self.name} missing"
        return f"{self.name} {self.installed}" + ("" if self.fits else f" too old (needs {self.specifier})")


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def packages_by_extra() -> Mapping[str, tuple[Package, ...]]:
    """What each extra asks for, by the extra's name; "base" is what every installation needs.

    Empty in a folder that was never installed, since all comes from the package's own metadata.
    """
    extras: dict[str, list[Package]] = {BASE: []}
    for text in _own_requirements():
        found = _REQUIREMENT.fullmatch(text.strip())
        if found is None or not _for_this_python(found["marker"] or ""):
            continue
        extra = _EXTRA.search(found["marker"] or "")
        package = Package(found["name"], found["specifier"].strip(), installed_version(found["name"]))
        extras.setdefault(extra[1] if extra else BASE, []).append(package)
    return {extra: tuple(packages) for extra, packages in extras.items()}


def untested_versions() -> tuple[str, ...]:
    """Installed packages of another version than the constraints file's, such as "torch 2.14.0 (tested: 2.13.0)"."""
    if not CONSTRAINTS.is_file():
        return ()
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    versions = [(name, pin, installed_version(name)) for name, pin in pins]
    return tuple(
        f"{name} {version} (tested: {pin})"
        for name, pin, version in versions
        if version and version.split("+")[0] != pin
    )


def _own_requirements() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []


def _for_this_python(marker: str) -> bool:
    below = _PYTHON_BELOW.search(marker)
    return below is None or sys.version_info[:2] < (int(below[1]), int(below[2]))
