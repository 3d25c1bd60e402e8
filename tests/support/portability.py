"""Reading a module for what works on Unix alone, where nothing asks before on which system it is."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.unix_only import ATTRIBUTES, KEYWORDS, METHODS, MODULES, is_unix_only

_ASKED = {("sys", "platform"), ("os", "name")}
_TEXT_METHODS = {"read_text": 0, "write_text": 1}
"""Where `encoding` stands among the arguments."""


def findings(source: str) -> list[str]:
    """Lines and what is wrong there: "12: os.getuid"."""
    finder = _Finder()
    finder.statements(ast.parse(source).body, guarded=False)
    return [f"{line}: {what}" for line, what in sorted(set(finder.found))]


class _Finder:
    """Goes through statements in their order, and knows at each whether a question about the system came before."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def statements(self, body: Iterable[ast.stmt], *, guarded: bool) -> None:
        for statement in body:
            asks = isinstance(statement, (ast.If, ast.Assert)) and _asks(statement.test)
            self._node(statement, guarded or asks)
            # `assert` and `if not ...: return` hold for all that follows
            if asks and (isinstance(statement, ast.Assert) or _ends(statement.body)):
                guarded = True

    def _node(self, node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.Try) and {"ImportError", "ModuleNotFoundError", "AttributeError"} & _caught(node):
            self.statements(node.body, guarded=True)
            self.statements([*(line for one in node.handlers for line in one.body), *node.finalbody], guarded=guarded)
            return
        if isinstance(node, ast.With) and {"ImportError", "AttributeError"} & _suppressed(node):
            guarded = True
        if isinstance(node, ast.IfExp) and _asks(node.test):
            guarded = True
        if isinstance(node, ast.BoolOp) and _asks(node.values[0]):
            guarded = True
        if not guarded:
            self.found += ((node.lineno, what) for what in _unix(node))  # type: ignore[attr-defined]
        self.found += ((node.lineno, what) for what in _careless(node))  # type: ignore[attr-defined]
        if isinstance(node, ast.With) and "OSError" in _suppressed(node):
            self._children(node, guarded, renames=True)
        else:
            self._children(node, guarded)

    def _children(self, node: ast.AST, guarded: bool, *, renames: bool = False) -> None:
        before = len(self.found)
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.statements(value, guarded=guarded)
                continue
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, ast.AST):
                    self._node(one, guarded)
        if renames:  # one that fails is taken for what it is: a cache that is not kept
            self.found[before:] = [found for found in self.found[before:] if "rename" not in found[1]]


def _asks(test: ast.expr) -> bool:
    """Whether an expression asks for the system, or whether something is there."""
    for node in ast.walk(test):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in _ASKED:
                return True
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            return True
    return False


def _ends(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue))


def _caught(node: ast.Try) -> set[str]:
    kinds = [handler.type for handler in node.handlers]
    return {name.id for kind in kinds if kind for name in ast.walk(kind) if isinstance(name, ast.Name)}


def _suppressed(node: ast.With) -> set[str]:
    calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
    return {
        argument.id
        for call in calls
        if ast.unparse(call.func).endswith("suppress")
        for argument in call.args
        if isinstance(argument, ast.Name)
    }


def _unix(node: ast.AST) -> Iterator[str]:
    """What of this node alone works on Unix only."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        if node.module in MODULES:
            yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names if is_unix_only(node.module, alias.name))
    elif isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id in ATTRIBUTES and is_unix_only(node.value.id, node.attr):
            yield f"{node.value.id}.{node.attr}"
        elif node.attr in METHODS:
            yield node.attr
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func).split(".")[-1]
        yield from (f"{name}({word.arg}=)" for word in node.keywords if word.arg in KEYWORDS.get(name, ()))
        if name == "CDLL" and node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value is None:
            yield "ctypes.CDLL(None)"


def _careless(node: ast.AST) -> Iterator[str]:
    """Text read or written by the code page of the country, and renames that an open file prevents on Windows."""
    if not isinstance(node, ast.Call):
        return
    name, words = ast.unparse(node.func).split(".")[-1], {word.arg for word in node.keywords}
    if name in _TEXT_METHODS and len(node.args) <= _TEXT_METHODS[name] and "encoding" not in words:
        yield f"{name} without encoding"
    if name == "open" and ast.unparse(node.func) != "os.open" and "encoding" not in words:
        modes = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        if not any(isinstance(one, ast.Constant) and "b" in str(one.value) for one in modes):
            yield "open without encoding"
    if isinstance(node.func, ast.Attribute) and name in ("replace", "rename") and len(node.args) == 1 and not words:
        yield f"{name} of a file: rename by runtime.files"


def device_modules(root: Path, commands: frozenset[str]) -> dict[str, Path]:
    """Every module of the package that these commands import, wherever in a function, by name; and all of runtime. Not
    those of export/, which `verify --bisect` takes and no device has the packages of.
    """
    waiting = [*(root / "runtime").rglob("*.py"), root / "targets" / "engine_child.py", root / "__main__.py"]
    found: dict[str, Path] = {}
    while waiting:
        path = waiting.pop()
        name = path.relative_to(root).as_posix()
        if name not in found and not name.startswith("export/"):
            found[name] = path
            waiting.extend(_imported(root, path, commands if name == "cli.py" else None))
    return found


def _imported(root: Path, path: Path, commands: frozenset[str] | None) -> Iterator[Path]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    others = [] if commands is None else [one for one in tree.body if isinstance(one, ast.FunctionDef)]
    left_out = {id(inner) for one in others if one.name not in (commands or ()) for inner in ast.walk(one)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in left_out:
            continue
        folder = path.parents[node.level - 1]
        base = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
        for place in (base, *(base / alias.name for alias in node.names)):
            yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())
