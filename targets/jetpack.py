"""NVIDIA's system releases for Jetson, and what each brings.

Source: NVIDIA's JetPack and Jetson Linux release notes, read 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JetPack:
    """One release: `l4t` holds the Jetson Linux versions it stands on, as they are named in /etc/nv_tegra_release."""

    version: str
    l4t: tuple[str, ...]
    cuda: str
    tensorrt: str
    python: str


JETPACKS = {
    release.version: release
    for release in (
        JetPack("5.1", ("35",), "11.4", "8.5.2", "3.8"),
        JetPack("6.0", ("36.3",), "12.2", "8.6.2", "3.10"),
        JetPack("6.1", ("36.4.0",), "12.6", "10.3.0", "3.10"),
        JetPack("6.2", ("36.4", "36.5"), "12.6", "10.3.0", "3.10"),
        JetPack("7.0", ("38.2",), "13.0", "10.13.3", "3.12"),
        JetPack("7.1", ("38.4",), "13.0", "10.13.3", "3.12"),
        JetPack("7.2", ("39.2",), "13.2", "10.16.2", "3.12"),
    )
}


def jetpack_of_l4t(l4t: str) -> JetPack | None:
    """The release that stands on Jetson Linux `l4t` ("36.4.3"), by the longest matching prefix; None when unknown."""
    known = [(prefix, release) for release in JETPACKS.values() for prefix in release.l4t]
    fitting = [pair for pair in known if f"{l4t}.".startswith(f"{pair[0]}.")]
    return max(fitting, key=lambda pair: len(pair[0]))[1] if fitting else None
