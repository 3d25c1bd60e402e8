"""What importing a test file imports, itself or through a file of ours, found by reading."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
_OURS = {"llama_export": TESTS.parent, "support": TESTS / "support"}


def imported_packages(path: Path) -> set[str]:
    """The top-level names of all that is imported when `path` is; imports inside of functions do not count."""
    found: set[str] = set()
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            for name in _names(file):
                ours = _file_of(name)
                found.add(name.split(".")[0])
                waiting.extend([ours] if ours else [])
    return found


def _names(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1] if node.level else None
            base = ("llama_export", *folder.relative_to(TESTS.parent).parts) if folder else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _file_of(name: str) -> Path | None:
    package, *rest = name.split(".")
    if package not in _OURS:
        return None
    place = _OURS[package].joinpath(*rest)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)
