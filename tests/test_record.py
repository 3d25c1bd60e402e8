"""From proposals to references: every kept token is PyTorch's own choice, and the same command makes the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from llama_export.cli import main
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.identity import model_sha256
from llama_export.export.lora.peft_folder import read_adapter
from llama_export.export.prompts import Asked
from llama_export.export.propose import propose
from llama_export.export.prove import About, Proposed, prove, spread_layers
from llama_export.export.reference import Exact, Original, StreamedModel
from llama_export.export.source import open_source
from llama_export.optimize.plan import plan_formats
from llama_export.progress import Silent
from llama_export.runtime.arrays import Float32, Int64
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.proof.reference import EXACT, ORIGINAL, Identity, Reference, compress
from llama_export.runtime.proof.reference_file import load, load_of_bundle, save
from llama_export.runtime.proof.replayer import CacheView
from support.adapters import write_adapter
from support.graphs import llama, logits_of, source_tensors
from support.hf_models import random_weights, write_llama_folder, write_weights

# Proposing


class Counted:
    """A `Replayer` whose likeliest next token is the sum of all so far, so that any token lost or shifted shows."""

    name, vocab, context, chunk = "sums", 97, 64, 64

    def __init__(self, most_rows: int) -> None:
        self.most_rows, self.texts, self.calls = most_rows, list[list[int]](), 0

    def begin(self, rows: int) -> None:
        assert rows <= self.most_rows
        self.texts = [[] for _ in range(rows)]

    def run(self, ids: Int64, firsts: Sequence[int], counts: Sequence[int]) -> Float32:
        assert (len(set(counts)) == 1 and ids.shape[1] == 1) or len(self.texts) == 1 or not any(firsts)
        self.calls += 1
        logits = np.full((*ids.shape, self.vocab), np.nan, np.float32)
        for row, (text, first, count) in enumerate(zip(self.texts, firsts, counts, strict=True)):
            del text[first:]
            assert len(text) == first < self.context
            for at, token in enumerate(ids[row, :count].tolist()):
                text.append(token)
                logits[row, at] = -np.abs(np.arange(self.vocab) - sum(text) % self.vocab)
        return logits

    def cache(self, layer: int) -> CacheView | None:
        return None


@pytest.mark.parametrize("most_rows", [1, 2, 8])
@pytest.mark.parametrize("logits", [1, 1 << 12, 1 << 26])
def test_proposals_are_the_graphs_greedy_text(most_rows: int, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_export.export.propose._LOGITS_BYTES", logits)
    lengths = ((3, 5), (1, 0), (40, 7), (9, 5), (60, 4), (2, 1))
    prompts = [Asked(str(at), "", tuple(range(at, at + one)), new) for at, (one, new) in enumerate(lengths)]
    for prompt, found in zip(prompts, propose(Counted(most_rows), prompts), strict=True):
        expected: list[int] = []
        for _ in range(prompt.continuation):
            expected.append((sum(prompt.ids) + sum(expected)) % Counted.vocab)
        assert found == tuple(expected), prompt.name


# Proving


def about(vocab: int) -> About:
    return About("tests/tiny", None, "F32", Identity("0" * 64, "1" * 64, 3, 128, 4, 2, 32, vocab), {})


def greedy(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(model, np.array([ids]))[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kinds", [(EXACT,), (ORIGINAL,), (ORIGINAL, EXACT)])
def test_every_kept_token_is_pytorchs_own(kinds: tuple[str, ...], full: bool, tmp_path: Path) -> None:
    model = llama()
    tensors = source_tensors(model)
    sides = {ORIGINAL: Original(tensors), EXACT: Exact(tensors, plan_formats(tensors, "fp32"), "float32")}
    prompts = [(5, 9, 2), (7,), (1, 2, 3, 4, 5, 6, 8), (11, 12)]
    right = [greedy(model, prompt, 6) for prompt in prompts]
    wrong = [right[0], (*right[1][:3], (right[1][3] + 1) % 259, 0, 0), ((right[2][0] + 1) % 259, 4, 4), ()]
    proposals = [
        Proposed(Asked(str(at), "", prompt, 6), text)
        for at, (prompt, text) in enumerate(zip(prompts, wrong, strict=True))
    ]
    expected = [prompts[0] + right[0], prompts[1] + right[1][:3], prompts[2] + right[2][:1], prompts[3]]
    streamed = StreamedModel(model.config, tensors, 64, [sides[kind] for kind in kinds])
    files = {kind: tmp_path / kind for kind in kinds} if full else None
    found, _ = prove(streamed, about(259), proposals, (0, 2), Silent(), files)
    assert list(found) == list(kinds)
    for kind, reference in found.items():
        index = reference.index
        assert [one.ids for one in index.prompts] == expected
        assert [one.proven for one in index.prompts] == [6, 3, 1, 0]
        whole = np.concatenate([logits_of(model, np.array([ids]))[0] for ids in expected])
        assert np.abs(reference.logits.sampled - whole[:, reference.logits.sample_ids]).max() < 1e-5
        if full:
            assert np.abs(reference.logits.full - whole).max() < 1e-5  # type: ignore[operator]
            again = compress(np.asarray(reference.logits.full))
            assert (again.top_logits == reference.logits.top_logits).all()
        assert index.marks == ((2, 8), (0, 3), (6, 7), (1,))
        assert reference.layers is not None
        assert reference.layers.hidden.shape[:2] == (2, 7)
        save(reference if kind == ORIGINAL else with_weight(reference), tmp_path / "x.npz")
        assert load(tmp_path / "x.npz").index.positions == len(whole)


def with_weight(reference: Reference) -> Reference:
    from llama_export.runtime.proof.reference import WeightRecord

    weight = WeightRecord("w", "fp32", (1,), 0, {}, "0" * 64, 0.0)
    return replace(reference, index=replace(reference.index, weights=(weight,)))


def test_the_original_takes_over_what_the_exact_one_chose() -> None:
    model = llama()
    tensors = source_tensors(model)
    exact = Exact(tensors, plan_formats(tensors, "int4"), "float32")
    asked = Asked("a", "", (5, 9, 2), 12)
    alone = StreamedModel(model.config, tensors, 64, (Original(tensors), exact))
    found, _ = prove(alone, about(259), [Proposed(asked, greedy(model, asked.ids, 12))], (), Silent())
    ids = found[EXACT].index.prompts[0].ids
    assert found[ORIGINAL].index.prompts[0].ids == ids
    assert found[ORIGINAL].layers is None
    chosen = found[EXACT].logits.top_ids[2:, 0].tolist()
    assert list(ids[3:]) == chosen[: len(ids) - 3]


@pytest.mark.parametrize(("layers", "expected"), [(1, (0,)), (3, (0, 1, 2)), (30, (0, 4, 8, 12, 17, 21, 25, 29))])
def test_layers_are_spread_evenly(layers: int, expected: tuple[int, ...]) -> None:
    assert spread_layers(layers) == expected


# Which model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_folder(tmp_path_factory.mktemp("model") / "llama", max_positions=96)


def changed(model: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def test_the_hash_is_of_what_the_model_computes(model: Path, tmp_path: Path) -> None:
    sha256 = model_sha256(open_source(str(model)))
    other_name = changed(model, tmp_path / "copy", torch_dtype="float16", _name_or_path="x", use_cache=False)
    assert model_sha256(open_source(str(other_name))) == sha256
    theta = changed(model, tmp_path / "theta", rope_theta=12345.0)
    epsilon = changed(model, tmp_path / "epsilon", rms_norm_eps=1e-4)
    tuned = changed(model, tmp_path / "tuned")
    weights = random_weights(json.loads((tuned / "config.json").read_text()))
    weights["model.layers.1.mlp.up_proj.weight"] *= np.float32(1.001)
    write_weights(tuned, weights)
    adapted = [read_adapter(f"{write_adapter(model, tmp_path / 'a', seed=1)}{weight}") for weight in ("", ":0.5")]
    adapted.append(read_adapter(str(write_adapter(model, tmp_path / "b", seed=2))))
    hashes = [sha256, *(model_sha256(open_source(str(path))) for path in (theta, epsilon, tuned))]
    hashes += [model_sha256(open_source(str(model)), [one]) for one in adapted]
    assert len(set(hashes)) == 7


# The command


def reference(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["reference", *map(str, arguments), "-q"])


def test_two_runs_are_the_same_bytes_and_a_file_is_not_lost(model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.npz", tmp_path / "deep/two.npz"
    for output in (one, two):
        result = reference("-m", model, "-o", output, "--json")
        assert result.exit_code == 0, result.output
    assert one.read_bytes() == two.read_bytes()
    told = json.loads(result.stdout)
    assert (told["kind"], told["bytes"]) == (ORIGINAL, two.stat().st_size)
    assert [path.name for path in two.parent.iterdir()] == ["two.npz"]  # the temporary export is gone
    found = load(one)
    assert found.index.positions == told["positions"]
    assert found.index.identity.model_sha256 == model_sha256(open_source(str(model)))
    assert all(prompt.proven == len(prompt.ids) - prompt.prompt_tokens for prompt in found.index.prompts)
    again = reference("-m", model, "-o", one)
    assert again.exit_code == 2
    assert "--force" in again.output
    prompts = tmp_path / "p.txt"
    prompts.write_text("one two\nthree")
    chosen = ("--prompts", prompts, "--layers", "1", "--new-tokens", 3, "--force", "--full")
    assert reference("-m", model, "-o", one, *chosen).exit_code == 0
    found = load(one)
    assert [prompt.name for prompt in found.index.prompts] == ["line 1", "line 2"]
    assert {len(prompt.ids) - prompt.prompt_tokens for prompt in found.index.prompts} == {3}
    assert found.index.layers == (1,)
    assert found.logits.full is not None


def test_with_a_bundle_it_is_what_the_bundle_holds(built: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = built("int4")
    checkpoint = bundle.parent / "llama"
    for kind, flags in ((EXACT, ["--exact"]), (ORIGINAL, [])):
        output = tmp_path / f"{kind}.npz"
        result = reference("-m", checkpoint, "-o", output, "--bundle", bundle, *flags)
        assert result.exit_code == 0, result.output
        found, held = load(output), load_of_bundle(bundle, kind)
        assert found.index.identity == held.index.identity
        assert found.index.weights == held.index.weights
        assert open_bundle(bundle).manifest.model.sha256 == found.index.identity.model_sha256
        if kind == EXACT:
            assert found.index == held.index
            assert (found.logits.sampled == held.logits.sampled).all()


REFUSED: dict[str, tuple[list[str], str, int]] = {
    "exact without a bundle": (["--exact"], "name a bundle of ours with --bundle", 2),
    "a layer that is not there": (["--layers", "0,2"], "must be numbers from 0 to 1", 2),
    "a layer of more digits than Python reads": (["--layers", "9" * 5000], "must be numbers from 0 to 1", 2),
    "a device": (["--force", "-o", "/dev/null"], "is no plain file", 2),
    "layers in words": (["--layers", "first"], "must be numbers from 0 to 1", 2),
    "a context beyond the model": (["--context", "97"], "is more than the 96 tokens", 2),
    "no prompts": (["--prompts", "absent.txt"], "is not there", 2),
    "no bundle": (["--bundle", "absent"], "There is no", 2),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_nothing(case: str, model: Path, tmp_path: Path) -> None:
    flags, message, code = REFUSED[case]
    result = reference("-m", model, "-o", tmp_path / "new/x.npz", *flags)
    assert message in " ".join(result.output.split())
    assert result.exit_code == code
    assert not list(tmp_path.glob("new/*"))


def test_a_folder_is_no_output(model: Path, tmp_path: Path) -> None:
    assert "is a folder" in reference("-m", model, "-o", tmp_path).output


def test_another_model_is_refused_before_anything_runs(
    built: Callable[[str], Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_export import referencing

    monkeypatch.setattr(referencing, "GraphReplayer", lambda *_, **__: pytest.fail("it ran"))
    bundle = built("int4")
    other = changed(bundle.parent / "llama", tmp_path / "other", rope_theta=123.0)
    words = changed(bundle.parent / "llama", tmp_path / "words")
    with (words / "tokenizer.json").open("a") as file:
        file.write("\n")
    cases = (
        (model, "is another model"),
        (other, "by the hash of its weights and config"),
        (words, "another tokenizer"),
    )
    for checkpoint, message in cases:
        options = referencing.ReferenceOptions(str(checkpoint), tmp_path / "x.npz", bundle=bundle)
        with pytest.raises(LlamaExportError, match=message):
            referencing.make_reference(options)


def test_a_gguf_file(built: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = built("Q4_0")
    result = reference("-m", bundle.parent / "llama.gguf", "-o", tmp_path / "x.npz", "--bundle", bundle, "--exact")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "x.npz").index == load_of_bundle(bundle, EXACT).index


def test_adapters_merged_and_beside(model: Path, tmp_path: Path) -> None:
    from llama_export.build_options import RUNTIME, BuildOptions
    from llama_export.pipeline import build

    adapter = write_adapter(model, tmp_path / "tone")
    for mode, name in (("merge", None), (RUNTIME, "tone")):
        bundle = tmp_path / mode
        build(BuildOptions(str(model), "cpu", bundle, precision="int8", adapters=(str(adapter),), adapter_mode=mode))
        exact, original = (load_of_bundle(bundle, kind, name) for kind in (EXACT, ORIGINAL))
        assert exact.index.adapter == original.index.adapter == name
        assert exact.index.weights
        output = tmp_path / f"{mode}.npz"
        result = reference("-m", model, "-o", output, "--bundle", bundle, "--adapter", adapter)
        assert result.exit_code == 0, result.output
        found = load(output)
        assert found.index.adapter == name
        assert found.index.identity == original.index.identity
        rows = {one.ids: at for at, one in enumerate(found.index.prompts)}
        shared = [one for one in original.index.prompts if one.ids in rows]
        assert shared
        for at, one in enumerate(original.index.prompts):
            if one.ids in rows:
                expected = original.of_prompt(at).sampled
                assert np.abs(found.of_prompt(rows[one.ids]).sampled - expected).max() < 1e-5
    plain = reference("-m", model, "-o", tmp_path / "x.npz", "--bundle", tmp_path / "merge")
    assert "the same --adapter (tone)" in " ".join(plain.output.split())
    with pytest.raises(UsageError, match="one --adapter"):
        from llama_export.referencing import ReferenceOptions, make_reference

        other = write_adapter(model, tmp_path / "other", seed=3)
        options = {"bundle": tmp_path / RUNTIME, "adapters": (str(adapter), str(other))}
        make_reference(ReferenceOptions(str(model), tmp_path / "y.npz", **options))
