"""What a reference keeps of logits, and its file: the same bytes every time, and no damage that is not told."""

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
from llama_export.runtime.proof import reference_file
from llama_export.runtime.proof.reference import (
    EXACT,
    ORIGINAL,
    SAMPLES,
    SCHEMA_VERSION,
    TOP,
    Identity,
    Index,
    Layers,
    Logits,
    PassingLogits,
    Prompt,
    Reference,
    WeightRecord,
    chosen_channels,
    compress,
    logsumexp,
    sample_ids,
)
from llama_export.runtime.proof.reference_file import load, load_index, load_of_bundle, save

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


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 997])
@pytest.mark.parametrize("step", [1, 7, 64, 500, 2000])
def test_parts_of_the_vocabulary_give_what_the_whole_does(vocab: int, step: int) -> None:
    """With many ties, also across parts: of equal logits the first tokens are kept, in order."""
    logits = np.random.default_rng(vocab).integers(-3, 4, (6, vocab)).astype(np.float32)
    passing = PassingLogits(6, vocab)
    for start in range(0, vocab, step):
        passing.add(start, logits[:, start : start + step])
    found = passing.value
    order = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    assert (found.top_ids == order).all()
    assert (found.top_logits == np.take_along_axis(logits, order, axis=1)).all()
    assert (found.sampled == logits[:, found.sample_ids]).all()
    assert found.logsumexp == pytest.approx(logsumexp(logits), abs=1e-12)


def test_logits_that_are_not_finite_show() -> None:
    logits = np.zeros((3, 300), np.float32)
    logits[1, 299], logits[2, 7] = np.nan, np.inf
    kept = compress(logits)
    assert np.isfinite(kept.logsumexp).tolist() == [True, False, False]


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
    same(Logits.joined([kept.rows(0, 2), kept.rows(2, 2), kept.rows(2, 6)]), kept)


def same(found: Any, expected: Any) -> None:
    """Both have the same arrays."""
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None), field.name
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other)), field.name


# The file

VOCAB = 70
IDENTITY = Identity("a" * 64, "b" * 64, 3, 40, 4, 2, 24, VOCAB)


def small_reference(*, full: bool = False, layers: tuple[int, ...] = (0, 2), **changes: Any) -> Reference:
    random = np.random.default_rng(0)
    logits = random.standard_normal((7, VOCAB)).astype(np.float32)
    best = logits.argmax(axis=1).tolist()
    weight = WeightRecord("w", "int4", (3, 40), 0, {"codes": "w.codes", "scales": "w.scales"}, "0" * 64, 1.5)
    prompts = (
        Prompt("a", "text", (1, 2, best[1], best[2]), 2, 2),
        Prompt("b", "téxt 🙂", (4, 5, best[5]), 2, 1),
    )
    index = Index(
        SCHEMA_VERSION,
        EXACT,
        "org/tiny",
        None,
        "BF16",
        "int4",
        None,
        IDENTITY,
        prompts,
        (weight,),
        (),
        layers,
        full,
        {"torch": "2.13.0"},
    )
    hidden, cache = chosen_channels(IDENTITY)

    def samples(channels: Any) -> Any:
        return random.standard_normal((len(layers), 4, len(channels))).astype(np.float32)

    inside = Layers(hidden, cache, samples(hidden), samples(cache), samples(cache)) if layers else None
    kept = dataclasses.replace(compress(logits), full=logits if full else None)
    return Reference(dataclasses.replace(index, **changes), kept, inside)


def saved(folder: Path, reference: Reference | None = None) -> Path:
    path = folder / "new" / "tiny.npz"
    save(reference or small_reference(), path)
    assert [one.name for one in path.parent.iterdir()] == ["tiny.npz"]
    return path


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("layers", [(), (1,), (0, 1, 2)])
def test_round_trip(full: bool, layers: tuple[int, ...], tmp_path: Path) -> None:
    reference = small_reference(full=full, layers=layers)
    path = saved(tmp_path, reference)
    found = load(path)
    assert found.index == load_index(path) == reference.index
    same(found.logits, reference.logits)
    assert (found.layers is None) == (not layers)
    if found.layers is not None:
        same(found.layers, reference.layers)
    assert isinstance(found.logits.full, np.memmap) is full


def test_the_same_reference_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = saved(tmp_path / "one", small_reference(full=True))
    monkeypatch.setattr("time.time", lambda: 2e9)
    two = saved(tmp_path / "two", small_reference(full=True))
    assert one.read_bytes() == two.read_bytes()


def test_numbers_lie_in_planes_of_bytes(tmp_path: Path) -> None:
    """As docs/bundle.md says, by NumPy alone."""
    reference = small_reference()
    with np.load(saved(tmp_path, reference), allow_pickle=False) as arrays:
        planes = arrays["top_logits"]
        assert planes.dtype == np.uint8
        assert planes.shape == (4, 7, TOP)
        assert (np.moveaxis(planes, 0, -1).copy().view("<f4")[..., 0] == reference.logits.top_logits).all()


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(reference_file, "_planes", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(small_reference(full=True), path)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["tiny.npz"]


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def member(name: str, content: bytes | None) -> Callable[[Path], object]:
    """Another content of one file in the archive, None for none."""

    def change(path: Path) -> None:
        kept = {**members(path), name: content}
        rewrite(path, {one: data for one, data in kept.items() if data is not None})

    return change


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def changed(path: Path) -> None:
        value = json.loads(members(path)["reference.json"])
        change(value)
        member("reference.json", json.dumps(value).encode())(path)

    return changed


def array(name: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    """Another array, as `save` would write it."""

    def changed(path: Path) -> None:
        found = load(path)
        of = found.logits if hasattr(found.logits, name) else found.layers
        made = change(getattr(of, name).copy())
        of = dataclasses.replace(of, **{name: made})  # type: ignore[type-var]
        logits, layers = (of, found.layers) if isinstance(of, Logits) else (found.logits, of)
        save(Reference(found.index, logits, layers), path)  # type: ignore[arg-type]

    return changed


def put(at: Any, value: float) -> Callable[[Any], Any]:
    def change(found: Any) -> Any:
        found[at] = value
        return found

    return change


def npy_header(description: str) -> bytes:
    header = description.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


HUGE = npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 1099511627776, 64)}")
SEVEN = npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (8, 7)}")
FULL = npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (7, 70)}")


def prompt(number: int, **changes: Any) -> Callable[[Path], object]:
    return index(lambda v: v["prompts"][number].update(changes))


def weight(**changes: Any) -> Callable[[Path], object]:
    return index(lambda v: v["weights"][0].update(changes))


def sized(**changes: Any) -> Callable[[Path], object]:
    return index(lambda v: v["identity"].update(changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda at: at.unlink(), "There is no reference"),
    "a folder": (lambda at: (at.unlink(), at.mkdir()), "There is no reference"),
    "no archive": (lambda at: at.write_bytes(b"PK"), "damaged"),
    "empty": (lambda at: at.write_bytes(b""), "damaged"),
    "no index": (member("reference.json", None), "damaged"),
    "no JSON": (member("reference.json", b"{"), "damaged"),
    "a list": (member("reference.json", b"[]"), "schema version None"),
    "no UTF-8": (member("reference.json", b'{"\xff": 1}'), "damaged"),
    "too deep": (member("reference.json", b"[" * 100_000), "damaged"),
    "an endless index": (member("reference.json", b" " * (17 << 20)), "larger than that of any reference"),
    "an older one": (index(lambda v: v.update(schema_version=1)), "schema version 1, but this llama-export reads 2"),
    "a newer one": (index(lambda v: v.update(schema_version=3)), "schema version 3, but this llama-export reads 2"),
    "no version": (index(lambda v: v.pop("schema_version")), "schema version None"),
    "unknown key": (index(lambda v: v.update(x=1)), "unknown key 'x'"),
    "a missing key": (index(lambda v: v.pop("kind")), "lacks the key 'kind'"),
    "another type": (index(lambda v: v.update(full="no")), "full must be true or false"),
    "another kind": (index(lambda v: v.update(kind="rough")), "a kind 'rough'"),
    "no prompts": (index(lambda v: v.update(prompts=[])), "no prompts"),
    "no weights": (index(lambda v: v.update(weights=[])), "no weights"),
    "no vocabulary": (sized(vocab=0), "a vocabulary of 0"),
    "a negative one": (sized(vocab=-5), "a vocabulary of -5"),
    "a larger one": (sized(vocab=71), "is expected"),
    "more layers than any": (sized(layers=1 << 40), "a number of layers"),
    "no hidden size": (sized(hidden=0), "a hidden of 0"),
    "no hash": (sized(model_sha256="x"), "no SHA-256"),
    "a token too many": (prompt(0, ids=[1, 2, 3, 4, 5]), "is expected"),
    "a token out of range": (prompt(1, ids=[4, 5, 70]), "a prompt 'b' out of range"),
    "a prompt without tokens": (prompt(0, prompt_tokens=0), "a prompt 'a' out of range"),
    "a prompt beyond its text": (prompt(0, prompt_tokens=5), "out of range"),
    "more proven than there is": (prompt(0, proven=3), "out of range"),
    "proven, but not so": (index(lambda v: v["prompts"][0]["ids"].__setitem__(2, 0)), "would not choose"),
    "one name twice": (prompt(1, name="a"), "two prompts of one name"),
    "a billion tokens": (prompt(1, ids=[1] * (1 << 18), prompt_tokens=1 << 18, proven=0), "more than the"),
    "a layer that is not there": (index(lambda v: v.update(layers=[0, 3])), "samples of layers"),
    "a layer twice": (index(lambda v: v.update(layers=[0, 0])), "samples of layers"),
    "a layer without samples": (index(lambda v: v.update(layers=[0])), "is expected"),
    "samples without a layer": (index(lambda v: v.update(layers=[])), "damaged"),
    "a weight without rows": (weight(shape=[]), "a weight 'w' of an impossible shape"),
    "a weight without columns": (weight(shape=[3, 0]), "a weight 'w' of an impossible shape"),
    "a norm that is no number": (weight(norm=math.nan), "a weight 'w' out of range"),
    "an array gone": (member("logsumexp.npy", None), "damaged"),
    "a stranger": (member("other.npy", b"1"), "damaged"),
    "other shape": (array("sampled", lambda found: found[:, :-1]), "is expected"),
    "ids out of range": (array("top_ids", put((0, 5), VOCAB)), "top_ids that name tokens outside"),
    "negative ids": (array("sample_ids", put(0, -1)), "sample_ids that name tokens outside"),
    "an id twice": (array("top_ids", lambda found: np.repeat(found[:, :1], TOP, axis=1)), "a token twice"),
    "NaN": (array("top_logits", put((3, 5), np.nan)), "top_logits that are not finite"),
    "infinity": (array("logsumexp", put(3, np.inf)), "logsumexp that are not finite"),
    "NaN in the sample": (array("sampled", put((3, 5), np.nan)), "sampled that are not finite"),
    "NaN inside": (array("keys", put((1, 2, 5), np.nan)), "samples of keys that are not finite"),
    "out of order": (array("top_logits", lambda found: found[:, ::-1]), "top_logits that do not fall"),
    "a sum too small": (array("logsumexp", put(3, -50)), "below its largest part"),
    "a sum too large": (array("logsumexp", put(3, 50)), "beyond all of its parts"),
    "channels that are not there": (array("cache_ids", put(-1, 48)), "channels which are not there"),
    "a huge array": (member("top_logits.npy", HUGE), "is expected"),
    "a bomb": (member("logsumexp.npy", SEVEN + bytes(100 << 20)), "another size than its header says"),
    "code for a header": (member("logsumexp.npy", npy_header("__import__('os').abort()")), "damaged"),
    "too little": (member("logsumexp.npy", SEVEN + bytes(55)), "another size than its header says"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_references_are_told_in_one_sentence(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    path = saved(tmp_path)
    damage(path)
    with pytest.raises(LlamaExportError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("make it again with `llama-export reference`.")


FULL_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "deflated": (lambda at: rewrite(at, members(at)), "full is deflated"),
    "not finite": (array("full", put((6, 69), np.nan)), "not finite"),
    "other shape": (array("full", lambda found: found[:, 1:]), "is expected"),
    "cut": (
        lambda at: rewrite(at, {**members(at), "full.npy": FULL + bytes(7 * 70 * 4 - 4)}, zipfile.ZIP_STORED),
        "damaged",
    ),
    "missing": (member("full.npy", None), "damaged"),
}


@pytest.mark.parametrize("case", FULL_DAMAGE)
def test_damaged_full_logits_too(case: str, tmp_path: Path) -> None:
    damage, message = FULL_DAMAGE[case]
    path = saved(tmp_path, small_reference(full=True))
    damage(path)
    with pytest.raises(LlamaExportError, match=message):
        load(path)


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    """Unpickling this array would make a file."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    path = saved(tmp_path)
    np.save(tmp_path / "trap.npy", np.array([Trap()] * 7, object), allow_pickle=True)
    member("logsumexp.npy", (tmp_path / "trap.npy").read_bytes())(path)
    with pytest.raises(LlamaExportError):
        load(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("full", [False, True])
def test_truncated_anywhere(full: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, small_reference(full=full))
    whole = path.read_bytes()
    for size in {*range(0, len(whole), len(whole) // 97), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(LlamaExportError):
            load(path)


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    """The archive has a checksum for every array; what escapes it (a date, a comment) changes nothing."""
    path = saved(tmp_path, small_reference(full=True))
    whole, intact = path.read_bytes(), small_reference(full=True)
    for position in range(0, len(whole), 13):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            found = load(path)
        except LlamaExportError:
            continue
        assert found.index == intact.index
        same(found.logits, intact.logits)
        same(found.layers, intact.layers)


# Inside of bundles


def test_of_a_bundle_the_remedy_is_to_build_it_again(built: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="a bundle is built here")
    bundle = tmp_path / "bundle"
    shutil.copytree(built("int4"), bundle)
    (bundle / "reference/exact.npz").write_bytes(b"PK")
    with pytest.raises(LlamaExportError, match=r"damaged .*; build the bundle again\.$"):
        load_of_bundle(bundle, EXACT)
    (bundle / "reference/original.npz").unlink()
    with pytest.raises(LlamaExportError, match="no original reference to compare with, it was built with --no-refer"):
        load_of_bundle(bundle, ORIGINAL)


def test_a_built_bundle_holds_both(built: Callable[[str], Path]) -> None:
    pytest.importorskip("torch", reason="a bundle is built here")
    exact, original = (load_of_bundle(built("int4"), kind) for kind in (EXACT, ORIGINAL))
    for one, kind in ((exact, EXACT), (original, ORIGINAL)):
        assert one.index.kind == kind
        assert one.index.model_id == "llama"
        assert {"torch", "transformers", "llama-export"} <= one.index.tools.keys()
        assert one.index.dtype == "F32"
        assert one.layers is not None
    assert exact.index.identity == original.index.identity
    assert [one.ids for one in exact.index.prompts] == [one.ids for one in original.index.prompts]
    assert len({one.ids for one in exact.index.prompts}) == len(exact.index.prompts)
    assert [one.name for one in exact.index.prompts] == [
        *("short", "prose", "scripts", "code", "repeated", "chat", "long"),
    ]
    for one in exact.index.prompts:
        assert one.proven == len(one.ids) - one.prompt_tokens > 0
    assert (exact.index.precision, original.index.precision) == ("int4", None)
    assert exact.index.weights and exact.index.tables
    assert not original.index.weights
    assert np.abs(exact.logits.sampled - original.logits.sampled).max() > 1e-3


@pytest.mark.smollm2
def test_smollm2_keeps_it_below_1_mb(smollm2_bundle: Path) -> None:
    for kind in (EXACT, ORIGINAL):
        assert 0 < (smollm2_bundle / f"reference/{kind}.npz").stat().st_size < 1_000_000
        index = load_of_bundle(smollm2_bundle, kind).index
        assert index.positions > 750
        assert max(one.prompt_tokens for one in index.prompts) > 512  # beyond one prefill chunk
    assert all(one.proven == len(one.ids) - one.prompt_tokens for one in index.prompts)  # its own weights are kept
