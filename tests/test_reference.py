"""What PyTorch computes: streamed layer by layer it is transformers' own model, and its record survives no damage."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError
from llama_export.export import layerwise
from llama_export.export.reference import ExactModel
from llama_export.optimize.plan import plan_formats
from llama_export.optimize.quantise import stored_values
from llama_export.progress import Silent
from llama_export.runtime.reference import (
    SAMPLES,
    TOP,
    Index,
    Logits,
    Prompt,
    Reference,
    WeightRecord,
    compress,
    fingerprint,
    load_reference,
    logsumexp,
    sample_ids,
    save_reference,
)
from support.graphs import VARIANTS, llama, logits_of, source_tensors, with_stored_weights


class Heard(Silent):
    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def advance(self, done_bytes: int, total_bytes: int) -> None:
        self.told.append((done_bytes, total_bytes))


# PyTorch's side


CASES = [(variant, precision) for variant in VARIANTS for precision in ("fp32", "int4")]


@pytest.mark.parametrize(("variant", "precision"), [*CASES, ("grouped", "fp16"), ("untied", "int8")])
def test_layer_by_layer_it_is_transformers_model(variant: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_STEP", 10_000)  # so that these small matrices come in several parts too
    model = llama(**VARIANTS[variant])
    tensors = source_tensors(model)
    formats = plan_formats(tensors, precision)
    generator = np.random.default_rng(1)
    sequences = [generator.integers(0, model.config.vocab_size, length).tolist() for length in (17, 1, 33)]
    streamed = ExactModel(model.config, tensors, formats, np.float32, 64)
    found = streamed.logits(sequences, Silent())
    twin = with_stored_weights(model, tensors, formats)
    for ids, logits in zip(sequences, found, strict=True):
        expected = logits_of(twin, np.array([ids]))[0]
        assert logits.shape == expected.shape
        assert expected.std() > 0.1  # a degenerate model would prove nothing
        assert np.abs(logits - expected).max() < 1e-5
    assert streamed.fingerprints.keys() == tensors.keys()


def test_scales_are_those_that_survive_in_float16() -> None:
    model = llama()
    tensors = source_tensors(model)
    formats = plan_formats(tensors, "int4")
    found = {dtype: ExactModel(model.config, tensors, formats, dtype, 64) for dtype in ("float16", "float32")}
    logits = {dtype: one.logits([[3, 5, 7]], Silent())[0] for dtype, one in found.items()}
    assert 0 < np.abs(logits["float16"] - logits["float32"]).max() < 0.1
    name = "model.layers.1.mlp.up_proj.weight"
    rows = stored_values(tensors[name], formats[name], 0, tensors[name].shape[0], np.float16)
    assert found["float16"].fingerprints[name] == fingerprint(iter([rows]))
    assert found["float32"].fingerprints[name] != fingerprint(iter([rows]))


def test_the_model_given_is_left_as_it_is() -> None:
    model = llama()
    model.config._attn_implementation = "eager"
    before = model.config.to_dict()
    tensors = source_tensors(model)
    ExactModel(model.config, tensors, plan_formats(tensors, "fp32"), np.float32, 64).logits([[1, 2]], Silent())
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("tied", [True, False])
def test_progress_grows_to_the_whole(tied: bool) -> None:
    model, heard = llama(tie_word_embeddings=tied), Heard()
    tensors = source_tensors(model)
    ExactModel(model.config, tensors, plan_formats(tensors, "fp16"), np.float32, 64).logits([[1, 2]], heard)
    done = [one for one, _ in heard.told]
    assert done == sorted(done)
    assert heard.told[-1] == (done[-1], done[-1]) == (sum(math.prod(one.shape) for one in tensors.values()) * 4,) * 2


def test_a_fingerprint_is_of_the_values_however_they_are_cut() -> None:
    rows = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    whole = fingerprint(iter([rows]))
    parts = fingerprint(iter([rows[:2], rows[2:3], rows[3:]]))
    assert parts[0] == whole[0]
    assert parts[1] == pytest.approx(whole[1]) == pytest.approx(float(np.linalg.norm(rows)))
    for changed in (rows * np.float32(1 + 2**-23), -rows, rows[::-1]):
        assert fingerprint(iter([changed]))[0] != whole[0]
    assert math.isnan(fingerprint(iter([rows * np.float32(np.nan)]))[1])


# What is kept of the logits


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 255, 256, 257, 5000])
def test_compress_keeps_the_top_the_sum_and_a_sample(vocab: int) -> None:
    logits = np.random.default_rng(vocab).standard_normal((5, vocab)).astype(np.float32) * 9
    kept = compress(logits)
    ordered = np.sort(logits, axis=1)[:, ::-1]
    assert (kept.top_logits == ordered[:, :TOP]).all()
    assert (np.take_along_axis(logits, kept.top_ids, axis=1) == kept.top_logits).all()
    assert all(len(set(row)) == min(TOP, vocab) for row in kept.top_ids.tolist())
    assert (kept.sampled == logits[:, kept.sample_ids]).all()
    direct = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    assert kept.logsumexp == pytest.approx(direct, abs=1e-9)
    again = compress(logits.copy())
    for field in dataclasses.fields(Logits):
        assert (getattr(kept, field.name) == getattr(again, field.name)).all()


@pytest.mark.parametrize("vocab", [1, 63, 256, 257, 128256])
def test_the_sample_is_fixed_sorted_and_without_repetition(vocab: int) -> None:
    ids = sample_ids(vocab)
    assert ids.dtype == np.int32
    assert len(ids) == min(SAMPLES, vocab)
    assert (np.diff(ids) > 0).all()
    assert 0 <= ids[0] <= ids[-1] < vocab
    assert (ids == sample_ids(vocab)).all()


def test_logsumexp_neither_overflows_nor_drowns() -> None:
    rows = np.array([[1000.0, 1000.0], [-1000.0, -1000.0], [0.0, -200.0]], np.float32)
    assert logsumexp(rows) == pytest.approx([1000 + math.log(2), -1000 + math.log(2), 0])


def test_rows_and_joined_are_inverse() -> None:
    kept = compress(np.random.default_rng(0).standard_normal((6, 300)).astype(np.float32))
    joined = Logits.joined([kept.rows(0, 2), kept.rows(2, 2), kept.rows(2, 6)])
    for field in dataclasses.fields(Logits):
        assert (getattr(joined, field.name) == getattr(kept, field.name)).all()


# The files


def small_reference(**changes: Any) -> Reference:
    logits = np.random.default_rng(0).standard_normal((6, 70)).astype(np.float32)
    weight = WeightRecord("w", "int4", (3, 40), 0, {"codes": "w.codes", "scales": "w.scales"}, "0" * 64, 1.5)
    prompts = (Prompt("a", "text", (1, 2, 3), 2, 1), Prompt("b", "téxt 🙂", (4, 5, 69), 2, 0))
    index = Index(1, "org/tiny", None, 70, prompts, (weight,), (), {"torch": "2.13.0"})
    return Reference(dataclasses.replace(index, **changes), compress(logits))


def saved(folder: Path, reference: Reference | None = None) -> Path:
    save_reference(reference or small_reference(), folder)
    return folder / "reference"


def test_round_trip(tmp_path: Path) -> None:
    reference = small_reference()
    saved(tmp_path, reference)
    loaded = load_reference(tmp_path)
    assert loaded.index == reference.index
    for field in dataclasses.fields(Logits):
        assert (getattr(loaded.logits, field.name) == getattr(reference.logits, field.name)).all()


def test_the_same_reference_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = saved(tmp_path / "one")
    monkeypatch.setattr("time.time", lambda: 2e9)
    two = saved(tmp_path / "two")
    for name in ("reference.json", "logits.npz"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def changed_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "reference.json"
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def changed_arrays(folder: Path, **arrays: Any) -> None:
    path = folder / "logits.npz"
    with np.load(path) as found:
        kept = {name: found[name] for name in found.files}
    kept = {name: value for name, value in {**kept, **arrays}.items() if value is not None}
    np.savez_compressed(path, **kept)


def with_member(folder: Path, name: str, content: bytes) -> None:
    """The archive with another content of one member."""
    path = folder / "logits.npz"
    with zipfile.ZipFile(path) as archive:
        members = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for one, data in {**members, name: content}.items():
            archive.writestr(one, data)


def npy_header(description: str) -> bytes:
    header = description.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 64)}"

SIX = "{'descr': '<f8', 'fortran_order': False, 'shape': (6,)}"

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no files": (shutil.rmtree, "has no reference to compare with, it was built with --no-reference"),
    "no logits": (lambda at: (at / "logits.npz").unlink(), "damaged"),
    "a folder for logits": (lambda at: ((at / "logits.npz").unlink(), (at / "logits.npz").mkdir()), "damaged"),
    "no JSON": (lambda at: (at / "reference.json").write_text("{"), "damaged"),
    "a list": (lambda at: (at / "reference.json").write_text("[]"), "damaged"),
    "no UTF-8": (lambda at: (at / "reference.json").write_bytes(b'{"\xff": 1}'), "damaged"),
    "too deep": (lambda at: (at / "reference.json").write_text("[" * 100_000), "damaged"),
    "newer": (lambda at: changed_json(at, lambda v: v.update(schema_version=2)), "schema version 2, but .* reads 1"),
    "no version": (lambda at: changed_json(at, lambda v: v.pop("schema_version")), "schema version None"),
    "unknown key": (lambda at: changed_json(at, lambda v: v.update(x=1)), "unknown key 'x'"),
    "a missing key": (lambda at: changed_json(at, lambda v: v.pop("vocab")), "lacks the key 'vocab'"),
    "another type": (lambda at: changed_json(at, lambda v: v.update(vocab="70")), "vocab must be an integer"),
    "no vocabulary": (lambda at: changed_json(at, lambda v: v.update(vocab=0)), "out of range|is expected"),
    "a negative one": (lambda at: changed_json(at, lambda v: v.update(vocab=-5)), "out of range|is expected"),
    "a larger one": (lambda at: changed_json(at, lambda v: v.update(vocab=71)), "is expected"),
    "no prompts": (lambda at: changed_json(at, lambda v: v.update(prompts=[])), "no prompts of one length"),
    "no weights": (lambda at: changed_json(at, lambda v: v.update(weights=[])), "no weights"),
    "a token too many": (
        lambda at: changed_json(at, lambda v: [one["ids"].append(1) for one in v["prompts"]]),
        "is expected",
    ),
    "a token out of range": (
        lambda at: changed_json(at, lambda v: v["prompts"][1].update(ids=[4, 5, 70])),
        "a prompt 'b' out of range",
    ),
    "a prompt without tokens": (
        lambda at: changed_json(at, lambda v: [one.update(prompt_tokens=0) for one in v["prompts"]]),
        "out of range",
    ),
    "a prompt beyond its text": (
        lambda at: changed_json(at, lambda v: [one.update(prompt_tokens=4) for one in v["prompts"]]),
        "out of range",
    ),
    "prompts of two lengths": (
        lambda at: changed_json(at, lambda v: v["prompts"][0].update(prompt_tokens=1)),
        "no prompts of one length",
    ),
    "a weight without rows": (
        lambda at: changed_json(at, lambda v: v["weights"][0].update(shape=[])),
        "a weight 'w' of an impossible shape",
    ),
    "a weight without columns": (
        lambda at: changed_json(at, lambda v: v["weights"][0].update(shape=[3, 0])),
        "a weight 'w' of an impossible shape",
    ),
    "an array gone": (lambda at: changed_arrays(at, logsumexp=None), "damaged"),
    "other precision": (lambda at: changed_arrays(at, logsumexp=np.zeros(6, np.float32)), "is expected"),
    "other shape": (lambda at: changed_arrays(at, sampled=np.zeros((6, 69), np.float32)), "is expected"),
    "ids out of range": (
        lambda at: changed_arrays(at, top_ids=np.full((6, 64), 70, np.int32)),
        "tokens outside of the vocabulary",
    ),
    "negative ids": (
        lambda at: changed_arrays(at, sample_ids=np.full(70, -1, np.int32)),
        "tokens outside of the vocabulary",
    ),
    "a pickle": (lambda at: changed_arrays(at, logsumexp=np.array([print] * 6, object)), "is expected|damaged"),
    "not finite": (lambda at: changed_arrays(at, logsumexp=np.full(6, np.nan)), "not finite"),
    "a huge array": (lambda at: with_member(at, "top_logits.npy", npy_header(HUGE)), "is expected"),
    "a bomb": (
        lambda at: with_member(at, "logsumexp.npy", npy_header(SIX) + bytes(100 << 20)),
        "another size than its header says",
    ),
    "code for a header": (
        lambda at: with_member(at, "logsumexp.npy", npy_header("__import__('os').abort()")),
        "damaged",
    ),
    "more than it says": (
        lambda at: with_member(at, "logsumexp.npy", npy_header(SIX) + bytes(49)),
        "another size than its header says",
    ),
    "an endless index": (
        lambda at: (at / "reference.json").open("r+b").truncate(65 << 20),
        "larger than any reference",
    ),
    "endless logits": (lambda at: (at / "logits.npz").open("r+b").truncate(65 << 20), "larger than any reference"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_references_are_told_in_one_sentence(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    damage(saved(tmp_path))
    with pytest.raises(LlamaExportError, match=message) as caught:
        load_reference(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    """Unpickling this array would make a file."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = saved(tmp_path)
    changed_arrays(folder, logsumexp=np.array([Trap()] * 6, object))
    with pytest.raises(LlamaExportError):
        load_reference(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["reference.json", "logits.npz"])
def test_truncated_anywhere(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / name
    whole = path.read_bytes()
    end = len(whole) - (1 if name.endswith("json") else 0)  # the line end at the end may go
    for size in {*range(0, end, max(1, end // 97)), end - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(LlamaExportError):
            load_reference(tmp_path)


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    """The archive has a checksum for every array; what escapes it (a date, a comment) changes nothing."""
    path = saved(tmp_path) / "logits.npz"
    whole, intact = path.read_bytes(), load_reference(tmp_path).logits
    for position in range(0, len(whole), 11):
        for bit in (0, 6):
            path.write_bytes(
                whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :],
            )
            try:
                found = load_reference(tmp_path).logits
            except LlamaExportError:
                continue
            for field in dataclasses.fields(Logits):
                assert (getattr(found, field.name) == getattr(intact, field.name)).all()


# Inside of bundles


def test_a_built_bundle_holds_it(built: Callable[[str], Path]) -> None:
    reference = load_reference(built("int4"))
    index = reference.index
    assert index.model_id == "llama"
    assert {"torch", "transformers", "llama-export"} <= index.tools.keys()
    assert len(index.prompts) >= 4
    assert len(reference.logits.logsumexp) == sum(len(prompt.ids) for prompt in index.prompts)
    assert {len(prompt.ids) - prompt.prompt_tokens for prompt in index.prompts} == {32}
    assert len({prompt.ids for prompt in index.prompts}) == len(index.prompts)


@pytest.mark.smollm2
def test_smollm2_keeps_it_below_2_mb(smollm2_bundle: Path) -> None:
    files = list((smollm2_bundle / "reference").iterdir())
    assert 0 < sum(file.stat().st_size for file in files) < 2_000_000
    index = load_reference(smollm2_bundle).index
    assert all(prompt.proven == 32 for prompt in index.prompts)
