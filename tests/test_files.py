"""Replacing files as Windows lets one, with its refusals made by hand: none of this ran there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llama_export.errors import LlamaExportError
from llama_export.runtime import files
from llama_export.runtime.files import replace


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Lets the first so many renames fail as Windows does it (ERROR_ACCESS_DENIED), and counts them."""

    def install(count: int) -> list[int]:
        tried: list[int] = []
        real = Path.replace

        def rename(part: Path, path: Path) -> Path:
            tried.append(1)
            if len(tried) <= count:
                raise PermissionError(13, "Access is denied", str(part), 5, str(path))
            return real(part, path)

        monkeypatch.setattr(Path, "replace", rename)
        monkeypatch.setattr(files.time, "sleep", lambda _: None)
        return tried

    return install


def two_files(folder: Path) -> tuple[Path, Path]:
    part, path = folder / "engine.plan.part", folder / "engine.plan"
    part.write_bytes(b"new")
    path.write_bytes(b"old")
    return part, path


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    part, path = two_files(tmp_path)
    replace(part, path)
    assert path.read_bytes() == b"new"
    assert not part.exists()


@pytest.mark.parametrize("times", [1, 4])
def test_windows_is_asked_again_where_a_scanner_has_the_file(
    times: int, tmp_path: Path, refusing: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WINDOWS", True)
    part, path = two_files(tmp_path)
    tried = refusing(times)
    replace(part, path)
    assert (path.read_bytes(), len(tried)) == (b"new", times + 1)


def test_a_file_that_stays_open_on_windows_is_told_in_one_sentence(
    tmp_path: Path, refusing: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WINDOWS", True)
    part, path = two_files(tmp_path)
    refusing(99)
    with pytest.raises(LlamaExportError, match=r"engine\.plan cannot be replaced, as a program has it .*try again\.$"):
        replace(part, path)
    assert (part.read_bytes(), path.read_bytes()) == (b"new", b"old")


def test_elsewhere_a_refusal_is_one_of_rights(tmp_path: Path, refusing: Callable[[int], list[int]]) -> None:
    part, path = two_files(tmp_path)
    tried = refusing(99)
    with pytest.raises(PermissionError):
        replace(part, path)
    assert len(tried) == 1
