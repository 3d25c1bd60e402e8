"""Chat templates: equal to transformers on the styles in use, closed to Python, and bounded whatever they contain."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.runtime import template_sandbox
from llama_export.runtime.chat import ChatTemplate, load_chat_template, special_tokens
from llama_export.runtime.template_sandbox import BoundedTemplate
from support.tiny_bundle import byte_tokenizer, write_bundle

CHATML = """{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}
{% set head = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '' %}
{% set text = head + message['content'] %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + text + ' ' + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- set ns = namespace(count=0, last='') %}
{%- macro header(role) %}<|start|>{{ role }}<|stop|>

{% endmacro %}
{%- if tools is not none %}{{- tools | tojson(indent=2) }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.content is mapping or message.content is iterable and message.content is not string %}
        {{- header(message.role) ~ (message.content | map(attribute='text') | join(', ')) ~ '<|eot|>' }}
    {%- else %}
        {{- header(message.role) ~ message.content | trim ~ '<|eot|>' }}
    {%- endif %}
    {%- if ns.count >= 5 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}
{{ ns.count }} of {{ messages | length }}, {{ date_string }}
"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>&amp; 'you'</b>"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  東京?\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("template", [CHATML, LLAMA2, LLAMA3], ids=["chatml", "llama2", "llama3"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "three"])
@pytest.mark.parametrize("prompted", [True, False])
def test_equal_to_transformers(template: str, messages: list[dict[str, Any]], prompted: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **TOKENS)
    reference.chat_template = template
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
    assert ChatTemplate(template, TOKENS).render(messages, add_generation_prompt=prompted) == expected


def test_variables_and_structured_content_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **TOKENS)
    reference.chat_template = LLAMA3
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "é<"}]}] * 7
    tools = [{"name": "f", "parameters": {"x": "<int>"}}]
    expected = reference.apply_chat_template(messages, tools=tools, tokenize=False, date_string="today")
    ours = ChatTemplate(LLAMA3, TOKENS).render(messages, add_generation_prompt=False, tools=tools, date_string="today")
    assert ours == expected
    assert "5 of 7" in ours


def test_a_template_can_refuse_messages() -> None:
    with pytest.raises(LlamaExportError, match="cannot be rendered: Roles must alternate user"):
        ChatTemplate(LLAMA2, TOKENS).render([{"role": "assistant", "content": "x"}])


def test_messages_must_be_plain() -> None:
    with pytest.raises(UsageError, match="only text, numbers, lists and objects"):
        ChatTemplate(CHATML, TOKENS).render([{"role": "user", "content": Path("x")}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{% for x in [1, 2] recursive %}{% if loop.depth < 40 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    ],
    ids=["loops", "macro", "recursion"],
)
def test_endless_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(LlamaExportError, match="it takes more than"):
        BoundedTemplate(source).render({})
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x %}{{ n.x * 2 }}{% endset %}{% endfor %}",
        "{{ 'ab' * 99999999999 }}",
        "{{ 99999999999 * [1] }}",
        "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    ],
)
def test_texts_are_bounded(source: str) -> None:
    with pytest.raises(LlamaExportError, match="more than 8388608 characters"):
        BoundedTemplate(source).render({})


@pytest.mark.parametrize("source", ["{{ 9 ** 9 ** 9 }}", "{{ 10 ** 19 }}", "{{ 4294967296 * 4294967296 }}"])
def test_numbers_are_bounded(source: str) -> None:
    with pytest.raises(LlamaExportError, match="more than 64 bits"):
        BoundedTemplate(source).render({})


def test_small_arithmetic_works() -> None:
    assert BoundedTemplate("{{ 2 ** 62 }} {{ 7 * 6 }} {{ '%02d' % 5 }} {{ [1] + [2] }} {{ 2 ** -1 }}").render({}) == (
        "4611686018427387904 42 05 [1, 2] 0.5"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "underscore"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ range(10000000) }}", "MAX_RANGE"),
        ("{{ lipsum(n=1000000) }}", "undefined"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{% if %}", "is not valid: Expected an expression"),
        ("{% for i in x %}" * 30 + "{% endfor %}" * 30, "is not valid: SyntaxError"),
        ("x" * ((1 << 20) + 1), "has 1048577 characters"),
    ],
)
def test_faults_are_one_sentence(source: str, message: str) -> None:
    with pytest.raises(LlamaExportError, match=message) as caught:
        BoundedTemplate(source).render({"messages": []})
    assert "\n" not in str(caught.value)


def test_special_tokens_in_both_spellings() -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True, "x": "y"}
    assert special_tokens(config | {"pad_token": None}) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_where_a_bundle_keeps_its_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}]
    first = write_bundle(tmp_path / "a")
    assert load_chat_template(first).render(messages) == "<s>[user]q<|end|>[assistant]"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{{ eos_token }}one", "</s>one"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "default", "template": "first"}, {"name": "default", "template": "last"}], "last"),
        ([{"name": "only", "template": "o"}], None),
        ([{"name": ["default"], "template": "o"}, {"template": "x"}, 3, {"name": "default", "template": "d"}], "d"),
        ([{"name": "default", "template": ["d"]}], None),
        ([], None),
        (None, None),
        (7, None),
    ],
)
def test_a_template_in_the_tokenizers_settings(tmp_path: Path, value: object, expected: str | None) -> None:
    config = {"eos_token": "</s>", "chat_template": value}
    bundle = write_bundle(tmp_path, template=None, extra={"tokenizer_config.json": json.dumps(config).encode()})
    if expected is None:
        with pytest.raises(LlamaExportError, match=r"has no chat template.*without --chat"):
            load_chat_template(bundle)
    else:
        assert load_chat_template(bundle).render([]) == expected


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "a", template=None, extra={"tokenizer_config.json": b"{"})
    with pytest.raises(LlamaExportError, match="not valid JSON"):
        load_chat_template(bundle)
    bundle = write_bundle(tmp_path / "b", extra={"chat_template.jinja": b"\xff\xfe"})
    with pytest.raises(LlamaExportError, match="cannot be read as UTF-8"):
        load_chat_template(bundle)
