"""What the documents say is there: commands parse, links and files exist, code runs, tables agree with the code."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import llama_export
import pytest
import tomllib
from llama_export.cli import main
from llama_export.export.gguf import blocks as gguf_blocks
from llama_export.names import PRODUCTS
from llama_export.optimize.formats import format_named, stored_bytes
from llama_export.optimize.policy import ORT
from llama_export.optimize.schemes import PRECISIONS, SCHEMES, Place
from llama_export.runtime import GenerationOptions, load
from llama_export.runtime.bundle import Limits, Manifest, ModelRecord, Shape, Tokens, open_bundle
from llama_export.runtime.generate import Result
from llama_export.runtime.proof.gates import FIGURES, all_limits
from llama_export.runtime.proof.gates import Limits as GateLimits
from llama_export.runtime.proof.reference import Index, Logits, Prompt, WeightRecord
from llama_export.runtime.quality import End, EndFigures, Interval, Matrix, MeasuredText, Prediction, Quality
from llama_export.settings import FILE_NAME
from llama_export.targets.devices import load_target
from support.tiny_bundle import random_llama, write_bundle
from support.tiny_tensorrt import write_tensorrt_bundle

ROOT = Path(llama_export.__file__).parent
README, ARCHITECTURE, BUNDLE, PARITY = (
    ROOT / name for name in ("README.md", "docs/architecture.md", "docs/bundle.md", "docs/parity.md")
)
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {
    "ort": ROOT / "docs/examples/plain_onnxruntime.py",
    "trt": ROOT / "docs/examples/plain_tensorrt_graph.py",
    "trt-primitive": ROOT / "docs/examples/plain_tensorrt_graph.py",
}
PICTURES = sorted((ROOT / "docs").glob("*.svg"))
FOLDERS = ("benchmarks", "docs", "export", "optimize", "runtime", "targets", "tests")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, and the heading that it stands under."""

    language: str
    heading: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    language, heading, lines = None, "", []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language is not None:
                yield Block(language, heading, "\n".join(lines))
            language, lines = (line[3:].strip(), []) if language is None else (None, [])
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert language is None, f"{page} has a block without an end"


def command_lines(page: Path) -> list[tuple[Block, str]]:
    """Lines of `sh` blocks, and those behind a `$` in blocks of output."""
    found = []
    for block in blocks(page):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language == "sh":
            found += [(block, line) for line in lines if line.strip() and not line.startswith("#")]
        else:
            found += [(block, line[2:]) for line in lines if line.startswith("$ ")]
    return found


def settings_above(page: Path, block: Block) -> str | None:
    """The llama-export.toml that the page shows under the same heading, for commands that need it."""
    shown = (one.text for one in blocks(page) if one.language == "toml" and one.heading == block.heading)
    return next((text for text in shown if "[build]" in text), None)


def words_of(line: str) -> list[list[str]]:
    """The commands of a line, each as its words; `|` separates them."""
    commands: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "|":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


ALL_COMMANDS = [
    pytest.param(settings_above(page, block), words, id=f"{page.name}: {shlex.join(words)}")
    for page in PAGES
    for block, line in command_lines(page)
    for words in words_of(line)
]


OTHERS = (".", "echo", "python3", "rsync", "sudo")
"""What pages tell to run that is none of ours."""


@pytest.mark.parametrize(("settings", "words"), ALL_COMMANDS)
def test_commands_can_be_given_so(
    settings: str | None, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if settings is not None:
        (tmp_path / FILE_NAME).write_text(settings)
    tool, *arguments = words
    ours = {
        "llama-export": parse_ours,
        "make": parse_make,
        "pip": parse_pip,
        "python": parse_python,
        "pytest": parse_pytest,
    }
    (ours | dict.fromkeys(OTHERS, len))[tool](arguments)


def parse_ours(arguments: list[str]) -> None:
    name, *rest = arguments
    with click.Context(main, info_name="llama-export") as parent:
        main.commands[name].make_context(name, rest, parent=parent)


def parse_make(arguments: list[str]) -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(arguments) <= set(rules)


def parse_pip(arguments: list[str]) -> None:
    extras = project()["optional-dependencies"]
    action, *rest = arguments
    assert action in ("install", "wheel")
    for before, word in zip(["", *rest], rest, strict=False):
        if before == "-c":
            assert (ROOT / word).is_file()
        elif bracket := re.search(r"\[(.*)]", word):
            assert set(bracket[1].split(",")) <= set(extras)


def parse_python(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file()


def parse_pytest(arguments: list[str]) -> None:
    offered = re.findall(r'"(--llama-[\w-]+)"', (ROOT / "pytest_plugin.py").read_text())
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= set(offered)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_wrong_commands_would_be_noticed() -> None:
    for words in (["build", "--presicion", "int4"], ["build", "-m", "x", "-t", "cpu"], ["run", "b", "--top-k", "x"]):
        with pytest.raises(click.UsageError):
            parse_ours(words)
    with pytest.raises(KeyError):
        parse_ours(["bake"])
    with pytest.raises(AssertionError):
        parse_pip(["install", ".[builds]"])


def test_a_target_of_ones_own_is_one(tmp_path: Path) -> None:
    block = next(block for block in blocks(README) if block.language == "toml" and "base" in block.text)
    path = tmp_path / block.text.splitlines()[0].removeprefix("# ")
    path.write_text(block.text)
    assert load_target(str(path)).usable_gb == 3


def test_the_readme_names_every_command_extra_and_exit_code() -> None:
    text = README.read_text(encoding="utf-8")
    assert re.findall(r"^\| `llama-export (\w+)` \|", text, re.MULTILINE) != []
    assert set(re.findall(r"^\| `llama-export (\w+)` \|", text, re.MULTILINE)) == set(main.commands)
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(project()["optional-dependencies"])
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == ["0", "1", "2", "130"]
    keys = {field.name for field in dataclasses.fields(Result)} | {"model", "backend", "threads"}
    assert keys <= set(re.findall(r"`(\w+)`", text))


LINKS = [
    pytest.param(page, target, id=f"{page.name}: {target}")
    for page in PAGES
    for target in sorted(set(re.findall(r"]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))))
    if "://" not in target
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    assert path.is_file()
    if anchor:
        headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


NAMED = sorted(
    {
        (page, name)
        for page in PAGES
        for name in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8"))
        if (name.split("/")[0] in FOLDERS and "/" in name) or name.endswith((".py", ".md", ".txt"))
    }
)


@pytest.mark.parametrize(("page", "name"), [pytest.param(*named, id=f"{named[0].name}: {named[1]}") for named in NAMED])
def test_files_that_are_named_exist(page: Path, name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_pictures_are_well_formed_and_stand_alone(picture: Path) -> None:
    root = ET.parse(picture).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert root.get("viewBox")
    assert {f"{space}title", f"{space}desc"} <= {child.tag for child in root}
    for element in root.iter():
        assert element.tag != f"{space}script"
        assert not any(name.endswith("href") for name in element.attrib)
    assert any(picture.name in page.read_text(encoding="utf-8") for page in PAGES)


def rows_of(page: Path, first: str) -> list[list[str]]:
    """The rows of the table whose header begins with the cells `first`, without header and rule."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def told_limit(limits: GateLimits, figure: str) -> str:
    """A limit as the table of docs/parity.md tells it."""
    more = FIGURES[figure].at_least if figure in FIGURES else False
    scaled = f", or {limits.scaled:g} times the largest logit" if figure == "difference" else ""
    return f"at {'least' if more else 'most'} {limits.limits[figure]:g}{scaled}"


def test_the_limits_of_verify_are_told_as_they_are() -> None:
    expected = [
        [f"`{limits.line}`", limits.setting, f"`{figure}`", told_limit(limits, figure), limits.reasons[figure]]
        for limits in all_limits()
        for figure in limits.limits
    ]
    assert rows_of(PARITY, "question | setting") == expected


def test_every_key_of_a_manifest_is_explained() -> None:
    parts = {"model": ModelRecord, "shape": Shape, "limits": Limits, "tokens": Tokens}
    keys = {
        f"{field.name}.{inner.name}" if field.name in parts else field.name
        for field in dataclasses.fields(Manifest)
        for inner in (dataclasses.fields(parts[field.name]) if field.name in parts else [field])
    }
    told = set()
    for cell, *_ in rows_of(BUNDLE, "key"):
        prefix = ""
        for name in re.findall(r"`([\w.]+)`", cell):
            prefix = prefix if name.startswith(".") else name.partition(".")[0]
            told.add(f"{prefix}{name}" if name.startswith(".") else name)
    assert told == keys


def test_every_key_of_a_reference_is_explained() -> None:
    text = BUNDLE.read_text(encoding="utf-8")
    names = {field.name for kind in (Index, Prompt, WeightRecord, Logits) for field in dataclasses.fields(kind)}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_every_key_of_a_quality_report_is_explained() -> None:
    told = {
        name.removeprefix("end.").removeprefix("text.").lstrip(".")
        for table in ("key of the quality", "figure of `end.weights` and `end.shipped`")
        for row in rows_of(BUNDLE, table)
        for name in re.findall(r"`([\w.]+)`", " ".join(row))
    }
    parts = (Quality, MeasuredText, End, EndFigures, Interval, Matrix, Prediction)
    names = {field.name for kind in parts for field in dataclasses.fields(kind)}
    assert names - told == {"text", "end"}, "these two are what others begin with"


def test_every_pass_is_described() -> None:
    folders = ("fuse", "ort", "primitive", "shared", "trt")
    files = [path for folder in folders for path in (ROOT / "optimize" / folder).glob("*.py")]
    passes = {path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"}
    told = {row[0].strip("`") for table in ("pass", "TensorRT pass") for row in rows_of(ARCHITECTURE, table)}
    assert told == passes | {"optimize/stamp.py"}


def test_the_bits_of_formats_are_right() -> None:
    rows = {row[0].strip("`"): row[2:4] for row in rows_of(ARCHITECTURE, "format")}
    ours = {ORT.precisions[name].name for name in PRECISIONS if name in ORT.precisions}
    assert rows.keys() >= ours | {format.name for format in gguf_blocks.FORMATS.values()}
    for name, cells in rows.items():
        format = format_named(name)
        assert format is not None
        bits = [stored_bytes((1, 256), format, scale_bytes) * 8 / 256 for scale_bytes in (4, 2)]
        assert [float(cell) for cell in cells] == bits


def test_every_word_of_precision_is_told_where_it_runs() -> None:
    """The table of schemes has a row for each word and backend, with what the registry says."""
    told = {(row[0].strip("`"), row[1]): row[2:] for row in rows_of(ARCHITECTURE, "scheme")}
    places = {(name, place_name(place)): place for name in PRECISIONS for place in SCHEMES[name].places}
    assert told.keys() == places.keys()
    for key, place in places.items():
        capability = place.since or "any"
        assert told[key] == [f"`{place.format.name}`", place.version, capability, place.activations], key


def place_name(place: Place) -> str:
    """A backend as the table calls it."""
    return PRODUCTS[place.backend] + (f", {place.on.upper()}" if place.on else "")


def test_the_document_shows_the_examples_as_they_are() -> None:
    shown = [block.text for block in blocks(BUNDLE) if block.language == "python"]
    examples = [path.read_text(encoding="utf-8") for path in dict.fromkeys(EXAMPLES.values())]
    assert shown == [text.split('"""\n\n', 1)[1].rstrip("\n") for text in examples]


def printed_by_example(bundle: Path, prompt: str) -> str:
    dialect = open_bundle(bundle).manifest.dialect
    command = [sys.executable, str(EXAMPLES[dialect]), str(bundle), prompt]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("dialect", EXAMPLES)
def test_the_example_writes_what_the_runtime_writes(dialect: str, tmp_path: Path) -> None:
    if dialect == "ort":
        write_bundle(tmp_path)
    else:
        write_tensorrt_bundle(tmp_path, dialect)
    model = load(tmp_path, backend="onnxruntime")
    result = model.generate("odd sizes", GenerationOptions(max_new_tokens=32))
    new = [token for token in result.token_ids if token not in model.bundle.manifest.tokens.eos]
    expected = model.tokenizer.decode([*model.tokenizer.encode("odd sizes"), *new])
    assert len(new) > 1
    assert printed_by_example(tmp_path, "odd sizes") == expected + "\n"


@pytest.mark.smollm2
def test_the_example_writes_what_the_runtime_writes_with_a_real_model(smollm2_bundle: Path) -> None:
    prompt = "Once upon a time"
    result = load(smollm2_bundle).generate(prompt, GenerationOptions(max_new_tokens=32))
    assert printed_by_example(smollm2_bundle, prompt) == f"{prompt}{result.text}\n"


OUR_PYTHON = [block for page in PAGES for block in blocks(page) if "from llama_export" in block.text]


@pytest.mark.parametrize("block", OUR_PYTHON, ids=lambda block: block.heading)
def test_python_in_the_documents_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "bundles/smollm2", random_llama(positions=256), context=256)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.heading, "exec"), {})


def test_all_python_in_the_documents_compiles() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.language == "python"]
    assert OUR_PYTHON
    for block in found:
        compile(block.text, block.heading, "exec")
