"""The `llama-export` command: argument handling and nothing else.

Each command imports what it does when it is called, so that `--help` stays quick and a device needs no build packages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from . import __version__
from .build_options import ADAPTER_MODES, MERGE, BuildOptions
from .cli_support import (
    Group,
    Precision,
    TextFile,
    backend_options,
    configurable_commands,
    echo_lines,
    engine_dir_option,
    json_option,
    need_build_machine,
    need_extra,
    offer_engine,
    quiet_option,
    threads_option,
)
from .names import CACHE_PRECISIONS, METHODS
from .progress import Terminal
from .settings import settings_problem


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="llama-export")
def main() -> None:
    """Turn a Llama checkpoint into a bundle that a device runs without PyTorch, and prove it there."""


@main.command()
@click.option("-m", "--model", required=True, help="A checkpoint's folder, a GGUF file, or an id on the hub.")
@click.option("-t", "--target", required=True, help="A name from `targets`, `host`, or a TOML file of your own.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's folder, made here.")
@click.option(
    "--precision",
    type=Precision(automatic=True),
    help="Of the weights; default: the target's, or the checkpoint's own where it comes quantised.",
)
@click.option(
    "--budget", metavar="SIZE", help="With --precision auto: most bytes of model.onnx and its data, such as 900MB."
)
@click.option(
    "--max-kl",
    type=float,
    help="With --precision auto: most that quantisation may cost, in nats a token, such as 0.02.",
)
@click.option(
    "--head-precision",
    type=Precision(),
    help="Of the output head alone (and of the embedding where they are one); default: as the others.",
)
@click.option(
    "--cache-precision",
    type=click.Choice(tuple(CACHE_PRECISIONS)),
    help="Of the cache of keys and values: int8 on CPUs takes a quarter of the memory; default: as it computes.",
)
@click.option("--context", type=click.IntRange(min=1), help="Most tokens; default: what model and target allow.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Most texts at once.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--token", help="Access token for the hub; default: HF_TOKEN.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR[:WEIGHT]",
    help="A LoRA adapter in peft's format; may be given several times.",
)
@click.option(
    "--adapter-mode",
    type=click.Choice(ADAPTER_MODES),
    default=MERGE,
    show_default=True,
    help="Merge adapters into the weights, or keep them beside them, for `run --adapter NAME`.",
)
@click.option(
    "--any-base", is_flag=True, help="Take adapters whatever model they name as the one they were trained on."
)
@click.option("--jetpack", metavar="VERSION", help="Of a Jetson, from 6.0 to 7.2; default: the target's own.")
@click.option("--backend", metavar="NAME", help="onnxruntime, tensorrt or tensorrt-rtx, where the target has several.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="Of quantising weights; default: the best there is, search, or gptq with --calibrate.",
)
@click.option(
    "--calibrate",
    type=TextFile(),
    help="A text to quantise weights and, for w8a8 and fp8 on TensorRT, activations by.",
)
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where downloads are kept; default: below HF_HOME.")
@click.option("--no-reference", is_flag=True, help="Leave out PyTorch's answers: quicker, but `verify` cannot compare.")
@click.option("--prompts", type=click.Path(path_type=Path), help="What PyTorch answers; see `reference --help`.")
@click.option(
    "--quality-text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The text that the cost of quantisation is measured on; default: our own.",
)
@click.option("--no-quality", is_flag=True, help="Do not measure what quantisation costs: quicker.")
@click.option(
    "--force", is_flag=True, help="Replace a bundle that is there already, and build what will not fit the target."
)
@json_option
@quiet_option
def build(*, no_reference: bool, no_quality: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Turn a checkpoint into a bundle for a target."""
    need_build_machine()
    need_extra("build,cpu", ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"), "Building a bundle")
    from .pipeline import build as build_bundle

    asked = BuildOptions(reference=not no_reference, quality=not no_quality, **options)
    with Terminal(quiet=quiet) as progress:
        report = build_bundle(asked, progress=progress)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        echo_lines(report.lines())


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    "references",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file that `reference` made, in place of the bundle's own of that kind; may be given several times.",
)
@click.option("--any-model", is_flag=True, help="Take a reference of another checkpoint with the same tokenizer.")
@click.option("--backend", metavar="NAMES", help="What computes, with commas between several; default: the best here.")
@engine_dir_option
@threads_option
@click.option("--no-hash", is_flag=True, help="Leave out the files' hashes: only weights and logits are compared.")
@click.option("--max-kl", type=click.FloatRange(min=0), help="Fail when quantisation cost more than this, in nats.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, allow_dash=True), help="Write the verdict; - prints."
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write it for CI, a case for each prompt and gate.")
@click.option("--html", type=click.Path(path_type=Path), help="Write it as a page, with curves and worst tokens.")
@click.option("--bisect", is_flag=True, help="Say where the graph breaks, layer by layer and operation by operation.")
@click.option("-m", "--model", help="The checkpoint that --bisect computes with; default: the weights in the bundle.")
@quiet_option
def verify(
    bundle: Path, *, json_file: Path | None, junit: Path | None, html: Path | None, quiet: bool, **options: Any
) -> None:
    """Replay what PyTorch computed and compare; exit 1 when a gate fails.

    BUNDLE may be a folder that optimum or onnxruntime-genai exported, with --reference.
    """
    from .verifying import VerifyOptions, backends_of, refuse_outputs, report_of, write_whole

    refuse_outputs((json_file, junit, html))
    if options["bisect"]:
        need_extra("build", ("torch", "transformers", "onnx"), "Finding where a graph breaks")
    backends, check_hashes = backends_of(options.pop("backend")), not options.pop("no_hash")
    with Terminal(quiet=quiet) as progress:
        report = report_of(bundle, VerifyOptions(backends=backends, check_hashes=check_hashes, **options), progress)
    if str(json_file) == "-":
        click.echo(report.json(), nl=False)
    else:
        echo_lines(report.lines())
    for path, text in ((json_file, report.json), (junit, report.junit), (html, report.html)):
        if path is not None and str(path) != "-":
            write_whole(path, text())
    if not report.passed:
        raise SystemExit(1)


@main.command()
@click.option("-m", "--model", required=True, help="A checkpoint's folder, a GGUF file, or an id on the hub.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file, such as model.npz.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A text with a prompt on each line, or JSON objects with `text` or `messages` (.jsonl); default: our own.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="What proposes the greedy text: a bundle, or a folder of optimum or onnxruntime-genai; default: an export "
    "that is made for it and removed.",
)
@click.option("--exact", is_flag=True, help="With the weights as the bundle stores them, not the checkpoint's own.")
@click.option("--full", is_flag=True, help="Keep all logits: 4 bytes for each entry of the vocabulary and position.")
@click.option("--adapter", "adapters", multiple=True, metavar="DIR[:WEIGHT]", help="A LoRA adapter, as for `build`.")
@click.option("--any-base", is_flag=True, help="Take adapters whatever model they name as their base.")
@click.option("--new-tokens", type=click.IntRange(1, 1 << 16), help="Greedy tokens after each prompt; default: 16.")
@click.option("--layers", metavar="N,N|all", help="To sample hidden states and cache of; default: 8, evenly spread.")
@click.option("--context", type=click.IntRange(min=1), help="Most tokens of a text; default: the bundle's, or 4096.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--token", help="Access token for the hub; default: HF_TOKEN.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where downloads are kept; default: below HF_HOME.")
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
@json_option
@quiet_option
def reference(*, as_json: bool, quiet: bool, **options: Any) -> None:
    """Record what PyTorch computes, for `verify --reference`; needs memory for one decoder layer."""
    need_build_machine()
    need_extra("build,cpu", ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"), "Recording a reference")
    from .referencing import ReferenceOptions, make_reference

    with Terminal(quiet=quiet) as progress:
        report = make_reference(ReferenceOptions(**options), progress)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        echo_lines(report.lines())


@main.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="Measure the perplexity of this text.")
@click.option(
    "--tasks", type=click.Path(path_type=Path), help="Answer these multiple-choice questions, one JSON a line."
)
@click.option("-m", "--model", help="With --text: the checkpoint that the bundle was made of, to compare with.")
@click.option(
    "--original-adapter",
    "original_adapters",
    multiple=True,
    metavar="DIR[:WEIGHT]",
    help="A LoRA adapter that this checkpoint needs, as the bundle has it; may be given several times.",
)
@click.option("--any-model", is_flag=True, help="Compare with another model than the bundle's, of the same vocabulary.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens read at a time; default: 1024, at most the context.")
@click.option("--stride", type=click.IntRange(min=1), help="From window to window; default: the window, no overlap.")
@click.option("--limit", type=click.IntRange(min=1), help="Windows or questions at most; default: all.")
@click.option("--adapter", help="Evaluate with this adapter of the bundle, see `inspect`; default: none.")
@backend_options
@threads_option
@click.option("--revision", help="Of --model: branch, tag or commit on the hub.")
@click.option("--token", help="Access token for the hub; default: HF_TOKEN.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where downloads are kept; default: below HF_HOME.")
@click.option("--restart", is_flag=True, help="Compute anew what an earlier run of the same has computed.")
@json_option
@quiet_option
def eval_(*, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure perplexity on a text, or accuracy on multiple choice; an interrupted run goes on where it was."""
    from .evaluating import EvalOptions, evaluate

    with Terminal(quiet=quiet) as progress:
        found = evaluate(EvalOptions(**options), progress)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        echo_lines(found.lines())


@main.command()
@click.option("-m", "--model", required=True, help="A folder, a GGUF file, a published Llama's name, or a hub id.")
@click.option(
    "-t", "--target", "targets", multiple=True, help="As for `build`; may be given several times; default: all."
)
@click.option("--precision", type=Precision(), help="Of the weights; default: what `build` would take.")
@click.option("--head-precision", type=Precision(), help="Of the output head alone; default: as the others.")
@click.option(
    "--cache-precision", type=click.Choice(tuple(CACHE_PRECISIONS)), help="Of the cache; default: as it computes."
)
@click.option("--context", type=click.IntRange(1, 1 << 30), help="Most tokens; default: as many as fit.")
@click.option("--batch", type=click.IntRange(1, 1 << 16), default=1, show_default=True, help="Most texts at once.")
@click.option("--jetpack", help="Of a Jetson, such as 6.2.")
@click.option("--backend", help="onnxruntime, tensorrt or tensorrt-rtx, where a target has several.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--token", help="Access token for the hub; default: HF_TOKEN.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where downloads are kept; default: below HF_HOME.")
@json_option
@quiet_option
def plan(*, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say whether a model fits, and how fast it would be; reads its config, and no weights."""
    if Path(options["model"]).expanduser().exists():
        need_extra("build", ("ml_dtypes", "gguf", "huggingface_hub"), "Planning a model on this disk")
    from .forecast import PlanOptions, forecast

    with Terminal(quiet=quiet) as progress:
        found = forecast(PlanOptions(**options), progress)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        echo_lines(found.lines())


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@engine_dir_option
@click.option("--force", is_flag=True, help="Build again, and even where memory seems not to be enough.")
@json_option
@quiet_option
def engine(bundle: Path, engine_dir: Path | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Build the engine of BUNDLE for the GPU of this device and verify it, unless it is there."""
    from .engine_report import build_and_verify, lines, to_json
    from .runtime.bundle import open_bundle

    with Terminal(quiet=quiet) as progress:
        made = build_and_verify(open_bundle(bundle), progress, engine_dir=engine_dir, force=force)
    if as_json:
        click.echo(json.dumps(to_json(made), indent=2))
    else:
        echo_lines(lines(made))


@main.command()
@click.argument("name", required=False)
@json_option
def targets(name: str | None, as_json: bool) -> None:
    """List the targets, or show one with the source of every fact."""
    from .targets import listing
    from .targets.choice import choose
    from .targets.devices import load_target

    found = [choose(load_target(name))] if name else listing.all_targets()
    if as_json:
        facts = [listing.to_json(target) for target in found]
        click.echo(json.dumps(facts[0] if name else facts, indent=2))
    else:
        echo_lines(listing.detail_lines(found[0]) if name else listing.table_lines(found))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle is: model, shapes, limits, files, and the memory it takes."""
    from . import inspection
    from .runtime.bundle import open_bundle

    opened = open_bundle(bundle)
    if as_json:
        click.echo(json.dumps(inspection.to_json(opened), indent=2))
    else:
        echo_lines(inspection.lines(opened))


@main.command(uses_settings=False)
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Show what this machine has, what it can do, and how to mend what is missing; exits with 0 whatever it finds."""
    from . import doctor as examination

    found = examination.examine(settings_problem(configurable_commands(context), Path.cwd()))
    if as_json:
        click.echo(json.dumps(examination.to_json(found), indent=2))
    else:
        echo_lines(examination.lines(found))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Apply the chat template; without PROMPT: a conversation, line by line.")
@click.option("--system", help="Instructions for the model before the first turn; with --chat.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="End there at last.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Of the k likeliest tokens only; 0: of all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Of the likeliest that make up p.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="None below p times the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: say less again.")
@click.option("--seed", type=int, help="Of the random numbers: the same seed, the same text.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--adapter", help="Write with this adapter of the bundle, see `inspect`; an empty name for none.")
@backend_options
@threads_option
@click.option("--check-hashes", is_flag=True, help="Compare every file with the manifest again.")
@json_option
@quiet_option
def run(
    bundle: Path,
    prompt: str | None,
    *,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    adapter: str | None,
    backend: str | None,
    engine_dir: Path | None,
    threads: int | None,
    check_hashes: bool,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in BUNDLE, or chat with it; PROMPT - is read from stdin."""
    from .runtime import GenerationOptions, SamplingOptions, load, terminal

    options = GenerationOptions(max_new_tokens, SamplingOptions(**sampling), stop)
    request = terminal.RunRequest(prompt, chat, system, options, as_json=as_json, quiet=quiet)
    if backend is None and not quiet:
        offer_engine(bundle, engine_dir)
    model = load(
        bundle,
        backend=backend,
        engine_dir=engine_dir,
        threads=threads,
        check_hashes=check_hashes,
        chat=chat,
        adapter=adapter or None,
    )
    if model.backend_note is not None and not quiet:
        echo_lines([model.backend_note], err=True)
    terminal.run(model, request)
