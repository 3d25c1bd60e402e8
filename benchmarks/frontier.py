"""Measures quality against bytes: our quantised bundles beside what users would pick instead, on the same weights.

    python benchmarks/frontier.py SOURCE --work FOLDER --json FILE --text FILE[:SKIP]... [--seed N]... [--as-is]
        [--ours 'NAME: BUILD OPTIONS']... [--exact] [--genai PYTHON] [--llamacpp PYTHON] [--imatrix FILE]
        [--modelopt PYTHON --modelopt-text FILE] [--picture FILE.svg] [--markdown FILE]

SOURCE is a GGUF file or a Hugging Face folder. For every --seed its equal off the 4-bit grid is made (offgrid.py), or
it is taken --as-is; each tool quantises that, and what really runs is measured: a bundle by our runtime, genai's
model.onnx by ONNX Runtime, a GGUF file by llama.cpp. Texts are cut into windows that lie evenly spread after the first
SKIP bytes; every tool gets the same token ids. Against the float32 original by PyTorch: the mean KL divergence in nats,
agreement of the likeliest token, perplexity, and the bytes of all files that running needs. Intervals of 95 % are by
bootstrap over windows, the mean over seeds taken first; two tools are compared window by window. One process measures
at a time. Results are added to --json as they come: what is there is not measured again, and without tools the table
and the picture are made of it. Needs llama-export with its `build` extra, and each peer in an environment of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_export.errors import LlamaExportError
from llama_export.export.source import open_source
from numpy.typing import NDArray
from tokenizers import Tokenizer

if TYPE_CHECKING or __package__:  # a script, and importable for its tests
    from . import frontier_tools as tools
    from . import report
    from .frontier_report import Figures, markdown, points, summaries
    from .offgrid import log_normal, read_weights, write_folder, write_off_grid
    from .scatter import scatter
else:
    import frontier_tools as tools
    import report
    from frontier_report import Figures, markdown, points, summaries
    from offgrid import log_normal, read_weights, write_folder, write_off_grid
    from scatter import scatter

EXACT = ", full-precision kernels"
AS_IS = "as is"


@dataclass(frozen=True)
class Text:
    """A text to measure on: what is in the first `skip` bytes is left to tuning and calibrating."""

    file: Path
    skip: int

    @property
    def name(self) -> str:
        return self.file.name


def parse_text(given: str) -> Text:
    """Read FILE or FILE:SKIP. Raises ValueError when there is no such file."""
    name, colon, skip = given.rpartition(":")
    text = Text(Path(name), int(skip)) if colon and skip.isdecimal() else Text(Path(given), 0)
    if not text.file.is_file():
        raise ValueError(f"there is no text {text.file}; name one as FILE or FILE:SKIP")
    return text


def windows_of(text: Text, tokenizer: Tokenizer, count: int, length: int) -> NDArray[np.int64]:
    """Token ids [count, length] of windows that lie evenly spread over the text and do not overlap.

    Raises ValueError when the text is too short.
    """
    content = text.file.read_bytes()[text.skip :].decode("utf-8", errors="ignore")
    ids = np.array(tokenizer.encode(content, add_special_tokens=False).ids, np.int64)
    if len(ids) < count * length:
        raise ValueError(f"{text.name} has {len(ids)} tokens after {text.skip} bytes, but needs {count * length}")
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return np.stack([ids[start : start + length] for start in starts])


def digest(ids: NDArray[np.int64]) -> str:
    """What tells windows of token ids from others."""
    return hashlib.sha256(ids.tobytes() + str(ids.shape).encode()).hexdigest()[:16]


class Store:
    """The results of one source on some texts, in a JSON file that grows."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        """Open the file or begin it. Raises ValueError when its results are of other settings."""
        self.file = file
        self.content: dict[str, Any] = {
            "settings": settings,
            "machine": report.machine(),
            "versions": {},
            "results": [],
        }
        if not file.exists():
            return
        self.content = json.loads(file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if self.content["settings"].get(name) != value:
                raise ValueError(f"{file} was measured with another {name}; name another file for --json")

    def has(self, tool: str, model: str, text: str) -> bool:
        return any((r["tool"], r["model"], r["text"]) == (tool, model, text) for r in self.content["results"])

    def add(self, figures: Figures) -> None:
        """Add one result, and write the file."""
        self.content["results"].append(asdict(figures))
        self.save()

    def note_version(self, package: str, version: str) -> None:
        self.content["versions"][package] = version

    def save(self) -> None:
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(self.content) + "\n", encoding="utf-8")
        partial.rename(self.file)

    def figures(self) -> list[Figures]:
        return [Figures(**result) for result in self.content["results"]]


@dataclass(frozen=True)
class Bench:
    """What is measured on: the source and its name, texts as token ids by name, where things lie meanwhile."""

    source: str
    sigma: float
    work: Path
    threads: int
    texts: dict[str, NDArray[np.int64]]
    name: str

    def original(self, model: str) -> tools.Original:
        """The model `model` of the source, made once: AS_IS, or "seed N"."""
        kind = model if model == AS_IS else f"{model} sigma {self.sigma:g}"
        work = self.work / f"{Path(self.name).name} {kind}".replace(" ", "-")
        folder = work / "original"
        if not folder.exists():
            work.mkdir(parents=True, exist_ok=True)
            if model == AS_IS:
                source = open_source(self.source)
                write_folder(source, read_weights(source), folder)
            else:
                write_off_grid(self.source, folder, log_normal(self.sigma), int(model.split()[1]))
        return tools.Original(folder, work, self.threads)

    def reference(self, original: tools.Original, text: str) -> Path:
        """What the original computes on a text, made once."""
        folder = original.work / f"reference-{digest(self.texts[text])}"
        if not folder.exists():
            ids, partial = original.work / "ids.npy", original.work / "reference-partial"
            np.save(ids, self.texts[text])
            shutil.rmtree(partial, ignore_errors=True)
            worker = str(tools.WORKERS / "quality_torch.py")
            folders = ("reference", str(original.folder), str(partial))
            tools.run(
                [sys.executable, worker, *folders, "--ids", str(ids), "--threads", str(self.threads)], self.threads
            )
            partial.rename(folder)
        return folder

    def measure(self, tool: tools.Tool, model: str, store: Store) -> None:
        """Make a tool's model of one original, measure it on the texts that lack it, and remove it.

        Raises RuntimeError when the tool fails.
        """
        names = [tool.name, *([tool.name + EXACT] if tool.exact else [])]
        missing = {name: [text for text in self.texts if not store.has(name, model, text)] for name in names}
        if not any(missing.values()):
            return
        original = self.original(model)
        store.note_version(tool.package, report.version(tool.python, tool.package))
        place = original.work / "made"
        _remove(place)
        try:
            tool.make(original, place)
            size = tools.needed_bytes(place)
            for name, texts in missing.items():
                folders = [self.reference(original, text) for text in texts]
                exact = name != tool.name
                found = tools.measure(tool, place, folders, self.threads, exact=exact) if texts else []
                for text, values in zip(texts, found, strict=True):
                    loss = np.load(self.reference(original, text) / "original.npz")["losses"].mean(1).tolist()
                    store.add(Figures(name, tool.group, model, text, size, original_nll=loss, **values))
        finally:
            _remove(place)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def chosen_tools(arguments: argparse.Namespace) -> Iterator[tools.Tool]:
    """The tools that were asked for, ours first. Raises ValueError for options that do not go together."""
    for spec in arguments.ours:
        yield tools.ours(spec, exact=arguments.exact)
    if arguments.genai:
        yield from (tools.genai(arguments.genai, method) for method in arguments.genai_methods.split(","))
    if arguments.llamacpp:
        kinds = arguments.llamacpp_types.split(",")
        yield from (tools.llamacpp(arguments.llamacpp, kind) for kind in kinds)
        if arguments.imatrix:
            yield from (tools.llamacpp(arguments.llamacpp, kind, arguments.imatrix.resolve()) for kind in kinds)
    if arguments.modelopt:
        if not arguments.modelopt_text:
            raise ValueError("--modelopt needs --modelopt-text FILE to calibrate on")
        text = arguments.modelopt_text.resolve()
        yield from (tools.modelopt(arguments.modelopt, name, text) for name in arguments.modelopt_configs.split(","))


def measure_all(bench: Bench, chosen: Sequence[tools.Tool], models: Sequence[str], store: Store) -> list[str]:
    """Measure every tool on every model; returns what failed, which does not keep the others from being measured."""
    failed = []
    for model in models:
        for tool in chosen:
            print(f"{model}: {tool.name}", file=sys.stderr, flush=True)
            try:
                bench.measure(tool, model, store)
            except RuntimeError as error:
                print(f"frontier.py: {tool.name}: {error}", file=sys.stderr, flush=True)
                failed.append(f"{tool.name} on {model}")
    return failed


def open_bench(arguments: argparse.Namespace) -> tuple[Bench, Store]:
    """What is measured on, and where results go. Raises ValueError as `parse_text`, `windows_of` and `Store` do."""
    source = open_source(arguments.source)
    tokenizer = Tokenizer.from_str(source.content("tokenizer.json").decode())
    texts = {}
    for text in map(parse_text, arguments.text):
        if text.name in texts:
            raise ValueError(f"two texts are called {text.name}; rename one")
        texts[text.name] = windows_of(text, tokenizer, arguments.windows, arguments.length)
    settings = {
        "source": source.model_id,
        "sigma": arguments.sigma,
        "windows": arguments.windows,
        "length": arguments.length,
        "texts": {name: digest(ids) for name, ids in texts.items()},
    }
    bench = Bench(
        arguments.source, arguments.sigma, arguments.work.resolve(), arguments.threads, texts, source.model_id
    )
    return bench, Store(arguments.json, settings)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--work", type=Path, required=True, help="for originals, and models until they are measured")
    parser.add_argument("--json", type=Path, required=True, help="results so far, and where more are added")
    parser.add_argument("--text", action="append", required=True, metavar="FILE[:SKIP]")
    parser.add_argument("--seed", action="append", type=int, help="of channel scales; default 0, 1 and 2")
    parser.add_argument("--as-is", action="store_true", help="measure the source itself, not its equals off the grid")
    parser.add_argument("--sigma", type=float, default=0.5, help="deviation of the channel scales' logarithms")
    parser.add_argument("--windows", type=int, default=20, help="of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", action="append", default=[], metavar="'NAME: OPTIONS'", help="a build to measure")
    parser.add_argument("--exact", action="store_true", help="measure ours with full-precision kernels too")
    parser.add_argument("--genai", metavar="PYTHON", help="interpreter that has onnxruntime-genai and torch")
    parser.add_argument("--genai-methods", default=",".join(tools.GENAI_METHODS))
    parser.add_argument("--llamacpp", metavar="PYTHON", help="interpreter that has llama-cpp-python")
    parser.add_argument("--llamacpp-types", default=",".join(tools.LLAMACPP_TYPES))
    parser.add_argument("--imatrix", type=Path, metavar="TEXT", help="measure llama.cpp with its importance matrix too")
    parser.add_argument("--modelopt", metavar="PYTHON", help="interpreter that has nvidia-modelopt")
    parser.add_argument("--modelopt-configs", default="INT4_AWQ_CFG")
    parser.add_argument("--modelopt-text", type=Path, metavar="TEXT", help="that modelopt calibrates on")
    parser.add_argument("--picture", type=Path, metavar="SVG")
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    try:
        bench, store = open_bench(arguments)
        models = [AS_IS] if arguments.as_is else [f"seed {seed}" for seed in arguments.seed or (0, 1, 2)]
        failed = measure_all(bench, list(chosen_tools(arguments)), models, store)
    except (LlamaExportError, OSError, RuntimeError, ValueError) as error:
        print(f"frontier.py: {error}", file=sys.stderr)
        return 1
    found = summaries(store.figures())
    text = markdown(found, tools.OURS)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    if arguments.picture and found:
        title = f"{store.content['settings']['source']}: KL divergence from float32 against size"
        picture = scatter(points(found), title, "MB of all files", "mean KL divergence, nats", joined=tools.OURS)
        arguments.picture.write_text(picture, encoding="utf-8")
    for name in failed:
        print(f"frontier.py: failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
