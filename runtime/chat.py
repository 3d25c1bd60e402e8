"""A conversation as the model was trained to see it: the bundle's chat template, applied to messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LlamaExportError, UsageError
from .bundle import Bundle

Message = Mapping[str, Any]
"""`role` ("system", "user", "assistant", ...), `content`, and whatever else the template reads; JSON values only."""

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_MAX_BYTES = 64 << 20  # tokenizer_config.json lists every added token


class ChatTemplate:
    """A template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: by variable name, such as bos_token. Raises LlamaExportError when `source` is not valid."""
        from .template_sandbox import BoundedTemplate  # noqa: PLC0415 (jinja2 is not needed to complete text)

        self._template = BoundedTemplate(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the conversation as text, by default up to where the assistant's next answer begins.

        The same as transformers' `apply_chat_template(messages, tokenize=False)`; special tokens are already in it,
        so it is encoded with `special=False`. variables: passed to the template, such as tools. Raises UsageError
        when messages hold more than JSON can, LlamaExportError when the template fails or refuses them.
        """
        try:  # the template gets plain copies: objects of other types have methods that no sandbox knows
            plain = json.loads(json.dumps({"messages": list(messages), "tools": None, "documents": None, **variables}))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"Messages must hold only text, numbers, lists and objects: {error}.") from error
        return self._template.render({**self._special_tokens, **plain, "add_generation_prompt": add_generation_prompt})


def load_chat_template(bundle: Bundle) -> ChatTemplate:
    """Return the bundle's template: chat_template.jinja, else the one in tokenizer_config.json.

    Raises LlamaExportError when there is none, or it is not valid.
    """
    config = _read_config(bundle)
    source = _source(bundle, config)
    if source is None:
        raise LlamaExportError(
            f"The bundle {bundle.path} has no chat template, as its checkpoint is no chat model; "
            "use it without --chat, or add chat_template.jinja to the checkpoint and build again."
        )
    return ChatTemplate(source, special_tokens(config))


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens in a tokenizer_config.json: each is a string, or an object that holds it."""
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in contents.items() if isinstance(value, str)}


def _source(bundle: Bundle, config: Mapping[str, Any]) -> str | None:
    if TEMPLATE_FILE in bundle.manifest.files:
        return _read(bundle, TEMPLATE_FILE)
    return configured_template(config)


def configured_template(config: Mapping[str, Any]) -> str | None:
    """The chat template in a tokenizer_config.json, where older checkpoints have it."""
    found = config.get("chat_template")
    if isinstance(found, list):  # several templates by name, of which transformers takes this one when none is named
        items = [item for item in found if isinstance(item, dict) and isinstance(item.get("name"), str)]
        found = {item["name"]: item.get("template") for item in items}.get("default")
    return found if isinstance(found, str) else None


def _read_config(bundle: Bundle) -> Mapping[str, Any]:
    if _CONFIG_FILE not in bundle.manifest.files:
        return {}
    try:
        config = json.loads(_read(bundle, _CONFIG_FILE))
    except (ValueError, RecursionError) as error:
        raise LlamaExportError(f"{bundle.file(_CONFIG_FILE)} is not valid JSON ({error}); build again.") from error
    return config if isinstance(config, dict) else {}


def _read(bundle: Bundle, name: str) -> str:
    path = bundle.file(name)
    if bundle.manifest.files[name].size > _MAX_BYTES:
        raise LlamaExportError(f"{path} is larger than any such file needs to be; build the bundle again.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlamaExportError(f"{path} cannot be read as UTF-8 text ({error}); build the bundle again.") from error
