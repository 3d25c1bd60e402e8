"""Rendering a Jinja template that came with a checkpoint: foreign code, so sandboxed, and bounded in time and size.

Jinja's sandbox keeps templates from reaching Python's internals, but not from running for ever. Here every loop
iteration and macro call passes a clock, and whatever grows a text or a number (operators, `~`, output, `set` blocks)
a limit. A filter can still ask for much memory at once, as `center(10**9)` does, and then fails with a MemoryError on
a small machine.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..errors import LlamaExportError

MAX_SOURCE = 1 << 20
"""Characters of a template; the longest in use have some ten thousand."""

MAX_TEXT = 1 << 23
"""Characters of the result and of every text on the way: some two million tokens."""

MAX_NUMBER = 1 << 63

MAX_SECONDS = 5.0


class BoundedTemplate:
    """A compiled template with the names and filters that transformers gives. Threads may share it."""

    def __init__(self, source: str) -> None:
        """Compile `source`. Raises LlamaExportError when it is too long or no valid template."""
        if len(source) > MAX_SOURCE:
            raise LlamaExportError(f"The chat template has {len(source)} characters, more than {MAX_SOURCE}.")
        self._lock = threading.Lock()
        try:
            self._environment = _Environment()
            self._template = self._environment.from_string(_Guards().visit(self._environment.parse(source)))
        except Exception as error:  # also RecursionError and SyntaxError, from absurdly nested templates
            raise LlamaExportError(f"The chat template is not valid: {_describe(error)}.") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text. Raises LlamaExportError for whatever the template raises, and when it exceeds a bound."""
        with self._lock:
            self._environment.deadline = time.monotonic() + MAX_SECONDS
            try:
                return self._template.render(**variables)
            except Exception as error:  # a template is foreign code: it can raise anything
                raise LlamaExportError(f"The chat template cannot be rendered: {_describe(error)}.") from error


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return (kind + lines[0][:300]).rstrip(".") if lines else type(error).__name__


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' settings, and the limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.deadline = 0.0
        self.filters["tojson"] = _to_json
        self.globals = {
            **{name: self.globals[name] for name in ("range", "cycler", "joiner")},
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.concat = self.bounded_concat  # type: ignore[method-assign]

    def tick(self) -> str:
        """Called in every loop iteration and macro call."""
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:.0f} seconds")
        return ""

    def bounded_concat(self, parts: Iterable[str]) -> str:
        """Join the output of a template, macro or `set` block, giving up as soon as it is too long."""
        kept, length = [], 0
        for part in parts:
            length += len(part)
            _check_length(length)
            kept.append(part)
        return "".join(kept)

    def tilde(self, *parts: object) -> str:
        """The operator `~`."""
        return self.bounded_concat(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_number((left.bit_length() - 1) * right < 64)  # a lower bound, before the number is computed
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, Sequence) and isinstance(count, int):
                    _check_length(len(sequence) * count)
        if operator == "+" and isinstance(left, Sequence) and isinstance(right, Sequence):
            _check_length(len(left) + len(right))
        result = super().call_binop(context, operator, left, right)
        _check_number(not isinstance(result, int) or abs(result) < MAX_NUMBER)
        return result


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise SecurityError(f"it makes a text of more than {MAX_TEXT} characters")


def _check_number(fits: bool) -> None:
    if not fits:
        raise SecurityError("it makes a number of more than 64 bits")


class _Guards(NodeTransformer):
    """Puts a tick into every loop and macro, and `tilde` in place of `~`.

    EnvironmentAttribute is a name that no template can write or shadow.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (jinja2's naming)
        return self._with_tick(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._with_tick(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("tilde", node.nodes, node.lineno)

    def _with_tick(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno))
        return node  # type: ignore[no-any-return]


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=line)


class _GenerationBlock(Extension):
    """`{% generation %}`: marks what the model said, for training; its content is rendered as it is."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(...)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)` that refuses names with a leading underscore, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template's variable may be named self
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores the name {name!r}, which begins with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers writes it: Jinja's own filter escapes HTML, which models are not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
