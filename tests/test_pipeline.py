"""The whole way from a checkpoint to a bundle: what is in it, where it may come from, and that all of it or nothing is
there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from llama_export import __version__
from llama_export.build_options import BuildOptions
from llama_export.build_report import BuildReport
from llama_export.errors import LlamaExportError, UsageError
from llama_export.pipeline import build
from llama_export.runtime import load
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.hashes import check_files
from llama_export.runtime.proof.reference import EXACT
from llama_export.runtime.proof.reference_file import load_index_of_bundle
from safetensors.numpy import load_file
from support.checkpoints import write_checkpoint
from support.command import call, spawn
from support.hf_models import random_weights, write_json, write_llama_folder, write_weights
from support.hub_server import HubServer, Repo
from tokenizers import Tokenizer, models

Built = Callable[[str], Path]

FILES = {
    "LICENSE",
    "chat_template.jinja",
    "config.json",
    "genai_config.json",
    "quality.json",
    "generation_config.json",
    "manifest.json",
    "model.onnx",
    "model.onnx.data",
    "reference/exact.npz",
    "reference/original.npz",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(model: object, output: Path, **options: Any) -> BuildReport:
    return build(BuildOptions(model=str(model), target="cpu", output=output, **options))


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest_of(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return manifest


# What a bundle is


def test_a_bundle_has_the_files_of_the_design_and_nothing_is_beside_it(built: Built) -> None:
    bundle = built("int4")
    assert contents(bundle).keys() == FILES
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "bundle.lock", "llama"]
    assert not [path for path in bundle.rglob("*") if path.is_symlink() or path.name.startswith(".")]


def test_what_the_checkpoint_has_is_copied_byte_for_byte(built: Built) -> None:
    bundle = built("int4")
    for name in FILES & {path.name for path in (bundle.parent / "llama").iterdir()}:
        assert (bundle / name).read_bytes() == (bundle.parent / "llama" / name).read_bytes()
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "LICENSE"} < FILES


def test_the_manifest_tells_the_truth(built: Built) -> None:
    bundle = built("int4")
    manifest, found = manifest_of(bundle), contents(bundle)
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == {
        name: digest for name, digest in found.items() if name != "manifest.json"
    }
    assert all(record["size"] == (bundle / name).stat().st_size for name, record in manifest["files"].items())
    assert manifest["schema_version"] == 1
    assert len(manifest["model"].pop("sha256")) == 64
    assert manifest["model"] == {
        "id": "llama",
        "source": "folder",
        "revision": None,
        "licence": "Random weights, free for any use.",
        "duties": [],
    }
    assert (manifest["target"], manifest["dialect"], manifest["precision"]) == ("cpu", "ort", "int4")
    assert manifest["shape"] == {
        **{"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96, "vocab": 320},
        "cache_dtype": "float32",
    }
    assert manifest["limits"] == {"context": 256, "batch": 1, "prefill_chunk": 256}
    assert manifest["tokens"] == {"bos": 0, "eos": [1, 2], "pad": None, "add_bos": True}
    assert manifest["minimum"] == {"python": "3.10", "onnxruntime": "1.23.2"}
    assert manifest["providers"] == ["CPUExecutionProvider"]
    assert manifest["tools"]["llama-export"] == __version__
    assert {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "python"} <= manifest["tools"].keys()
    assert check_files(open_bundle(bundle), force=True)


def test_a_gguf_keeps_its_own_quantisation(built: Built) -> None:
    manifest = manifest_of(built("mixed"))
    assert len(manifest["model"].pop("sha256")) == 64
    assert manifest["model"] == {
        **{"id": "Random Llama", "source": "gguf", "revision": None, "licence": "apache-2.0", "duties": []},
    }
    assert manifest["precision"] == "gguf"
    weights = load_index_of_bundle(built("mixed"), EXACT).weights
    assert {weight.format for weight in weights} == {"int4", "int4-offset", "int8", "fp32", "fp16", "bf16"}


def test_what_genai_reads_agrees(built: Built) -> None:
    genai = json.loads((built("int4") / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == 256
    assert genai["model"]["decoder"]["filename"] == "model.onnx"
    assert genai["model"]["decoder"]["num_hidden_layers"] == 2
    assert genai["model"]["eos_token_id"] in ([1, 2], 1)


def test_a_bundle_answers(built: Built) -> None:
    result = load(built("int4"), threads=1).generate("Once upon a time")
    assert result.new_tokens > 0


# Where a checkpoint may be


def test_a_configured_folder_needs_only_the_target_and_makes_the_same_bytes(built: Built, tmp_path: Path) -> None:
    """In a process of its own, with other hashes and another folder: a build is reproducible to the last byte."""
    shutil.copytree(built("int4").parent / "llama", tmp_path / "llama")
    (tmp_path / "llama-export.toml").write_text('model = "llama"\n[build]\noutput = "bundles/tiny"\n')
    done = spawn("build", "--target", "cpu", cwd=tmp_path, PYTHONHASHSEED="123")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bundles/tiny: llama, int4, for cpu, ")
    assert "Context 256 tokens: all that the model knows" in done.stdout
    stages = [line.partition("  ")[0] for line in done.stderr.splitlines()]
    assert stages == [
        *("Opening llama", "Finding which weights count most", "Tracing transformers' Llama"),
        *("Fusing and lowering the graph", "Writing the weights", "Measuring what quantisation costs on 2,048 tokens"),
        *("Recording what PyTorch computes", "Hashing the files"),
    ]
    assert contents(tmp_path / "bundles" / "tiny") == contents(built("int4"))
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"llama", "llama-export.toml", "bundles"}
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == ["tiny"]


def test_shards_make_the_same_bundle(built: Built, tmp_path: Path) -> None:
    folder = Path(write_checkpoint(tmp_path, "fp32")[0])
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_weights(folder, weights, shards=5)
    make(folder, tmp_path / "out", precision="fp32")
    assert contents(tmp_path / "out") == contents(built("fp32"))


def test_a_hub_id_makes_the_same_bundle(built: Built, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (built("int4").parent / "llama").iterdir()}
    with HubServer({"org/tiny": Repo(files)}) as hub:
        options = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        done = spawn(
            *("build", "-m", "org/tiny", "-t", "cpu", "-o", tmp_path / "out", "--precision", "int4", "--json", "-q"),
            cwd=tmp_path,
            **options,
        )
        commit = hub.repos["org/tiny"].commit
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert len(report["manifest"]["model"].pop("sha256")) == 64
    assert report["manifest"]["model"] == {
        **{"id": "org/tiny", "source": "hub", "revision": commit},
        "licence": "Random weights, free for any use.",
        "duties": [],
    }
    ours, theirs = contents(built("int4")), contents(tmp_path / "out")
    assert {name for name in FILES if ours[name] != theirs[name]} == {
        "manifest.json",
        "reference/exact.npz",
        "reference/original.npz",
    }


# Options


def test_the_report_for_programs_is_stable(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama", max_positions=1 << 20)
    result = call("build", "-m", folder, "-t", "cpu", "-o", tmp_path / "out", "--no-reference", "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert list(report) == [
        *("schema_version", "output", "bytes", "seconds", "context", "notes", "engine"),
        *("quality", "allocation", "losses", "manifest"),
    ]
    assert report["engine"] is None
    assert list(report["seconds"]) == ["open", "importance", "trace", "lower", "write", "quality", "seal"]
    assert report["manifest"] == manifest_of(tmp_path / "out")
    assert report["bytes"] == sum(record["size"] for record in report["manifest"]["files"].values())
    # A million tokens is more than a small computer holds, whatever the model says.
    context = report["context"]
    assert context["context"] == report["manifest"]["limits"]["context"]
    assert 4096 < context["context"] < 1 << 20
    assert context["context"] % 256 == 0
    assert "more does not fit the 6.0 GB that cpu has free" in context["reason"]
    assert context["warning"] is None


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with --context 40 --batch 3 --no-reference."""
    folder = tmp_path_factory.mktemp("short")
    make(write_llama_folder(folder / "llama"), folder / "out", context=40, batch=3, reference=False)
    return folder / "out"


def test_the_context_is_what_was_asked_for(short: Path) -> None:
    manifest = manifest_of(short)
    assert manifest["limits"] == {"context": 40, "batch": 3, "prefill_chunk": 40}
    assert json.loads((short / "genai_config.json").read_text())["model"]["context_length"] == 40
    model = onnx.load(short / "model.onnx", load_external_data=False)
    assert {tuple(one.dims) for one in model.graph.initializer if one.name.endswith("_cache")} == {(40, 8)}
    result = call("run", short, "word " * 40, "--quiet")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "but the context of this bundle is 40" in result.stderr
    assert load(short, threads=1).generate("x" * 30).prompt_tokens == 31


def test_without_a_reference_there_is_nothing_to_verify(short: Path) -> None:
    assert contents(short).keys() == {name for name in FILES if not name.startswith("reference/")}
    result = call("verify", short, "--quiet")
    assert result.exit_code == 1
    assert "has no exact reference to compare with, it was built with --no-reference" in result.stderr


@pytest.mark.parametrize("context", [1, 2, 5])
def test_the_shortest_contexts_have_a_reference_too(context: int, tmp_path: Path) -> None:
    make(write_llama_folder(tmp_path / "llama", layers=1), tmp_path / "out", context=context)
    result = call("verify", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output


def test_a_context_beyond_the_models_is_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama")
    with pytest.raises(UsageError, match="257"):
        make(folder, tmp_path / "out", context=257)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


# All of it or nothing


def test_an_existing_bundle_is_replaced_only_by_force(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built("int4"), out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    folder = write_llama_folder(tmp_path / "other", seed=9)
    with pytest.raises(UsageError, match="holds a bundle already; pass --force to replace it"):
        make(folder, out)
    assert contents(out) == before
    make(folder, out, force=True, reference=False)
    assert contents(out).keys() == {name for name in FILES if not name.startswith("reference/")}
    assert manifest_of(out)["model"]["id"] == "other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def bad_weights(folder: Path) -> None:
    """A NaN in the last tensor: found while the weights are written."""
    weights = random_weights(json.loads((folder / "config.json").read_text()))
    weights["lm_head.weight"][-1, -1] = np.nan
    write_weights(folder, weights)


def foreign_tokenizer(folder: Path) -> None:
    """All its tokens are beyond the model's vocabulary: found when the reference is made."""
    Tokenizer(models.WordLevel({"[UNK]": 1000}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


LATE = {
    "weights that are no numbers": (bad_weights, "lm_head.weight holds NaN or infinite values"),
    "a tokenizer of another model": (foreign_tokenizer, "they do not belong together"),
    "a tokenizer that is none": (no_tokenizer, "tokenizer.json"),
}


@pytest.mark.parametrize("case", LATE)
def test_a_build_that_fails_late_keeps_the_old_bundle(case: str, built: Built, tmp_path: Path) -> None:
    damage, message = LATE[case]
    out = tmp_path / "out"
    shutil.copytree(built("int4"), out)
    folder = write_llama_folder(tmp_path / "llama")
    damage(folder)
    with pytest.raises(LlamaExportError, match=message) as caught:
        make(folder, out, force=True)
    assert "\n" not in str(caught.value)
    assert contents(out) == contents(built("int4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_a_tokenizer_of_another_model_is_seen_without_a_reference_too(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama")
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    with pytest.raises(LlamaExportError, match=r"tokenizer\.json"):
        make(folder, tmp_path / "out", reference=False)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
