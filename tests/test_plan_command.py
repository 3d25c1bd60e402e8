"""`llama-export plan`: a model by its config alone, from wherever it comes, and what is said to mistakes."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_export
import pytest
from llama_export.build_options import BuildOptions
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.config import expected_tensors
from llama_export.export.config_source import open_config
from llama_export.export.hub import HubOptions
from llama_export.export.published import published
from llama_export.planning import BuildPlan, plan_build
from llama_export.progress import Silent
from llama_export.targets.devices import load_target, target_names
from llama_export.targets.planner_published import predicted
from llama_export.targets.planner_published import published as published_speeds
from support.command import call, environment
from support.gguf_models import write_llama_gguf
from support.hf_models import write_json, write_llama_folder
from support.hub_server import HubServer, Repo

CONFIG_ONLY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 263,
    "max_position_embeddings": 200,
    "torch_dtype": "bfloat16",
}


def config_folder(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG_ONLY, **changes}))
    return path


def write_large_folder(path: Path, **sizes: int) -> None:
    """A checkpoint of zeros that take no room on the disk."""
    write_llama_folder(path)
    config = json.loads((path / "config.json").read_text()) | sizes
    write_json(path / "config.json", config)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in expected_tensors(config).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_all_targets_are_planned_when_none_is_named() -> None:
    result = call("plan", "-m", "meta-llama/Llama-3.1-8B-Instruct", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [one["target"] for one in document["plans"]] == list(target_names())
    assert document["model"]["parameters"] == published()["llama-3.1-8b"].parameters
    assert document["model"]["config"] == "the list of published Llamas"


def test_a_table_for_many_and_details_for_one() -> None:
    table = call("plan", "-m", "llama-3.2-1b", "-t", "l4", "-t", "h200").stdout.splitlines()
    assert [line.split()[0] for line in table[:3]] == ["TARGET", "l4", "h200"]
    details = call("plan", "-m", "llama-3.2-1b", "-t", "l4").stdout
    assert details.startswith("l4: fits with ")
    assert "the list of published Llamas" in details


def test_a_folder_needs_its_config_alone(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "tiny")
    result = call("plan", "-m", folder, "-t", "cpu", "--context", "100", "--json")
    assert result.exit_code == 0, result.stderr
    (one,) = json.loads(result.stdout)["plans"]
    assert (one["context"], one["largest_context"], one["verdict"]) == (100, 200, "fits")
    assert call("plan", "-m", folder / "config.json", "-t", "cpu").exit_code == 0


BOARD = 'base = "cpu"\nmemory_gb = {memory}\nreserve_gb = 0.1\ndefault_precision = "{precision}"\n'
LARGE = {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}


def planned(tmp_path: Path, memory: float, precision: str = "fp32", **options: Any) -> tuple[BuildPlan, str]:
    """What a build of 255 MB of float32 decides for a board with so many GB, and the board."""
    folder = tmp_path / "large"
    if not folder.exists():
        write_large_folder(folder, **LARGE)
    board = tmp_path / "board.toml"
    board.write_text(BOARD.format(memory=memory, precision=precision))
    asked = BuildOptions(str(folder), str(board), tmp_path / "out", **options)
    return plan_build(asked, load_target(str(board)), Silent()), str(board)


def test_it_counts_what_a_build_counts(tmp_path: Path) -> None:
    built, board = planned(tmp_path, 4, "int8")
    result = call("plan", "-m", tmp_path / "large", "-t", board, "--json")
    (one,) = json.loads(result.stdout)["plans"]
    assert (one["weights"]["bytes"], one["context"]) == (built.stored, built.context.context)


def test_a_build_takes_a_smaller_precision_and_says_so(tmp_path: Path) -> None:
    built, _ = planned(tmp_path, 0.5)
    assert built.precision in ("int8", "int4")
    (note,) = [note for note in built.source.notes if note.startswith("The weights are ")]
    assert f"are {built.precision} rather than fp32, board's default" in note
    assert {format.name for name, format in built.formats.items() if "_proj" in name} == {f"{built.precision}-f16"}


def test_a_build_keeps_a_default_that_fits(tmp_path: Path) -> None:
    built, _ = planned(tmp_path, 4)
    assert built.precision == "fp32"
    assert not any(note.startswith("The weights are ") for note in built.source.notes)


def test_a_hopeless_build_is_refused_unless_forced(tmp_path: Path) -> None:
    with pytest.raises(LlamaExportError, match=r"large on board does not fit: int4 takes .* --force builds it anyway"):
        planned(tmp_path, 0.25)
    built, _ = planned(tmp_path, 0.25, force=True)
    assert built.context.warning is not None
    assert built.precision == "int4"


def test_a_gguf_is_planned_from_its_header(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf", types="Q4_0")
    (one,) = json.loads(call("plan", "-m", path, "-t", "cpu", "--json").stdout)["plans"]
    assert one["precision"] == "gguf"
    assert one["weights"]["by_format"].keys() >= {"int4"}


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "int4-b128"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, "int4-b64-zeros"),
    ],
)
def test_what_comes_quantised_is_planned_as_its_config_says(
    settings: dict[str, Any], stored: str, tmp_path: Path
) -> None:
    source = open_config(str(config_folder(tmp_path / "q", quantization_config=settings)))
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].format.name == stored
    assert source.native == settings["quant_method"]
    assert stored in source.notes[0]


def test_planning_needs_nothing_that_building_does() -> None:
    """Neither torch nor onnx is imported, nor the hub's client, when the config is here."""
    code = (
        "import sys; from llama_export.cli import main\n"
        "main(['plan', '-m', 'llama-3.1-405b'], standalone_mode=False)\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'transformers', 'huggingface_hub', 'onnxruntime', 'ml_dtypes'}\n"
        "assert not names & heavy, names & heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert "does not fit; " in done.stdout


def test_the_page_shows_every_published_row_and_what_is_predicted() -> None:
    """The table of docs/planning.md is what the planner says today."""

    def text(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"

    page = (Path(llama_export.__file__).parent / "docs/planning.md").read_text(encoding="utf-8")
    for row in published_speeds().rows:
        found = predicted(row)
        mark = " *" if row.exception else ""
        assert f"| {text(row.tokens_per_second)} | {text(found.low)} to {text(found.high)}{mark} |" in page


def test_the_page_explains_every_key_of_the_document() -> None:
    page = (Path(llama_export.__file__).parent / "docs/planning.md").read_text(encoding="utf-8")
    document = json.loads(call("plan", "-m", "llama-3.2-1b", "-t", "l4", "--json").stdout)
    (one,) = document.pop("plans")
    keys = {*document, *document["model"], *document["request"], *one, *one["weights"], *one["memory"]}
    keys |= {key for speeds in one["speeds"] for key in speeds}
    assert {key for key in keys if f"`{key}`" not in page} == set()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("-t", "jetson-orin", "--precision", "nvfp4"), "not nvfp4"),
        (("-t", "cpu", "--context", "131073"), "above the 131,072 tokens"),
        (("-t", "cpu", "--context", "0"), "not in the range"),
        (("-t", "cpu", "--batch", "99999999"), "not in the range"),
        (("-t", "jetson-orin-nano"), "Did you mean 'jetson-orin-nano-8gb'?"),
        (("-t", "jetson-orin", "--jetpack", "5.0"), "There is no JetPack 5.0"),
        (("-t", "cpu", "--jetpack", "6.2"), "--jetpack is for Jetsons"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(arguments: tuple[str, ...], part: str) -> None:
    result = call("plan", "-m", "llama-3.2-1b", *arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert result.stdout == ""


def test_targets_that_lack_what_is_asked_for_are_left_out_and_named() -> None:
    result = call("plan", "-m", "llama-3.2-1b", "--jetpack", "6.1")
    assert result.exit_code == 0
    assert "Left out, as they lack what was asked for: a100, " in result.stdout
    assert {line.split()[0][:11] for line in result.stdout.splitlines()[1:5]} == {"jetson-agx-", "jetson-orin"}


def test_of_the_hub_only_the_config_is_fetched(tmp_path: Path) -> None:
    files = {"config.json": json.dumps(CONFIG_ONLY).encode(), "model.safetensors": b"x" * 1000}
    with HubServer({"org/tiny": Repo(files)}) as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        code = "from llama_export.cli import main; main(['plan', '-m', 'org/tiny', '-t', 'cpu'])"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**settings))
        assert done.returncode == 0, done.stderr
        assert "Read from config.json on the hub, c0ffee" in done.stdout
        assert not any("safetensors" in seen.path for seen in hub.seen)


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("llama-3.1-8", "Did you mean 'llama-3.1-8b'?"),
        ("", "name a folder"),
        ("./nowhere", "There is no nowhere"),
        ("org/name:x.gguf", "the whole file would have to be fetched"),
    ],
)
def test_a_model_that_is_nowhere_is_told_so(model: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_config(model)
    assert part in str(caught.value)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LlamaExportError, match="supported are llama"):
        open_config(str(config_folder(tmp_path / "bert", model_type="bert", architectures=["BertModel"])))
    with pytest.raises(LlamaExportError, match=r"has no config\.json"):
        open_config(str(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="neither a folder nor a GGUF"):
        open_config(str(tmp_path / "x.bin"))
    with pytest.raises(LlamaExportError, match="num_hidden_layers"):
        open_config(str(config_folder(tmp_path / "deep", num_hidden_layers=10**9)))
    with pytest.raises(UsageError, match="--revision r is for models on the hub"):
        open_config(str(tmp_path), HubOptions(revision="r"))


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("META-LLAMA/llama-3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct"),
        ("llama-3.2-3b", "meta-llama/Llama-3.2-3B"),
    ],
)
def test_published_llamas_are_known_by_their_names(asked: str, name: str) -> None:
    assert open_config(asked).name == name


def test_a_model_on_the_disk_takes_the_build_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else found(name, *a))
    refused = call("plan", "-m", str(tmp_path), "-t", "cpu")
    assert refused.exit_code == 1
    assert "Planning a model on this disk needs packages that are not installed here (gguf)" in refused.stderr
    assert call("plan", "-m", "llama-3.2-1b", "-t", "cpu").exit_code == 0, "a published name needs none"
