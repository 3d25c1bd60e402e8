"""`eval` on a bundle whose model is known by the book: perplexity, multiple choice, what goes on after a kill."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from llama_export.runtime.bundle import open_bundle
from llama_export.runtime.evaluate import likelihood
from llama_export.runtime.evaluate.questions import FORMS
from llama_export.runtime.requirements import parse_version
from llama_export.runtime.session import LEAST
from support.command import call, start
from support.tiny_bundle import BOS, TinyLlama, byte_tokenizer, random_llama, write_bundle
from support.tiny_tensorrt import write_tensorrt_bundle

TEXT = "The lighthouse keeper climbed the stairs.\nGröße, 東京: " * 5


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama() -> TinyLlama:
    return random_llama()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, llama: TinyLlama) -> Path:
    return write_bundle(tmp_path_factory.mktemp("eval") / "bundle", llama).path


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def found(*arguments: object) -> dict[str, Any]:
    result = call("eval", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = call("eval", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def ids_of(text: str) -> list[int]:
    """Each byte is a token."""
    return byte_tokenizer(bos=False).encode(text).ids


def losses(llama: TinyLlama, ids: list[int], first: int) -> list[float]:
    """The negative log-probability of each of the tokens from `first` on."""
    log_p = log_softmax(llama.logits(ids[:-1]))
    return [-log_p[place - 1, ids[place]] for place in range(first, len(ids))]


def text_losses(llama: TinyLlama, window: int, stride: int) -> list[list[float]]:
    """By window, written anew: those of transformers' guide."""
    ids, windows, before = [BOS, *ids_of(TEXT)], [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if one := losses(llama, ids[begin:end], max(before - begin, 1)):
            windows.append(one)
        before = end
        if end == len(ids):
            break
    return windows


@pytest.mark.parametrize(("window", "stride"), [(64, None), (13, None), (20, 7), (9, 1)])
@pytest.mark.parametrize("slice_rows", [5, 1000])
def test_perplexity_by_the_book(
    bundle: Path,
    llama: TinyLlama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    stride: int | None,
    slice_rows: int,
) -> None:
    monkeypatch.setattr(likelihood, "SLICE_BYTES", slice_rows * 4 * llama.vocab)
    text = written(tmp_path / "text", TEXT)
    strides = [] if stride is None else ["--stride", stride]
    got = found(bundle, "--text", text, "--window", window, *strides)
    expected = text_losses(llama, window, stride or window)
    tokens = sum(map(len, expected))
    nll = sum(map(sum, expected)) / tokens
    assert got["tokens"] == tokens
    assert got["windows"] == got["windows_in_file"] == len(expected)
    assert got["nll"]["value"] == pytest.approx(nll, rel=1e-5)
    assert got["perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert got["bits_per_byte"]["value"] == pytest.approx(nll * tokens / math.log(2) / got["bytes"])
    low, high = got["perplexity"]["interval"]
    assert low < math.exp(nll) < high
    assert got["bytes"] == (len(TEXT.encode()) if stride else tokens)  # a byte is a token here, beside BOS


@pytest.mark.parametrize("dialect", ["trt", "trt-primitive"])
def test_every_backend_is_measured_by_the_same_code(llama: TinyLlama, tmp_path: Path, dialect: str) -> None:
    if parse_version(onnxruntime.__version__) < parse_version(LEAST[dialect]):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no TensorScatter")
    bundle = write_tensorrt_bundle(tmp_path / "bundle", dialect, llama).path
    got = found(bundle, "--text", written(tmp_path / "text", TEXT), "--window", 30, "--backend", "onnxruntime")
    expected = text_losses(llama, 30, 30)
    assert got["nll"]["value"] == pytest.approx(sum(map(sum, expected)) / sum(map(len, expected)), rel=1e-5)


def test_the_default_window_is_the_context_where_that_is_small(bundle: Path, tmp_path: Path) -> None:
    got = found(bundle, "--text", written(tmp_path / "text", TEXT))
    assert (got["window"], got["stride"], got["bos"]) == (64, 64, True)


def test_keys_of_the_json_are_stable(bundle: Path, tmp_path: Path) -> None:
    got = found(bundle, "--text", written(tmp_path / "text", TEXT), "--limit", 2)
    about = {"bundle", "model", "precision", "adapter", "backend", "threads", "file", "file_sha256", "resumed"}
    assert got.keys() == about | {
        *("schema_version", "kind", "original", "window", "stride", "bos", "windows", "windows_in_file"),
        *("tokens", "bytes", "nll", "perplexity", "bits_per_byte"),
    }
    got = found(bundle, "--tasks", written(tmp_path / "tasks", json.dumps(READY)))
    assert got.keys() == about | {
        *("schema_version", "kind", "questions", "questions_in_file", "forms", "chance", "cut"),
        *("accuracy", "accuracy_per_character", "accuracy_per_byte"),
    }


def test_one_window_has_no_interval(bundle: Path, tmp_path: Path) -> None:
    text = written(tmp_path / "text", TEXT)
    assert found(bundle, "--text", text, "--limit", 1)["perplexity"]["interval"] is None
    assert "no intervals" in call("eval", bundle, "--text", text, "--limit", 1).stdout


def test_a_finished_run_is_not_computed_again_and_says_so(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path / "text", TEXT)
    first = found(bundle, "--text", text, "--window", 20, "--limit", 3)
    assert first["resumed"] == 0
    monkeypatch.setattr("llama_export.runtime.evaluate.scoring._score", None)
    again = call("eval", bundle, "--text", text, "--window", 20, "--limit", 3)
    assert "3 windows were computed by an earlier run; --restart" in again.stdout
    assert found(bundle, "--text", text, "--window", 20, "--limit", 3) == first | {"resumed": 3}
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert found(bundle, "--text", text, "--window", 20, "--limit", 5)["resumed"] == 3  # and goes on
    assert found(bundle, "--text", text, "--window", 21, "--limit", 3)["resumed"] == 0
    assert found(bundle, "--text", text, "--window", 20, "--limit", 3, "--stride", 19)["resumed"] == 0
    assert found(bundle, "--text", written(tmp_path / "other", TEXT + "."), "--window", 20)["resumed"] == 0
    assert found(bundle, "--text", text, "--window", 20, "--limit", 3, "--restart") == first


def test_a_killed_run_goes_on_where_it_was(bundle: Path, tmp_path: Path, an_empty_cache: Path) -> None:
    text = written(tmp_path / "text", TEXT * 100)
    options = ("--text", text, "--window", 24, "--stride", 1)
    child = start("eval", bundle, *options, cwd=tmp_path, XDG_CACHE_HOME=str(an_empty_cache))
    try:
        until = time.monotonic() + 60
        while sum(len(file.read_bytes().splitlines()) for file in an_empty_cache.glob("llama-export/eval/*")) < 20:
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        child.kill()
        child.communicate()
    (ledger,) = an_empty_cache.glob("llama-export/eval/*")
    done = ledger.read_bytes().count(b"\n") - 1
    ledger.write_bytes(ledger.read_bytes() + b'{"item":' + str(done).encode())  # as if killed while writing
    on = found(bundle, *options, "--limit", done + 30)
    assert on["resumed"] == done
    assert found(bundle, *options, "--limit", done + 30, "--restart") == on | {"resumed": 0}


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"", (), "is empty"),
        (b"caf\xe9", (), "not UTF-8"),
        ("Some text.", ("--window", 65), "from 2 to the bundle's context 64, not 65"),
        ("Some text.", ("--window", 8, "--stride", 9), "a larger one skips tokens"),
        ("Some text.", ("--window", 1), "--window"),
        ("Some text.", ("--limit", 0), "--limit"),
        ("Some text.", ("--adapter", "polite"), "polite"),
        ("Some text.", ("--original-adapter", "x"), "add --model"),
        ("Some text.", ("--tasks", "x"), "one of --text FILE and --tasks FILE"),
    ],
)
def test_wrong_texts_and_options(
    bundle: Path, tmp_path: Path, content: str | bytes, options: tuple[object, ...], said: str
) -> None:
    assert said in refused(bundle, "--text", written(tmp_path / "text", content), *options)


def test_a_loss_beyond_any_perplexity_is_one_sentence(tmp_path: Path) -> None:
    llama = random_llama()
    llama.weights["norm"] *= np.float32(1e6)
    result = call("eval", write_bundle(tmp_path / "bundle", llama).path, "--text", written(tmp_path / "file", TEXT))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "too large for a perplexity" in result.stderr


def test_what_is_to_be_read_must_be_named(bundle: Path, tmp_path: Path) -> None:
    assert "one of --text FILE and --tasks FILE" in refused(bundle)
    assert "There is no file" in refused(bundle, "--text", tmp_path / "none")
    tasks = written(tmp_path / "tasks", json.dumps(READY))
    assert "--window is for --text" in refused(bundle, "--tasks", tasks, "--window", 9)
    assert "--model is for --text" in refused(bundle, "--tasks", tasks, "-m", "x")


@pytest.mark.parametrize(("kind", "content", "said"), [("--text", TEXT, "window 1"), ("--tasks", None, "line 1")])
def test_logits_that_are_not_finite_are_an_error(tmp_path: Path, kind: str, content: str | None, said: str) -> None:
    llama = random_llama()
    llama.weights["norm"][3] = np.nan
    bundle = write_bundle(tmp_path / "bundle", llama).path
    result = call("eval", bundle, kind, written(tmp_path / "file", content or json.dumps(READY)))
    assert result.exit_code == 1
    assert "not finite" in result.stderr
    assert said in result.stderr


READY = {"query": "Question: Why?", "choices": ["So.", "Because of it."], "gold": 1}
HELLASWAG = {
    "activity_label": "Roof",
    "ctx_a": "A man [title] sits.",
    "ctx_b": "he [substeps] Begins",
    "ctx": "unused",
    "endings": ["to  rip [x] it.", "to sing."],
    "label": "1",
}
ARC = {"question": "Which?", "choices": {"text": ["one", "two", "tree"], "label": ["A", "B", "C"]}, "answerKey": "C"}
ASKED: list[tuple[dict[str, Any], str, list[str], int]] = [
    (READY, "Question: Why?\nAnswer:", ["So.", "Because of it."], 1),
    ({"query": "Question: Why? Answer:", "choices": ["a", "b"], "gold": 0}, "Question: Why? Answer:", ["a", "b"], 0),
    ({"query": "Roof: he", "choices": ["a b", "b"], "gold": 0}, "Roof: he", ["a b", "b"], 0),
    ({"query": "Roof:  ", "choices": ["a b", "b"], "gold": 0}, "Roof:", ["  a b", "  b"], 0),
    ({"goal": "Cut", "sol1": "Saw", "sol2": "Rub", "label": 0}, "Question: Cut\nAnswer:", ["Saw", "Rub"], 0),
    (ARC, "Question: Which?\nAnswer:", ["one", "two", "tree"], 2),
    (ARC | {"answerKey": "2"}, "Question: Which?\nAnswer:", ["one", "two", "tree"], 1),
    (
        ARC | {"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "B"},
        "Question: Which?\nAnswer:",
        ["x", "y"],
        1,
    ),
    (HELLASWAG, "Roof: A man.  sits. He begins", ["to rip it.", "to sing."], 1),
    ({"ctx": "She", "endings": ["x", "yy", "z"], "label": 2}, "She", ["x", "yy", "z"], 2),
]


@pytest.mark.parametrize(("line", "context", "choices", "gold"), ASKED, ids=range(len(ASKED)))
def test_every_form_is_scored_by_the_book(
    bundle: Path,
    llama: TinyLlama,
    tmp_path: Path,
    an_empty_cache: Path,
    line: dict[str, Any],
    context: str,
    choices: list[str],
    gold: int,
) -> None:
    if line is HELLASWAG:
        context = "Roof: A man. sits. He begins"  # two spaces become one
    got = found(bundle, "--tasks", written(tmp_path / "tasks", json.dumps(line)))
    before = [BOS, *ids_of(context)]
    expected = [-sum(losses(llama, [*before, *ids_of(f" {choice}")], len(before))) for choice in choices]
    (ledger,) = an_empty_cache.glob("llama-export/eval/*")
    (item,) = (json.loads(one) for one in ledger.read_text().splitlines()[1:])
    assert item["log_p"] == pytest.approx(expected, rel=1e-5)
    lengths = [len(choice.strip()) for choice in choices]
    assert got["accuracy"]["value"] == float(np.argmax(expected) == gold)
    assert got["accuracy_per_character"]["value"] == float(np.argmax(np.divide(expected, lengths)) == gold)
    assert got["chance"] == 1 / len(choices)
    assert sum(got["forms"].values()) == 1
    assert got["forms"].keys() <= FORMS.keys()


def test_characters_and_bytes_are_counted_apart(bundle: Path, llama: TinyLlama, tmp_path: Path) -> None:
    questions = [
        {"query": f"Q{number}", "choices": ["東京東京 and so on, and on", "and on and on"], "gold": 0}
        for number in range(40)
    ]
    got = found(bundle, "--tasks", written(tmp_path / "tasks", "\n".join(map(json.dumps, questions)) + "\n"))
    right = {"accuracy": 0, "accuracy_per_character": 0, "accuracy_per_byte": 0}
    for question in questions:
        before = [BOS, *ids_of(question["query"])]
        log_p = [-sum(losses(llama, [*before, *ids_of(f" {one}")], len(before))) for one in question["choices"]]
        for key, length in zip(right, (lambda _: 1, len, lambda one: len(one.encode())), strict=True):
            right[key] += int(
                np.argmax([p / length(one) for p, one in zip(log_p, question["choices"], strict=True)]) == 0
            )
    assert {key: got[key]["value"] * 40 for key in right} == pytest.approx(right)
    assert len(set(right.values())) > 1


def test_a_long_context_loses_its_beginning_and_is_counted(
    bundle: Path, llama: TinyLlama, tmp_path: Path, an_empty_cache: Path
) -> None:
    query, choices = "x" * 50 + "The keeper", ["a", "climbed", "went up the stairs", "z"]
    line = {"query": query, "choices": choices, "gold": 0}
    got = found(bundle, "--tasks", written(tmp_path / "tasks", json.dumps(line)))
    expected = []
    for choice in choices:
        behind = ids_of(f" {choice}")
        ids = [BOS, *ids_of(query), *behind][-65:]  # as lm-evaluation-harness: the last is only predicted
        expected.append(-sum(losses(llama, ids, len(ids) - len(behind))))
    (ledger,) = an_empty_cache.glob("llama-export/eval/*")
    item = json.loads(ledger.read_text().splitlines()[1])
    assert item["log_p"] == pytest.approx(expected, rel=1e-5)
    assert item["cut"] == 2
    assert got["cut"] == 1
    assert "1 contexts were too long" in call("eval", bundle, "--tasks", tmp_path / "tasks").stdout


def test_a_context_is_computed_once(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_export.runtime.backend import OnnxRuntimeBackend

    computed: list[int] = []
    plain = OnnxRuntimeBackend.extend
    monkeypatch.setattr(
        OnnxRuntimeBackend,
        "extend",
        lambda self, ids, keep=1: computed.append(len(ids)) or plain(self, ids, keep),
    )
    line = {"query": "Q" * 30, "choices": ["ab", "c", "def"], "gold": 0}
    found(bundle, "--tasks", written(tmp_path / "tasks", json.dumps(line)))
    assert computed == [31, 2, 1, 3]


def test_questions_go_on_too(bundle: Path, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(READY | {"query": f"Question: {number}?"}) for number in range(6))
    tasks = written(tmp_path / "tasks", f"{lines}\n\n")
    assert found(bundle, "--tasks", tasks, "--limit", 4)["questions"] == 4
    got = found(bundle, "--tasks", tasks)
    assert (got["resumed"], got["questions"], got["questions_in_file"]) == (4, 6, 6)
    assert found(bundle, "--tasks", tasks, "--restart") == got | {"resumed": 0}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 3: this is no JSON object"),
        ("[" * 100_000, "line 3: this is no JSON object"),
        ("[1]", "line 3: this is no JSON object"),
        ("{}", "the keys none are of no known form"),
        ({"querry": "x", "choices": [], "gold": 1}, "Did you mean 'query'?"),
        (READY | {"gold": 2}, "the answer is number 2 (from 0), but there are 2 choices"),
        (READY | {"gold": -1}, "the answer is number -1"),
        (READY | {"gold": True}, "gold must be the number"),
        (READY | {"gold": "x"}, "gold must be the number"),
        (READY | {"gold": "9" * 5000}, "gold must be the number"),
        (READY | {"choices": ["a"]}, "there are 1 choices"),
        (READY | {"choices": ["a", " "]}, "choice 1 (from 0) is empty"),
        (READY | {"choices": ["a", 1]}, "choices must be a list of texts"),
        (READY | {"choices": "ab"}, "choices must be a list of texts"),
        (READY | {"query": 1}, "query must be a text"),
        (READY | {"query": "\ud800"}, "not valid Unicode"),
        (ARC | {"answerKey": "D"}, "answerKey is 'D', which is none of the labels A, B and C"),
        (ARC | {"answerKey": ""}, "answerKey is ''"),
        (ARC | {"choices": ["a", "b"]}, "choices must be an object"),
        (ARC | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "2 texts and 1 labels"),
        (HELLASWAG | {"label": ""}, "a test set without answers has none"),
        (HELLASWAG | {"endings": ["[a]", "b"]}, "choice 0 (from 0) is empty"),
    ],
)
def test_lines_that_are_no_questions(bundle: Path, tmp_path: Path, line: object, said: str) -> None:
    bad = line if isinstance(line, str) else json.dumps(line)
    tasks = written(tmp_path / "tasks", f"{json.dumps(READY)}\n\n{bad}\n")
    message = refused(bundle, "--tasks", tasks)
    assert said in message.replace("\n", " ")
    assert "line 3" in message


def test_a_choice_beyond_the_context_is_refused(bundle: Path, tmp_path: Path) -> None:
    tasks = written(tmp_path / "tasks", json.dumps(READY | {"choices": ["a", "b" * 64]}))
    assert "choice 1 (from 0) has 65 tokens, more than the context of 64" in refused(bundle, "--tasks", tasks)
    assert found(bundle, "--tasks", written(tmp_path / "t", json.dumps(READY | {"choices": ["a", "b" * 63]})))


def test_an_empty_context_begins_with_bos(bundle: Path, llama: TinyLlama, tmp_path: Path, an_empty_cache: Path) -> None:
    found(bundle, "--tasks", written(tmp_path / "tasks", json.dumps(READY | {"query": ""})))
    (ledger,) = an_empty_cache.glob("llama-export/eval/*")
    item = json.loads(ledger.read_text().splitlines()[1])
    expected = [-sum(losses(llama, [BOS, *ids_of(f" {choice}")], 1)) for choice in READY["choices"]]
    assert item["log_p"] == pytest.approx(expected, rel=1e-5)


def test_people_get_a_table(bundle: Path, tmp_path: Path) -> None:
    result = call("eval", bundle, "--text", written(tmp_path / "text", TEXT), "--window", 16)
    assert result.stdout.startswith("perplexity ")
    assert "Scoring 19 windows" in result.stderr
    assert call("eval", bundle, "--text", tmp_path / "text", "-q").stderr == ""
    result = call("eval", bundle, "--tasks", written(tmp_path / "tasks", json.dumps(READY)))
    assert "1 of the 1 questions; who guesses is right in 50.0 %." in result.stdout


def test_the_bundle_is_left_as_it_is(bundle: Path, tmp_path: Path) -> None:
    before = open_bundle(bundle).manifest_sha256
    names = sorted(path.name for path in bundle.iterdir())
    found(bundle, "--text", written(tmp_path / "text", TEXT))
    assert open_bundle(bundle).manifest_sha256 == before
    assert sorted(path.name for path in bundle.iterdir()) == names
