"""Bundles with adapters: merged, and beside the weights, against peft; and files of adapters that are damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_export.build_options import MERGE, RUNTIME, BuildOptions
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.lora.peft_folder import read_adapter
from llama_export.export.lora.sizes import numbers_beside
from llama_export.export.source import open_source
from llama_export.pipeline import build
from llama_export.runtime import GenerationOptions, load
from llama_export.runtime.backend import OnnxRuntimeBackend
from llama_export.runtime.bundle import Bundle, Manifest, adapter_file, open_bundle, reference_file, seal
from llama_export.runtime.proof.reference import EXACT
from llama_export.runtime.proof.reference_file import load_index_of_bundle
from llama_export.runtime.proof.verdict import Verdict
from llama_export.runtime.proof.verify import verify
from safetensors.numpy import load_file, save_file
from support.command import call
from support.gguf_models import write_llama_gguf
from support.hf_models import write_llama_folder

pytest.importorskip("peft", reason="adapters are compared with peft's")
from llama_export.progress import Silent
from support.adapters import merged_by_peft, write_adapter

SHAPE: dict[str, Any] = {"heads": 5, "kv_heads": 1, "head_dim": 12, "hidden": 60, "ffn": 77}
SOME = ["q_proj", "v_proj", "down_proj", "lm_head"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = np.random.default_rng(5).integers(3, 300, 40)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two adapters of different modules and ranks."""
    place = tmp_path_factory.mktemp("adapters")
    model = write_llama_folder(place / "llama", attention_bias=True, **SHAPE)
    write_adapter(model, place / "one", target_modules=SOME)
    write_adapter(model, place / "two", seed=1, r=7, target_modules=ALL)
    return place


def built(place: Path, name: str, mode: str, *adapters: str, **options: Any) -> Bundle:
    model = options.pop("model", "llama")
    texts = tuple(str(place / adapter) for adapter in adapters)
    build(BuildOptions(str(place / model), "cpu", place / name, adapters=texts, adapter_mode=mode, **options))
    return open_bundle(place / name)


@pytest.fixture(scope="module")
def beside(place: Path) -> Bundle:
    return built(place, "beside", RUNTIME, "one", "two:0.5", precision="fp32")


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def found(backend: OnnxRuntimeBackend) -> np.ndarray:
    """Prefill in two pieces, then token by token."""
    parts = [backend.extend(IDS[:9], keep=9), backend.extend(IDS[9:30], keep=21)]
    return np.concatenate([*parts, *(backend.step(int(token))[None].copy() for token in IDS[30:])])


def test_each_adapter_beside_the_weights_equals_peft(place: Path, beside: Bundle) -> None:
    backend = OnnxRuntimeBackend(beside, threads=1)
    base, one = merged_by_peft(place / "llama"), merged_by_peft(place / "llama", place / "one")
    expected = {None: logits_of(base), "one": logits_of(one)}
    for name in (None, "one", None, "one"):
        backend.use_adapter(name)
        assert np.abs(found(backend) - expected[name]).max() < 1e-4
    assert np.abs(expected["one"] - expected[None]).max() > 0.1


def test_the_weight_of_an_adapter_is_part_of_it(place: Path, beside: Bundle) -> None:
    whole, base = merged_by_peft(place / "llama", place / "two"), merged_by_peft(place / "llama")
    half = base.state_dict()
    for name, value in whole.state_dict().items():
        half[name].add_(value - half[name], alpha=0.5)
    backend = OnnxRuntimeBackend(beside, threads=1, adapter="two")
    assert np.abs(found(backend) - logits_of(base)).max() < 1e-4


def test_merged_adapters_equal_peft(place: Path) -> None:
    bundle = built(place, "merged", MERGE, "one", "two", precision="fp32", reference=False)
    expected = logits_of(merged_by_peft(place / "llama", place / "one", place / "two"))
    assert np.abs(found(OnnxRuntimeBackend(bundle, threads=1)) - expected).max() < 1e-4
    assert [(one.name, one.file, one.weight) for one in bundle.manifest.adapters] == [
        ("one", None, 1.0),
        ("two", None, 1.0),
    ]


@pytest.mark.parametrize("mode", [MERGE, RUNTIME])
def test_an_adapters_licence_travels(mode: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "one", tmp_path / "one")
    (tmp_path / "one" / "README.md").write_text("---\nlicense: llama3.2\n---\n# Adapter\n")
    (tmp_path / "one" / "LICENSE.txt").write_text("Llama 3.2 Community License")
    build(
        BuildOptions(
            str(place / "llama"), "cpu", tmp_path / "bundle", adapters=(str(tmp_path / "one"),), adapter_mode=mode,
            reference=False,
        )
    )  # fmt: skip
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (tmp_path / "bundle/adapters/one/LICENSE.txt").read_text() == "Llama 3.2 Community License"
    assert manifest.adapters[0].licence == "llama3.2"
    assert any("Built with Llama" in duty for duty in manifest.model.duties)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_diverged_is_named(value: float, place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "two", tmp_path / "two"))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3, 2] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(LlamaExportError, match=r"two adds NaN or infinite values to model\.layers\.1\.mlp\.up_proj"):
        build(BuildOptions(str(place / "llama"), "cpu", tmp_path / "bundle", adapters=(str(folder),)))
    assert not (tmp_path / "bundle").exists()


def verdict(bundle: Bundle) -> Verdict:
    return verify(bundle, check_hashes=True, threads=1, progress=Silent())


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_every_adapter_is_verified(place: Path, precision: str, beside: Bundle) -> None:
    bundle = beside if precision == "fp32" else built(place, precision, RUNTIME, "one", "two", precision=precision)
    result = verdict(bundle)
    assert result.passed, result.failed
    names = [check.id for check in result.checks]
    for adapter in ("one", "two"):
        assert {f"{line}:{adapter}" for line in ("weights", "full", "shipped", "cost")} <= set(names)


def test_what_no_reference_is_about_is_told(place: Path, beside: Bundle, tmp_path: Path) -> None:
    assert not any("no reference" in note for note in verdict(beside).notes)
    bare = built(place, "bare", RUNTIME, "one", "two:0.5", precision="fp32", reference=False)
    found = verify(
        bare, check_hashes=True, threads=1, progress=Silent(), references=[beside.file(reference_file(EXACT))]
    )
    assert found.passed
    told = [note for note in found.notes if "no reference of the adapter" in note]
    assert len(told) == len(bare.manifest.choices)


def test_half_precision(place: Path) -> None:
    options = BuildOptions(
        str(place / "llama"), "cuda", place / "half", "int4", adapters=(str(place / "two"),), adapter_mode=RUNTIME
    )
    build(options)
    bundle = open_bundle(place / "half")
    assert np.load(place / "half" / adapter_file("two")).values().__iter__().__next__().dtype == np.float16
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["providers"] = ["CPUExecutionProvider"]
    result = verdict(Bundle(bundle.path, Manifest.from_json(json.dumps(manifest)), bundle.manifest_sha256))
    assert all(check.passed for check in result.checks if check.id != "files"), result.failed


@pytest.mark.parametrize("mode", [MERGE, RUNTIME])
def test_adapters_on_a_gguf_file(mode: str, tmp_path: Path) -> None:
    model = write_llama_folder(tmp_path / "llama", tied=True)
    write_llama_gguf(tmp_path / "m.gguf", types="Q4_1")
    write_adapter(model, tmp_path / "one")
    bundle = built(tmp_path, "bundle", mode, "one", model="m.gguf", any_base=True)
    assert verdict(bundle).passed
    formats = {record["name"]: record["format"] for record in weights(bundle)}
    changed = "int4-offset" if mode == RUNTIME else "int4"
    assert formats["model.layers.0.self_attn.q_proj.weight"] == changed
    assert formats["model.layers.0.mlp.up_proj.weight"] == "int4-offset"


def weights(bundle: Bundle) -> list[dict[str, Any]]:
    return [dataclasses.asdict(record) for record in load_index_of_bundle(bundle.path, EXACT).weights]


def test_the_same_adapters_give_the_same_bytes(place: Path, beside: Bundle) -> None:
    again = built(place, "again", RUNTIME, "one", "two:0.5", precision="fp32")
    assert again.manifest.files == beside.manifest.files


def test_models_change_their_adapter(beside: Bundle) -> None:
    model, options = load(beside.path, threads=1), GenerationOptions(max_new_tokens=12)
    assert model.adapters == ("one", "two")
    plain = model.generate("once", options)
    model.use_adapter("two")
    changed = model.generate("once", options)
    model.use_adapter(None)
    assert model.generate("once", options, reuse=True).token_ids == plain.token_ids != changed.token_ids
    assert load(beside.path, threads=1, adapter="two").generate("once", options).token_ids == changed.token_ids


def test_the_command_takes_a_name(beside: Bundle, place: Path) -> None:
    given = {None: (), "one": ("--adapter", "one"), "": ("--adapter", "")}
    answers = {
        name: json.loads(call("run", beside.path, "once", "--json", "--max-new-tokens", "6", *arguments).stdout)
        for name, arguments in given.items()
    }
    assert [answer["adapter"] for answer in answers.values()] == [None, "one", None]
    assert answers[None]["token_ids"] == answers[""]["token_ids"] != answers["one"]["token_ids"]
    told = call("run", beside.path, "once", "--max-new-tokens", "6", "--adapter", "one").stderr
    assert told.rstrip().endswith("with the adapter one]")
    result = call("run", beside.path, "once", "--adapter", "tow")
    assert result.exit_code == 2
    assert "has no adapter 'tow'; it has one, two. Did you mean 'two'?" in result.stderr
    merged = built(place, "one-merged", MERGE, "one", reference=False)
    assert "is merged into the weights" in call("run", merged.path, "once", "--adapter", "one").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter-mode", "runtime"), "name them with --adapter"),
        (("--adapter", "{place}/one", "--adapter", "{place}/one", "--adapter-mode", "runtime"), "are called one"),
        (("--adapter", "{place}/one", "--adapter", "{place}/one:0.5"), "are called one, by which they are told apart"),
        (("--adapter", "{place}/nowhere"), "There is no adapter folder"),
        (("--adapter", "{place}/llama"), "is a model, not an adapter"),
        (("--adapter-mode", "later"), "'later' is not one of"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str, place: Path, tmp_path: Path) -> None:
    given = [text.format(place=place) for text in arguments]
    result = call("build", "-m", place / "llama", "-t", "cpu", "-o", tmp_path / "bundle", *given)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_another_base_is_refused_unless_it_may_be_any(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "llama", tmp_path / "other")
    arguments = ("-t", "cpu", "-o", tmp_path / "bundle", "--adapter", place / "one", "--no-reference")
    assert call("build", "-m", tmp_path / "other", *arguments, "--any-base").exit_code == 0
    result = call("build", "-m", tmp_path / "other", *arguments, "--force")
    assert result.exit_code == 1
    assert f"names {place / 'llama'} as its base, and this model is called other" in result.stderr


def rewritten(change: Callable[[dict[str, np.ndarray]], None], bundle: Path) -> None:
    path = bundle / adapter_file("one")
    with np.load(path) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(path, **arrays)


A, B = "lm_head.lora_A.weight", "lm_head.lora_B.weight"


def claims(count: int, bundle: Path) -> None:
    path = bundle / adapter_file("one")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': (60, {count}), }}".ljust(117) + "\n"
    entries[f"{A}.npy"] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda bundle: os.truncate(bundle / adapter_file("one"), 200), "does not hold the adapter 'one'"),
    "no zip": (lambda bundle: (bundle / adapter_file("one")).write_bytes(b"x" * 50), "does not hold the adapter"),
    "an input less": (lambda bundle: rewritten(lambda arrays: arrays.pop(A), bundle), "does not hold the adapter"),
    "another width": (
        lambda bundle: rewritten(lambda arrays: arrays.update({A: np.zeros((61, 4), np.float32)}), bundle),
        r"is float32 \[61, 4\], but float32 \[60, 'any'\] is expected",
    ),
    "another type": (
        lambda bundle: rewritten(lambda arrays: arrays.update({A: np.zeros((60, 4), np.float64)}), bundle),
        "is float64",
    ),
    "another rank": (
        lambda bundle: rewritten(lambda arrays: arrays.update({A: np.zeros((60, 5), np.float32)}), bundle),
        "of different ranks",
    ),
    "objects": (
        lambda bundle: rewritten(lambda arrays: arrays.update({A: np.array([[{}]])}), bundle),
        "does not hold the adapter",
    ),
    "an input more": (
        lambda bundle: rewritten(lambda arrays: arrays.update({f"x.{A}": arrays[A]}), bundle),
        f"x.{A}.npy is no input of the graph",
    ),
    "more than memory": (partial(claims, 1 << 50), r"claims \d+ bytes"),
    "less than nothing": (partial(claims, -4), r"claims -960 bytes"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_adapters(damage: Callable[[Path], None], message: str, beside: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beside.path, tmp_path / "bundle"))
    damage(folder)
    seal(folder, beside.manifest)  # as somebody would who means it
    with pytest.raises(LlamaExportError, match=message):
        load(folder, threads=1, adapter="one")


def test_a_changed_number_is_named(beside: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beside.path, tmp_path / "bundle"))

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[B][2, 7] = np.nextafter(arrays[B][2, 7], np.float32(9))

    rewritten(change, folder)
    seal(folder, beside.manifest)
    result = verdict(open_bundle(folder))
    failed = [check for check in result.checks if not check.passed]
    assert [check.id for check in failed] == ["weights:one"]
    assert B in failed[0].details[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../x.npz"}, "has no ../x.npz"),
        ({"file": "adapters/none.npz"}, "has no adapters/none.npz"),
        ({"name": "../up"}, "adapters must have names of their own"),
        ({"name": "two"}, "adapters must have names of their own"),
        ({"rank": "4"}, "rank"),
    ],
)
def test_manifests_that_lead_elsewhere(change: dict[str, Any], message: str, beside: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beside.path, tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["adapters"][0] |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LlamaExportError, match=message):
        open_bundle(folder)


def test_references_of_adapters_are_vouched_for(beside: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beside.path, tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["reference/adapters/two/exact.npz"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LlamaExportError, match=r"two/exact.npz is not in the bundle's manifest.json"):
        open_bundle(folder)


def test_graph_and_manifest_speak_of_the_same_adapters(place: Path, beside: Bundle, tmp_path: Path) -> None:
    plain = built(place, "plain", MERGE, reference=False)
    with pytest.raises(UsageError, match="has none to choose; build with --adapter-mode runtime"):
        OnnxRuntimeBackend(plain, threads=1).use_adapter("one")
    folder = Path(shutil.copytree(plain.path, tmp_path / "claims"))
    shutil.copytree(beside.path / "adapters", folder / "adapters")
    seal(folder, replace(plain.manifest, adapters=beside.manifest.adapters))
    with pytest.raises(LlamaExportError, match="which has the adapter one: it has no inputs for adapters"):
        load(folder, threads=1)
    folder = Path(shutil.copytree(beside.path, tmp_path / "hides"))
    seal(folder, replace(beside.manifest, adapters=()))
    with pytest.raises(LlamaExportError, match=r"lora_A.weight should be absent"):
        load(folder, threads=1)


def test_the_size_of_adapters_is_known_before_there_is_a_graph(place: Path, beside: Bundle) -> None:
    tensors = open_source(str(place / "llama")).tensors
    for name in ("one", "two"):
        with np.load(beside.path / adapter_file(name)) as arrays:
            stored = sum(array.size for array in arrays.values())
        assert numbers_beside(read_adapter(str(place / name)), tensors) == stored


@pytest.mark.parametrize(("value", "target", "dtype"), [(float("nan"), "cpu", "float32"), (1e6, "cuda", "float16")])
def test_numbers_that_no_graph_can_take(value: float, target: str, dtype: str, place: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(place / "one", tmp_path / "one"))
    arrays = load_file(adapter / "adapter_model.safetensors")
    next(array for name, array in arrays.items() if "lora_B" in name)[1, 2] = value
    save_file(arrays, adapter / "adapter_model.safetensors")
    options = {"adapters": (str(adapter),), "adapter_mode": RUNTIME, "reference": False}
    with pytest.raises(LlamaExportError, match=f"The adapter one holds numbers in .* too large for {dtype}"):
        build(BuildOptions(str(place / "llama"), target, tmp_path / "bundle", **options))
    assert not (tmp_path / "bundle").exists()


def test_inspect_shows_network_and_adapters(beside: Bundle) -> None:
    told = call("inspect", beside.path).stdout
    assert "Llama, rope default" in told
    assert "one, rank 4, to choose: run --adapter one" in told
    assert "two, rank 7, times 0.5, to choose" in told
    record = json.loads(call("inspect", beside.path, "--json").stdout)["manifest"]["adapters"][1]
    assert (record["name"], record["weight"], record["file"]) == ("two", 0.5, "adapters/two.npz")


def test_names_that_differ_in_case_only(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "one", tmp_path / "One")
    adapters = ("--adapter", place / "one", "--adapter", tmp_path / "One")
    result = call("build", "-m", place / "llama", "-t", "cpu", "-o", tmp_path / "bundle", *adapters)
    assert result.exit_code == 2
    assert "Two adapters are called one" in result.stderr
